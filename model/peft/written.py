"""Networks that write virtual tokens in training, of which only what they write is kept.

P-tuning's (Liu et al., arXiv:2103.10385) writes a prompt, prefix tuning's (Li & Liang,
arXiv:2101.00190, section 4.3) the keys and values of all layers; both in the forms of torch PEFT.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.peft.names import KEY, Names, Path
from model.peft.parameter import adapter_param
from model.peft.virtual import PREFIX, PROMPT, Prefix, Prompt

TABLE, LAST = "table", "out"
_SIDES = ("forward", "backward")

Leaves = Mapping[str, Any]


class Writer(nnx.Module):
  """The parameters of such a network, which nothing reads before `written_out`."""

  def __init__(self, leaves: Leaves):
    for name, leaf in leaves.items():
      vector, axes = name.endswith("_b"), (None,) * len(leaf.shape)
      if len(axes) > 2:  # Keys and values, or the last matrix that writes them and its bias.
        first = {TABLE: (None,), f"{LAST}_w": ("embed",)}.get(name, ())
        axes = (*first, None, None, "kv_heads", "head_dim")
      role = "vector" if vector else "embedding" if name == TABLE else "matrix"
      setattr(self, name, adapter_param(leaf, axes, role=role))


def attach_virtual(net: nnx.Module, found: dict[tuple[str | int, ...], dict[str, Any]]) -> None:
  """Gives a network the virtual tokens among adapters by their owner's path, and takes these out.

  Args:
    found: parameters of adapters, by name.
  """
  for path, leaves in list(found.items()):
    kind: Any = Prompt if PROMPT in leaves else Prefix if PREFIX[0] in leaves else None
    kind = Writer if TABLE in leaves else kind
    if kind is not None:
      owner: Any = net
      for name in path:
        owner = owner[name] if isinstance(name, int) else getattr(owner, name)
      owner.adapter = kind(found.pop(path))


def new_prompt_writer(
  key: jax.Array, *, tokens: int, width: int, hidden: int, lstm_layers: int | None
) -> dict[str, Array]:
  """Parameters of P-tuning's network as PEFT begins them.

  Args:
    tokens, width: of the prompt.
    hidden: width of hidden layers, of each direction where they are recurrent.
    lstm_layers: None: three layers with ReLU between them; else so many recurrent ones and two.
  """
  keys = iter(jax.random.split(key, 8 + 8 * (lstm_layers or 0)))
  leaves = {TABLE: jax.random.normal(next(keys), (tokens, width))}
  if lstm_layers is None:
    sizes = {"in": (width, hidden), "mid": (hidden, hidden), LAST: (hidden, width)}
  else:
    sizes = {"in": (2 * hidden, 2 * hidden), LAST: (2 * hidden, width)}
    even = lambda *shape: _even(next(keys), shape, hidden)
    for layer in range(lstm_layers):
      read = width if layer == 0 else 2 * hidden
      for side in _SIDES:
        name = f"lstm{layer}_{side}"
        leaves[f"{name}_read_w"], leaves[f"{name}_state_w"] = (
          even(read, 4 * hidden), even(hidden, 4 * hidden)
        )  # fmt: skip
        leaves[f"{name}_read_b"], leaves[f"{name}_state_b"] = even(4 * hidden), even(4 * hidden)
  for name, shape in sizes.items():
    leaves[f"{name}_w"] = _even(next(keys), shape, shape[0])
    leaves[f"{name}_b"] = _even(next(keys), shape[1:], shape[0])
  return leaves


def new_prefix_writer(
  key: jax.Array, *, tokens: int, hidden: int, layers: int, heads: int, head_width: int, zero: bool
) -> dict[str, Array]:
  """Parameters of prefix tuning's network as PEFT begins them; `zero`: it writes zeros at first."""
  keys = jax.random.split(key, 5)
  width, written = heads * head_width, (layers, 2, heads, head_width)
  last = _even(keys[3], (hidden, *written), hidden), _even(keys[4], written, hidden)
  if zero:
    last = jnp.zeros_like(last[0]), jnp.zeros_like(last[1])
  return {
    TABLE: jax.random.normal(keys[0], (tokens, width)),
    "in_w": _even(keys[1], (width, hidden), width), "in_b": _even(keys[2], (hidden,), width),
    f"{LAST}_w": last[0], f"{LAST}_b": last[1],
  }  # fmt: skip


