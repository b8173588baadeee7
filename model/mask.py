"""Who sees whom: one function of positions, segments, causality, window and prefix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from model.errors import InputError

EVERY = -1  # In the place of a key's segment: it is seen by every segment.


def attention_mask(
  q_pos: Int[Array, "B T"],
  kv_pos: Int[Array, "B S"],
  q_seg: Int[Array, "B T"] | None = None,
  kv_seg: Int[Array, "B S"] | None = None,
  *,
  causal: bool,
  window: int | None = None,
  bidirectional: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 T S"]:
  """True where query t may see key s.

  Args:
    q_pos, kv_pos: each token's position in its document; −1 is "nothing here" and neither sees nor
      is seen.
    q_seg, kv_seg: segments from 1, 0 is nothing; tokens see their own segment, and keys of EVERY
      one. Both or none.
    causal: keys after the query are hidden.
    window: causal: a query sees this many tokens, its own included. Not causal: it sees keys at
      most window // 2 away on either side.
    bidirectional: marks the keys of each document's prefix (prefix LM). Where causal, tokens of a
      prefix see all of that prefix that lies less than `window` away.

  Raises:
    InputError: if only one of `q_seg` and `kv_seg` is given.
  """
  if (q_seg is None) != (kv_seg is None):
    raise InputError("attention_mask: give segments for both queries and keys, or for neither.")
  q, k = q_pos[:, None, :, None], kv_pos[:, None, None, :]
  seen = (q >= 0) & (k >= 0)
  if q_seg is not None and kv_seg is not None:
    q_doc, kv_doc = q_seg[:, None, :, None], kv_seg[:, None, None, :]
    seen &= ((q_doc == kv_doc) | (kv_doc == EVERY)) & (q_doc > 0)
  if not causal:
    return seen if window is None else seen & (jnp.abs(q - k) <= window // 2)
  visible = k <= q
  if window is not None:
    visible &= k > q - window
  if bidirectional is not None:
    # The prefix that a query lies in ends at the last marked key of its own segment.
    prefix = seen & bidirectional[:, None, None, :]
    inside = q <= jnp.max(jnp.where(prefix, k, -1), axis=-1, keepdims=True)
    visible |= prefix & inside & (True if window is None else jnp.abs(q - k) < window)
  return seen & visible


def positions_of(seg: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Positions that restart at 0 in each segment; −1 where `seg` is 0. int32."""
  index = jnp.arange(seg.shape[1])
  # In segment order, a token's position is its distance from its segment's first token.
  order = jnp.argsort(seg, axis=1, stable=True)
  ordered = jnp.take_along_axis(seg, order, axis=1)
  starts = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  rank = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  pos = jnp.put_along_axis(jnp.zeros_like(rank), order, rank, axis=1, inplace=False)
  return jnp.where(seg == 0, -1, pos).astype(jnp.int32)
