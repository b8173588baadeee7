"""Cross-entropy of tokens, as the pair (sum, weight) that makes every kind of averaging exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
  label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats = log_z - label
  minimized = nats
  if label_smoothing:
    even = log_z - logits[..., :vocab_size].mean(-1)
    minimized = (1.0 - label_smoothing) * nats + label_smoothing * even
  if z_loss:
    minimized = minimized + z_loss * jnp.square(log_z)
  weights = weights.astype(nats.dtype)
  return jnp.sum(minimized * weights), jnp.sum(weights), jnp.sum(nats * weights)