def _even(key: jax.Array, shape: tuple[int, ...], inputs: int) -> Array:
  most = 1 / math.sqrt(inputs)
  return jax.random.uniform(key, shape, minval=-most, maxval=most)


def written_out(params: dict, cfg: ModelConfig) -> dict:
  """Nested parameters with what a network writes in its place; others as they are."""
  leaves: Any = flatten_dict(params)
  places = [path[:-1] for path in leaves if len(path) == 3 and path[1:] == (KEY, TABLE)]
  places = [place for place in places if place[0] in cfg.stacks]
  if not places:
    return params
  (place,) = places
  own = {path[-1]: leaves.pop(path) for path in list(leaves) if path[:-1] == place}
  if own[TABLE].ndim == 5:
    return unflatten_dict(leaves | placed_prefix(own[TABLE], cfg))
  if own[f"{LAST}_w"].ndim == 2:
    return unflatten_dict(leaves | {(*place, PROMPT): _prompt(own)})
  return unflatten_dict(leaves | placed_prefix(_prefix(own), cfg))


def rows_of_layers(cfg: ModelConfig) -> np.ndarray:
  """The row of PEFT's table that each layer of the last stack has.

  It is the layer's own, but behind an encoder: there PEFT lays the table twice and deals out every
  fourth pair, so that of an even number of layers every second row is read, and by two layers.
  """
  layers = np.arange(cfg.depth(cfg.stacks[-1]))
  return layers * 2 % len(layers) if cfg.shape == "encoder_decoder" else layers


def placed_prefix(table: Float[Array, "V L 2 K H"], cfg: ModelConfig) -> dict[Path, Array]:
  """Flat parameters of the prefixes of all layers of the last stack, from PEFT's table."""
  stack, out = cfg.stacks[-1], {}
  names, table = Names(cfg), table[:, rows_of_layers(cfg)]
  for place in range(sum(len(pattern) for pattern, _ in cfg.groups(stack))):
    path = (stack, "layers", place, "attn", KEY)
    rows = jnp.moveaxis(table[:, jnp.array(names.layers(path))], 0, 2)  # (layers, 2, V, K, H)
    out |= {(*path, name): rows[:, i] for i, name in enumerate(PREFIX)}
  return out


def _prompt(own: Leaves) -> Float[Array, "V D"]:
  x = own[TABLE]
  if "mid_w" in own:
    return _dense(own, LAST, jax.nn.relu(_dense(own, "mid", jax.nn.relu(_dense(own, "in", x)))))
  for layer in range(sum(name.endswith("_forward_read_w") for name in own)):
    ways = [_lstm(own, f"lstm{layer}_{side}", x, side == "backward") for side in _SIDES]
    x = jnp.concatenate(ways, axis=-1)
  return _dense(own, LAST, jax.nn.relu(_dense(own, "in", x)))


def _prefix(own: Leaves) -> Float[Array, "V L 2 K H"]:
  return _dense(own, LAST, jnp.tanh(_dense(own, "in", own[TABLE])))


def _dense(own: Leaves, name: str, x: Array) -> Array:
  return jnp.tensordot(x, own[f"{name}_w"], 1) + own[f"{name}_b"]


def _lstm(own: Leaves, name: str, x: Float[Array, "V D"], backward: bool) -> Float[Array, "V F"]:
  """One direction of a layer (Hochreiter & Schmidhuber, 1997): gates in, forget, cell, out."""
  read = _dense(own, f"{name}_read", x)
  zeros = jnp.zeros((own[f"{name}_state_w"].shape[0],), x.dtype)

  def step(state, read):
    cell, said = state
    gates = read + _dense(own, f"{name}_state", said)
    enter, keep, new, show = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
    said = jax.nn.sigmoid(show) * jnp.tanh(cell)
    return (cell, said), said

  return jax.lax.scan(step, (zeros, zeros), read, reverse=backward)[1]
