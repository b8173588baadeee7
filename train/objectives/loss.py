"""Cross-entropy of tokens, as the pair (sum, weight) that makes every kind of averaging exact."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.moe import router_losses
from model.transformer import Aux
from train.config import ObjectiveConfig
from train.step import Batch, Loss, LossFn


def token_loss(
  logits: Float[Array, "B T V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
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


def make_loss(graphdef: nnx.GraphDef, cfg: ModelConfig, objective: ObjectiveConfig) -> LossFn:
  """The loss of language models over a batch of rows: see Loss for what it returns."""

  def loss(params: dict, frozen: dict, batch: Batch, key: Array | None) -> Loss:
    net = nnx.merge(graphdef, params, frozen) if frozen else nnx.merge(graphdef, params)
    pos, seg = batch["positions"], batch["segments"]
    x, _, stats = net.hidden(batch["tokens"], pos, seg, key=key, ordered=True)
    minimized, weight, nats = token_loss(
      net.logits(x), batch["targets"], batch["weights"], vocab_size=cfg.real_vocab,
      z_loss=objective.z_loss, label_smoothing=objective.label_smoothing,
    )  # fmt: skip
    return Loss(
      minimized, weight, nats,
      penalty=_router_penalty(stats, cfg).astype(nats.dtype),
      tokens=jnp.sum(pos >= 0),
      pairs={str(w): _pairs(pos, w) for w in {kind.window for kind in cfg.layers()}},
    )  # fmt: skip

  return loss


def _router_penalty(stats: Aux, cfg: ModelConfig) -> Float[Array, ""]:
  if not stats:
    return jnp.zeros(())
  losses = router_losses(stats)
  return cfg.balance_loss * losses["balance_loss"] + cfg.router_z_loss * losses["router_z_loss"]


def _pairs(pos: Int[Array, "B T"], window: int | None) -> Float[Array, ""]:
  """Query-key pairs that a causal layer computes: token at position p sees p + 1, or its window."""
  seen = pos + 1 if window is None else jnp.minimum(pos + 1, window)
  return jnp.sum(seen.astype(jnp.float32))
