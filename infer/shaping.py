"""What changes the scores of the next token by what has been said: biases, penalties, bans.

The order is Transformers' own: biases, the repetition penalty, the presence and frequency penalties
(which it does not have), repeated n-grams, then the words that are never said and the tokens that
alone may be, and a prefix; last what a constraint rules out (`infer.decode.Request`). Every setting
is an array, and a neutral value switches it off, so that one compiled program serves every mixture
of requests; what nobody asks for is not computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """The tokens of each row: `count` of them, of which the first `prompt` were given."""

  tokens: Int[Array, "B L"]
  prompt: Int[Array, "B"]
  count: Int[Array, "B"]

  def push(self, token: Int[Array, "B"], goes_on: Bool[Array, "B"]) -> "History":
    """The history with one more token in each row that goes on."""
    place = jnp.where(goes_on, self.count, self.tokens.shape[1])
    row = jnp.arange(len(token))
    tokens = self.tokens.at[row, place].set(token, mode="drop")
    return History(tokens, self.prompt, self.count + goes_on)

  def occurrences(self, vocab: int, *, prompt: bool) -> Int[Array, "B V"]:
    """How often each token has been said; in the prompt as well if `prompt`."""
    place = jnp.arange(self.tokens.shape[1])
    first = 0 if prompt else self.prompt[:, None]
    said = (place >= first) & (place < self.count[:, None])
    row = jnp.arange(len(self.tokens))[:, None]
    zeros = jnp.zeros((len(self.tokens), vocab), jnp.int32)
    return zeros.at[row, self.tokens].add(said.astype(jnp.int32))

  def ends_with(self, words: Int[Array, "W L"], lengths: Int[Array, "W"]) -> Bool[Array, "B W"]:
    """Whether each row's last tokens are the first `lengths` of a word; true for none."""
    found = lengths <= self.count[:, None]
    for i in range(words.shape[1]):
      place = self.count[:, None] - lengths + i
      said = jnp.take_along_axis(self.tokens, jnp.maximum(place, 0), axis=1)
      found &= (said == words[:, i]) | (i >= lengths)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBias:
  """Adds a bias to the last token of a word when the tokens before it have been said.

  A word of one token always has its bias; one of -inf is never completed. Rows of no token are
  padding.
  """

  words: Int[Array, "W L"]
  lengths: Int[Array, "W"]
  bias: Float[Array, "W"]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    def shape(logits):
      prefix = jnp.maximum(self.lengths - 1, 0)
      holds = said.ends_with(self.words, prefix) & (self.lengths > 0)
      last = jnp.take_along_axis(self.words, prefix[:, None], axis=1)[:, 0]
      return logits.at[:, last].add(jnp.where(holds, self.bias, 0.0))

    return jax.lax.cond(jnp.any(self.lengths > 0), shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
  """Divides the positive scores of tokens that are in prompt or text, multiplies the negative ones.

  A penalty of 1 changes nothing. Source: CTRL, Keskar et al., arXiv:1909.05858, section 4.1.
  """

  penalty: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    def shape(logits):
      by = self.penalty[:, None]
      less = jnp.where(logits < 0, logits * by, logits / by)
      return jnp.where(said.occurrences(logits.shape[-1], prompt=True) > 0, less, logits)

    return jax.lax.cond(jnp.any(self.penalty != 1.0), shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountPenalty:
  """Subtracts `presence` once and `frequency` as often as a new token has been said before.

  The prompt does not count. Source: the OpenAI API, "presence and frequency penalties".
  """

  presence: Float[Array, "B"]
  frequency: Float[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    def shape(logits):
      counts = said.occurrences(logits.shape[-1], prompt=False)
      once = self.presence[:, None] * (counts > 0)
      return logits - once - self.frequency[:, None] * counts

    asked = jnp.any((self.presence != 0) | (self.frequency != 0))
    return jax.lax.cond(asked, shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoRepeatNGram:
  """Rules out tokens that would complete a run of `size` tokens that is there already; 0 is off.

  The prompt counts. Source: Paulus et al., arXiv:1705.04304, section 2.5.
  """

  size: Int[Array, "B"]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    def shape(logits):
      place = jnp.arange(said.tokens.shape[1])
      size, count = self.size[:, None], said.count[:, None]
      # Place p would be the next token again if the size - 1 tokens before it are the last ones.
      repeats = (size > 0) & (place >= size - 1) & (place < count) & (count >= size)

      def compare(back, repeats):
        before = jnp.roll(said.tokens, back, axis=1)
        last = jnp.take_along_axis(said.tokens, jnp.maximum(count - back, 0), axis=1)
        return repeats & ((before == last) | (back > size - 1))

      repeats = jax.lax.fori_loop(1, jnp.maximum(jnp.max(self.size), 1), compare, repeats)
      row = jnp.arange(len(logits))[:, None]
      token = jnp.where(repeats, said.tokens, logits.shape[-1])
      return logits.at[row, token].set(-jnp.inf, mode="drop")

    return jax.lax.cond(jnp.any(self.size > 0), shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedTokens:
  """Rules out all tokens but these; with padding (ids beyond the vocabulary) alone: none."""

  tokens: Int[Array, "A"]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    vocab = logits.shape[-1]

    def shape(logits):
      kept = jnp.zeros(vocab, bool).at[self.tokens].set(True, mode="drop")
      return jnp.where(kept, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(self.tokens < vocab), shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Rules out all tokens but the one that has its place at the beginning of the text."""

  tokens: Int[Array, "F"]
  length: Int[Array, ""]

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    def shape(logits):
      place = said.count - said.prompt
      token = self.tokens[jnp.minimum(place, len(self.tokens) - 1)]
      others = jnp.arange(logits.shape[-1]) != token[:, None]
      forced = jnp.where(others, -jnp.inf, jnp.where(logits > -jnp.inf, logits, 0.0))
      return jnp.where((place < self.length)[:, None], forced, logits)

    return jax.lax.cond(self.length > 0, shape, lambda x: x, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shaping:
  """All that changes scores before anything is drawn, greedily or not, in this order."""

  bias: SequenceBias
  repetition: RepetitionPenalty
  counts: CountPenalty
  ngrams: NoRepeatNGram
  bad_words: SequenceBias
  allowed: AllowedTokens
  prefix: Prefix

  def __call__(self, logits: Float[Array, "B V"], said: History) -> Float[Array, "B V"]:
    for field in dataclasses.fields(self):
      logits = getattr(self, field.name)(logits, said)
    return logits
