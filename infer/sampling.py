"""How the next token is chosen: restrictions of the logits in one order, then a draw.

The order is Transformers' own: temperature, top-k, top-p, min-p, typical-p, epsilon. Every setting
is an array with one value per row, and a neutral value switches a restriction off, so that one
compiled program serves every mixture of requests. Nothing sorts the vocabulary: thresholds are
found by bisection, which is exact and on a CPU twenty times faster than a sort of 50,000 logits.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

OFF_TOP_K = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides logits by the temperature; a row at 0 is greedy and stays as it is."""

  value: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The largest logit becomes 0, so that no temperature overflows."""
    scale = jnp.where(self.value > 0, self.value, 1.0)[:, None]
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
  """Keeps the k largest logits and what ties with the last of them (Fan et al., arXiv:1805.04833).

  A k of at least the vocabulary's size keeps all.
  """

  k: Int[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    order = _ordered(logits)

    def restrict(logits):
      reached = lambda t: jnp.sum(order >= t[:, None], axis=-1) >= self.k
      lowest = _last_true(reached, jnp.zeros(self.k.shape, jnp.uint32), bits=32)
      return jnp.where(order >= lowest[:, None], logits, -jnp.inf)

    return jax.lax.cond(jnp.any(self.k < logits.shape[-1]), restrict, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
  """Keeps the most probable tokens up to the first whose sum reaches p, and what ties with it.

  A p of 1 keeps all. Source: nucleus sampling, Holtzman et al., arXiv:1904.09751.
  """

  p: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    order = _ordered(logits)

    def restrict(logits):
      keep = _first_to_reach(order, jax.nn.softmax(logits, axis=-1), self.p)
      keep |= (self.p >= 1.0)[:, None]
      return jnp.where(keep, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(self.p < 1.0), restrict, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
  """Keeps tokens at least p times as probable as the most probable one (arXiv:2407.01082).

  A p of 0 keeps all.
  """

  p: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    floor = jnp.max(logits, axis=-1) + jnp.log(self.p)
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TypicalP:
  """Keeps the tokens whose surprise is nearest to the expected one, up to the first sum of p.

  What ties with the last of them stays; a p of 1 keeps all. Source: locally typical sampling,
  Meister et al., arXiv:2202.00666, algorithm 1.
  """

  p: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    def restrict(logits):
      logprobs = jax.nn.log_softmax(logits, axis=-1)
      probs = jnp.exp(logprobs)
      entropy = -jnp.sum(jnp.where(probs > 0, probs * logprobs, 0.0), axis=-1, keepdims=True)
      order = _ordered(-jnp.abs(logprobs + entropy))
      keep = _first_to_reach(order, probs, self.p) | (self.p >= 1.0)[:, None]
      return jnp.where(keep, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(self.p < 1.0), restrict, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epsilon:
  """Keeps tokens of at least this probability, and the most probable one; 0 keeps all.

  Source: Hewitt et al., arXiv:2210.15191, section 4.
  """

  least: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    def restrict(logits):
      top = jnp.max(logits, axis=-1, keepdims=True)
      keep = (jax.nn.softmax(logits, axis=-1) >= self.least[:, None]) | (logits == top)
      return jnp.where(keep, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(self.least > 0.0), restrict, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
  """All that decides which token a row gets from its logits.

  `seed` holds the two words of each request's random key; `sequence` numbers the sequences of one
  request. A draw depends on them and on the token's position alone, not on the row it is in.
  """

  temperature: Temperature
  top_k: TopK
  top_p: TopP
  min_p: MinP
  typical_p: TypicalP
  epsilon: Epsilon
  seed: UInt32[Array, "B 2"]
  sequence: Int[Array, "B"]

  def restrict(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits that are drawn from; what is ruled out is -inf."""
    for step in (
      self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon
    ):  # fmt: skip
      logits = step(logits)
    return logits

  def __call__(self, logits: Float[Array, "B V"], position: Int[Array, "B"]) -> Int[Array, "B"]:
    """The token of each row, for the place `position` in its sequence."""
    drawn = self.temperature.value > 0

    def sampled(logits):
      tokens = draw(self.restrict(logits), self.keys(position))
      return jnp.where(drawn, tokens, greedy(logits))

    return jax.lax.cond(jnp.any(drawn), sampled, greedy, logits)

  def keys(self, position: Int[Array, "B"]) -> jax.Array:
    """One random key per row, of the request, the sequence and the position."""

    def key(seed, sequence, position):
      request = jax.random.wrap_key_data(seed, impl="threefry2x32")
      return jax.random.fold_in(jax.random.fold_in(request, sequence), position)

    return jax.vmap(key)(self.seed, self.sequence, position)


def seed_words(seed: int) -> np.ndarray:
  """The key of a seed of up to 64 bits as uint32 (2,); below 2**32 it is `jax.random.key(seed)`."""
  return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
  """The most probable token, the first of those that tie."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(logits: Float[Array, "B V"], keys: jax.Array) -> Int[Array, "B"]:
  """A token of each row's softmax, by inversion: one uniform number a row instead of V.

  Sums of a growing part of the vocabulary are taken in one fixed order, so they never fall and a
  token of probability 0 is never the first to exceed the uniform number.
  """
  mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  index = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
  before = lambda n: jnp.sum(jnp.where(index < n[:, None], mass, 0.0), axis=-1)
  start = jnp.zeros(logits.shape[0], jnp.uint32)
  total = before(jnp.full_like(start, logits.shape[-1]))
  target = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys) * total
  bits = (logits.shape[-1] - 1).bit_length()
  return _last_true(lambda n: before(n) <= target, start, bits=bits).astype(jnp.int32)


def _first_to_reach(
  order: UInt32[Array, "B V"], probs: Float[Array, "B V"], p: Float[Array, "B"]
) -> Bool[Array, "B V"]:
  """The tokens of the highest order up to the first whose sum of probabilities reaches p."""
  above = lambda t: jnp.sum(jnp.where(order > t[:, None], probs, 0.0), axis=-1)
  # A token stays when those above it sum to less than p: the last threshold that still has p
  # above it lies just under the lowest token that stays.
  under = _last_true(lambda t: above(t) >= p, jnp.zeros(p.shape, jnp.uint32), bits=32)
  return order > under[:, None]


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
  """float32 -> uint32 in the same order; -inf is above 0."""
  x = x.astype(jnp.float32)
  signed = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 is 0.
  signed = jnp.where(signed < 0, signed ^ 0x7FFFFFFF, signed)
  return jax.lax.bitcast_convert_type(signed, jnp.uint32) ^ jnp.uint32(0x80000000)


def _last_true(
  holds: Callable[[UInt32[Array, "B"]], Bool[Array, "B"]], start: UInt32[Array, "B"], *, bits: int
) -> UInt32[Array, "B"]:
  """The largest number of `bits` bits for which `holds`, which is true up to it and false after."""

  def body(i, found):
    trial = found | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(trial), trial, found)

  return jax.lax.fori_loop(0, bits, body, start)
