"""The compiled loop of decoding steps, and the choice of the first token before it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from infer.sampling import Sampler
from infer.shaping import History, Shaping
from model.cache import Cache
from model.compilation import FewRows
from model.transformer import Inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
  """What the rows of a batch ask for. Stop ids beyond the vocabulary are padding."""

  shaping: Shaping | None  # None where nothing is asked: such programs are compiled sooner.
  sampler: Sampler
  stop_ids: Int[Array, "ends"]  # Tokens that end a row.
  min_new_tokens: Int[Array, ""]  # Before so many new tokens no stop id is chosen.
  # A bit for each token that a constraint lets be the next, after all shaping; None: no constraint.
  allowed: Int[Array, "B words"] | None = None

  def shaped(
    self, logits: Float[Array, "B V"], said: History, count: Int[Array, "..."]
  ) -> Float[Array, "B V"]:
    """The scores that a token is chosen from, behind `count` new tokens."""
    logits = logits if self.shaping is None else self.shaping(logits, said)
    if self.allowed is not None:
      logits = jnp.where(_unpacked(self.allowed, logits.shape[-1]), logits, -jnp.inf)
    ends = jnp.zeros(logits.shape[-1], bool).at[self.stop_ids].set(True, mode="drop")
    early = jnp.reshape(count < self.min_new_tokens, (-1, 1))
    return jnp.where(ends & early, -jnp.inf, logits)


def _unpacked(words: Int[Array, "B words"], count: int) -> Bool[Array, "B count"]:
  """The first bits of words of 32, the lowest of each first."""
  bits = (words[:, :, None] >> jnp.arange(32)) & 1
  return bits.reshape(len(words), -1)[:, :count] > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What was chosen, a column per new token; token -1 where nothing was allowed.

  Log-probabilities are the model's own, in nats, before any processor.
  """

  tokens: Int[Array, "B M"]
  logprobs: Float[Array, "B M"]
  top_tokens: Int[Array, "B M top"]
  top_logprobs: Float[Array, "B M top"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
  """Where the rows are after some steps."""

  count: Int[Array, "B"]  # New tokens.
  token: Int[Array, "B"]  # The newest, not yet in the cache.
  pos: Int[Array, "B"]  # Its position.
  ended: Bool[Array, "B"]
  said: History  # The newest token included.
  drawn: Drawn


@functools.partial(jax.jit, static_argnames=("graphdef", "room", "top"))
def start(
  graphdef: nnx.GraphDef, params: dict, last: Float[Array, "B D"], said: History, request: Request,
  *, room: int, top: int,
) -> Progress:  # fmt: skip
  """Chooses the first token of each row.

  Args:
    last: hidden states of the prompts' last tokens.
    said: the prompts; one of no tokens is a row that only fills the batch.
    room: new tokens that the result has room for.
    top: how many of the most probable tokens to report at each step.
  """
  B, lengths = len(last), said.prompt
  progress = Progress(
    count=jnp.zeros(B, jnp.int32),
    token=jnp.zeros(B, jnp.int32),
    pos=lengths - 1,
    ended=lengths == 0,
    said=said,
    drawn=Drawn(
      tokens=jnp.full((B, room), -1, jnp.int32),
      logprobs=jnp.zeros((B, room), jnp.float32),
      top_tokens=jnp.zeros((B, room, top), jnp.int32),
      top_logprobs=jnp.zeros((B, room, top), jnp.float32),
    ),
  )
  return choose(progress, nnx.merge(graphdef, params).logits(last), request, ~progress.ended)


def active(progress: Progress, until: Int[Array, ""]) -> Bool[Array, "B"]:
  """The rows that go on until they have so many new tokens."""
  return ~progress.ended & (progress.count < until)


@functools.partial(FewRows, static_argnames=("graphdef",), donate_argnames=("cache",))
def decode(
  graphdef: nnx.GraphDef, params: dict, cache: Cache, progress: Progress,
  stopped: Bool[Array, "B"], until: Int[Array, ""], request: Request,
) -> tuple[Cache, Progress]:  # fmt: skip
  """Steps until each row has `until` new tokens or has ended; one step if a constraint restricts
  them, which is to be told anew behind each token.

  Args:
    cache: donated.
    stopped: rows that the caller has ended since the last call.
  """
  net = nnx.merge(graphdef, params)
  # XLA updates the cache in place if a batch of one row goes round the loop without its axis.
  alone = stopped.shape[0] == 1
  squeeze = lambda cache: jax.tree.map(lambda a: a[0], cache) if alone else cache
  expand = lambda cache: jax.tree.map(lambda a: a[None], cache) if alone else cache

  def step(carry):
    cache, progress = carry
    going = active(progress, until)
    pos = jnp.where(going, progress.pos, -1)[:, None]
    x, cache, _ = net.hidden(Inputs(progress.token[:, None], pos), cache=expand(cache))
    return squeeze(cache), choose(progress, net.logits(x[:, 0]), request, going)

  progress = dataclasses.replace(progress, ended=progress.ended | stopped)
  more = lambda carry: jnp.any(active(carry[1], until))
  if request.allowed is not None:
    cache, progress = step((squeeze(cache), progress))
  else:
    cache, progress = jax.lax.while_loop(more, step, (squeeze(cache), progress))
  return expand(cache), progress


def choose(
  progress: Progress, logits: Float[Array, "B V"], request: Request, going: Bool[Array, "B"]
) -> Progress:
  """The next token of each row that goes on, from the scores behind its newest one."""
  logits, pos = logits.astype(jnp.float32), progress.pos + 1
  token, last, stuck = pick(request, logits, progress.said, pos, progress.count)
  drawn = _record(progress, logits, jnp.where(stuck, -1, token), going)
  return Progress(
    count=progress.count + going,
    token=jnp.where(going, token, progress.token),
    pos=jnp.where(going, pos, progress.pos),
    ended=progress.ended | (going & (last | stuck)),
    said=progress.said.push(token, going & ~stuck),
    drawn=drawn,
  )


def pick(
  request: Request, logits: Float[Array, "B V"], said: History, pos: Int[Array, "B"],
  count: Int[Array, "B"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:  # fmt: skip
  """(a token for each row, whether it ends the row, whether none was allowed).

  Args:
    pos: of the token.
    count: new tokens that the row has before it.
  """
  vocab = logits.shape[-1]
  ends = jnp.zeros(vocab, bool).at[request.stop_ids].set(True, mode="drop")
  shaped = request.shaped(logits.astype(jnp.float32), said, count)
  token = request.sampler(shaped, pos)
  return token, ends[token], jnp.max(shaped, axis=-1) == -jnp.inf


def _record(
  progress: Progress, logits: Float[Array, "B V"], token: Int[Array, "B"], going: Bool[Array, "B"]
) -> Drawn:
  """Writes what was chosen into the next column of each row that goes on."""
  drawn, row = progress.drawn, jnp.arange(len(token))
  column = jnp.where(going, progress.count, drawn.tokens.shape[1])
  total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  put = lambda old, new: old.at[row, column].set(new, mode="drop")
  logprobs = (jnp.take_along_axis(logits, token[:, None], axis=1) - total)[:, 0]
  top_logprobs, top_tokens = drawn.top_logprobs, drawn.top_tokens
  if drawn.top_tokens.shape[-1]:
    values, ids = jax.lax.top_k(logits, drawn.top_tokens.shape[-1])
    top_logprobs, top_tokens = put(top_logprobs, values - total), put(top_tokens, ids)
  return Drawn(put(drawn.tokens, token), put(drawn.logprobs, logprobs), top_tokens, top_logprobs)
