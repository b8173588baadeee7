"""Several adapters of one owner, of which each row of a batch has one, or none."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.errors import InputError
from model.layers import Embed, Linear
from model.moe import ExpertMatrix
from model.peft.lora import sides
from model.peft.parameter import adapter_param, fixed_param
from model.sharding import constrain

Owner = Linear | Embed | ExpertMatrix
NEUTRAL = {"a": 0, "b": 0, "outputs": 1, "shift": 0, "inputs": 1}  # What changes nothing.


def slot_axis(owner: Owner, name: str) -> int:
  """Which axis of a parameter counts the adapters, stacked layers left out."""
  return {"a": 2, "b": 1}[name] if isinstance(owner, ExpertMatrix) else 0


class ByRow(nnx.Module):
  """What the adapters of an owner add to, and make of, what it computes for each row.

  `rows` (P) are numbers of adapters; one too large is none. Row i of what the owner is called with
  has the adapter of `rows[i // (rows / P)]`: one for all, or one for each, or for as many beams or
  candidates as each prompt has, which lie together.

  LoRA is `a` (n, inputs, R) and `b` (n, R, outputs) with its scale; of experts a (E, in, n, R) and
  b (E, n, R, out). `outputs` (n, outputs) multiplies what the owner gives, its bias included, and
  `shift` is added then (DoRA, IA3); `inputs` (n, inputs) multiplies what it reads (IA3).
  """

  a: nnx.Param
  b: nnx.Param

  def __init__(self, owner: Owner, leaves: dict[str, Any]):
    experts, inputs, outputs = sides(owner)
    several = ("rank",) if experts else (None,)  # The axis of adapters.
    axes = {
      "a": (*experts, *inputs, *several, "rank") if experts else (None, *inputs, "rank"),
      "b": (*experts, *several, "rank", *outputs),
      "outputs": (None, *outputs), "shift": (None, *outputs), "inputs": (None, *inputs),
    }  # fmt: skip
    self.many = len(inputs)
    for name in NEUTRAL:
      if name in leaves:
        setattr(self, name, adapter_param(leaves[name], axes[name]))
    self.rows = fixed_param(leaves["rows"], (None,))

  def linear(self, owner: Linear, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the owner and each row's adapter make of `x`, whose first axis is that of rows."""
    x = x.astype(owner.dtype)
    alone = self.rows.shape[-1] == 1  # Then `x` may have any axes.
    x = x[None] if alone else x
    rows = self.numbers(len(x))
    lead = x.ndim - self.many
    y = owner.plain(x * self._of("inputs", rows, x, lead) if hasattr(self, "inputs") else x)
    if hasattr(self, "outputs"):
      y *= self._of("outputs", rows, y, lead)
    if hasattr(self, "shift"):
      y += self._of("shift", rows, y, lead)
    if hasattr(self, "a"):
      a, b = self._taken("a", rows, x.dtype), self._taken("b", rows, x.dtype)
      reads = tuple(range(lead, x.ndim)), tuple(range(1, 1 + self.many))
      low = jax.lax.dot_general(x, a, (reads, ((0,), (0,))))
      y += jax.lax.dot_general(low, b, (((lead,), (1,)), ((0,), (0,))))
    return y[0] if alone else y

  def embedded(self, ids: Int[Array, "B T"], dtype: Any, row_axis: str | None):
    """What is added to the vectors of `ids`."""
    rows = self.numbers(len(ids))
    a = constrain(self.a[...].astype(dtype), (None, row_axis, None))
    low = a.at[rows[:, None], ids].get(mode="fill", fill_value=0)
    low = constrain(low, ("rows", "seq", None))
    return constrain(jnp.einsum("BTR,BRD->BTD", low, self._taken("b", rows, dtype)),
                     ("rows", "seq", None))  # fmt: skip

  def arrays(self, dtype: Any) -> dict[str, Array]:
    """A and B of experts."""
    return {"lora_a": self.a[...].astype(dtype), "lora_b": self.b[...].astype(dtype)}

  def axes(self) -> dict[str, tuple[str, ...]]:
    """Their logical axes."""
    return {"lora_a": self.a.axes, "lora_b": self.b.axes}

  def numbers(self, count: int) -> Int[Array, "B"]:
    """The adapter of each of `count` rows.

    Raises:
      InputError: if they are not as many for each of `rows`.
    """
    rows = self.rows[...]
    if count % len(rows):
      raise InputError(
        f"{count} rows cannot share the adapters that {len(rows)} rows have: choose one adapter "
        "for all."
      )
    return jnp.repeat(rows, count // len(rows))

  def _taken(self, name: str, rows: Int[Array, "B"], dtype: Any) -> Float[Array, "B ..."]:
    """Copies of each row's own.

    Products of each row alone cost on a CPU hardly more than those of one adapter. All adapters at
    once, with the ranks of others masked, are faster for a token of a few rows and two adapters,
    and ten times slower where eight adapters' prompts are read.
    """
    table = getattr(self, name)[...].astype(dtype)
    return table.at[rows].get(mode="fill", fill_value=NEUTRAL[name])

  def _of(self, name: str, rows: Int[Array, "B"], like: Array, lead: int) -> Array:
    """Each row's vector, with axes for its tokens."""
    taken = self._taken(name, rows, like.dtype)
    return taken.reshape(len(taken), *(1,) * (lead - 1), *taken.shape[1:])
