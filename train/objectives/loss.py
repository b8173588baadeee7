"""Losses as sums with weights, which makes every kind of averaging exact."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.context import seq_parts
from model.errors import InputError
from model.moe import router_losses
from model.transformer import Aux, Inputs

Mean = tuple[Array, Array]  # (sum, weight)
Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
  """What an objective says of a batch, or of a part of one.

  What is minimized is the sum over `terms` of (sum of the term) / (its weight over the whole batch,
  `Objective.weights`), and `penalty`, a mean that does not depend on the number of tokens (the
  losses of routers). `means` are reported: `loss` is nats of each target. `tokens` and `pairs`
  count that by which model FLOPs are counted (`model.flops`).
  """

  terms: dict[str, Array]
  means: dict[str, Mean]
  penalty: Array
  tokens: dict[str, Array]
  pairs: dict[str, Array]


def inputs_of(batch: Batch, side: str = "", *, noise: float = 0.0) -> Inputs:
  """What a stack reads from a side of a batch; `noise` is that of its embeddings in training."""
  return Inputs(
    batch[f"{side}tokens"], batch[f"{side}positions"], batch[f"{side}segments"],
    types=batch.get(f"{side}types"), bidirectional=batch.get(f"{side}prefix"), ordered=True,
    noise=noise, placed=True,
  )  # fmt: skip


def token_loss(
  logits: Float[Array, "... V"],
  targets: Int[Array, "..."],
  weights: Float[Array, "..."],
  *,
  vocab_size: int,
  z_loss: float,
  label_smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
  """Returns (sum of what is minimized, sum of weights, sum of nats); the caller divides, once.

  Args:
    logits: scores in at least float32; columns from `vocab_size` on are padding, at -inf.
    z_loss: weight of log² of the softmax normalizer (PaLM, arXiv:2204.02311, section 5).
    label_smoothing: share of the target's probability spread evenly over the vocabulary
      (Szegedy et al., arXiv:1512.00567, section 7).
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A gather would scatter its gradient into a second array of the logits' size.
  chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
  label = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
  nats = log_z - label
  minimized = nats
  if label_smoothing:
    even = log_z - logits[..., :vocab_size].mean(-1)
    minimized = (1.0 - label_smoothing) * nats + label_smoothing * even
  if z_loss:
    minimized = minimized + z_loss * jnp.square(log_z)
  weights = weights.astype(nats.dtype)
  return jnp.sum(minimized * weights), jnp.sum(weights), jnp.sum(nats * weights)


def right_answers(
  logits: Float[Array, "... V"], targets: Int[Array, "..."], weights: Float[Array, "..."]
) -> Mean:
  """(sum of the weights whose target scores highest, sum of weights)."""
  right = jnp.argmax(logits, axis=-1) == targets
  return jnp.sum(right * weights), jnp.sum(weights)


def router_penalty(stats: Aux, cfg: ModelConfig) -> Float[Array, ""]:
  """Balance and z-losses of the routers, weighted as the config says; 0 without experts."""
  if not stats:
    return jnp.zeros(())
  losses = router_losses(stats)
  return cfg.balance_loss * losses["balance_loss"] + cfg.router_z_loss * losses["router_z_loss"]


def in_parts(
  sums: Callable[[Array, Array, Array], tuple[Array, ...]],
  x: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  parts: int,
  *,
  few: bool = False,
) -> tuple[Array, ...]:
  """`sums(x, targets, weights)`, the scores of whose words are in memory for one part at a time.

  Part i has the tokens i, i + parts, … of each row, so that a length that is split over devices
  stays where it is. Of several parts the backward pass scores the words once more; weights of the
  head that are split over devices are gathered, and their gradients summed, for each part.

  Args:
    few: many tokens weigh nothing. Where no length is split, those that weigh something come first
      in their row, and a part without any is not scored.

  Raises:
    InputError: if the parts are not equally long.
  """
  if parts == 1:
    return sums(x, targets, weights)
  length = x.shape[1]
  if length % parts:
    raise InputError(
      f"objective.loss_parts={parts} does not divide the {length} places of a row that the head "
      "reads: change one of them."
    )
  few = few and seq_parts() == 1
  if few:
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    targets, weights = (jnp.take_along_axis(rows, order, axis=1) for rows in (targets, weights))

  def split(rows: Array) -> Array:
    shape = (parts, -1) if few else (-1, parts)
    return jnp.moveaxis(rows.reshape(rows.shape[0], *shape, *rows.shape[2:]), 1 if few else 2, 0)

  one = jax.checkpoint(sums)
  pieces = tuple(map(split, (x, targets, weights)))
  first = jax.eval_shape(one, *(piece[0] for piece in pieces))
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
  if few:  # The outer checkpoint keeps the branch from storing the head's weights for each part.
    scored = one
    one = jax.checkpoint(
      lambda *piece: jax.lax.cond(jnp.any(piece[2] != 0), scored, lambda *_: zeros, *piece)
    )
  add = lambda total, piece: (jax.tree.map(jnp.add, total, one(*piece)), None)
  return jax.lax.scan(add, zeros, pieces)[0]


class Work(TypedDict):
  """What model FLOPs are counted by: see `model.flops.model_flops`."""

  tokens: dict[str, Array]
  pairs: dict[str, Array]


def work(cfg: ModelConfig, inputs: Inputs, source: Inputs | None = None, *, head: Any) -> Work:
  """The work of a pass.

  Args:
    inputs: what the last stack reads.
    source: what an encoder before it reads.
    head: number of vectors that the head reads.
  """
  sides = {cfg.stacks[-1]: inputs} | ({} if source is None else {"encoder": source})
  tokens = {name: jnp.sum(side.pos >= 0) for name, side in sides.items()}
  pairs = {
    f"{name}.{kind.window}": _pairs(side, kind.window, causal=kind.causal)
    for name, side in sides.items()
    for kind in set(cfg.layers(name))
  }
  if source is not None:
    seg = lambda side: (side.pos >= 0).astype(jnp.int32) if side.seg is None else side.seg
    reader, read = seg(inputs)[:, :, None], seg(source)[:, None]
    pairs["cross"] = jnp.sum((reader == read) & (reader > 0), dtype=jnp.float32)
  return Work(tokens={**tokens, "head": jnp.asarray(head)}, pairs=pairs)


def _pairs(side: Inputs, window: int | None, *, causal: bool) -> Float[Array, ""]:
  """Query-key pairs that one layer computes: see `model.flops.visible_pairs`."""
  pos = side.pos
  if causal:
    seen = pos + 1 if window is None else jnp.minimum(pos + 1, window)
    if side.bidirectional is not None:  # Those before a token of a prefix see it too.
      seen += jnp.where(side.bidirectional, seen - 1, 0)
  else:  # Each token with those before it twice, for those after it, and with itself.
    seen = 2 * (pos if window is None else jnp.minimum(pos, window // 2)) + 1
  return jnp.sum(jnp.where(pos >= 0, seen, 0).astype(jnp.float32))
