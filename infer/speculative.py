"""Speculative decoding: tokens are guessed ahead, and one pass of the model reads all guesses.

Lossless, token for token: at each place the model chooses as it would without guesses, from its own
scores with the random key of that place, and a guess only counts if it is what was chosen. A draft
model guesses with the same keys, so that draws agree as often as the two models do (coupling
without communication: Daliri et al., arXiv:2408.07978; the idea: Leviathan et al.,
arXiv:2211.17192). What penalties, bans and stop tokens do is then the same by construction.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from infer.decode import Progress, Request, active, choose, pick
from infer.shaping import History
from model.cache import Cache
from model.compilation import FewRows
from model.config import ModelConfig
from model.errors import InputError
from model.peft.named import chosen
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

LONGEST_MATCH = 3  # Tokens that a lookup compares at most.
LAYERS = "layers:"


@dataclasses.dataclass(frozen=True)
class Draft:
  """What guesses: a network with its parameters; without one, the text itself (`lookup`)."""

  config: ModelConfig | None = None
  graphdef: nnx.GraphDef | None = None
  params: Any = None

  def with_adapters(self, numbers: Sequence[int], rows: int) -> "Draft":
    """What guesses for rows, of which the first have adapters of these numbers."""
    if self.params is None:
      return self
    return dataclasses.replace(self, params=chosen(self.params, numbers, rows))


def draft_of(m: "Model", given: Any) -> Draft:
  """What the setting `draft` names.

  Raises:
    InputError: for a model that does not fit `m`, or a number of layers that it does not have.
  """
  if given == "lookup":
    return Draft()
  if isinstance(given, str):
    return _early_layers(m, given)
  for name, ours, theirs in (
    ("shape", m.config.shape, given.config.shape),
    ("head", m.config.head_kind, given.config.head_kind),
    ("vocabulary", m.config.real_vocab, given.config.real_vocab),
  ):
    if ours != theirs:
      raise InputError(f"draft has another {name} ({theirs}) than the model ({ours}).")
  if m.tokenizer and given.tokenizer and m.tokenizer.fingerprint != given.tokenizer.fingerprint:
    raise InputError("draft has another tokenizer than the model: its tokens mean other words.")
  return Draft(given.config, *given.unstacked())


def _early_layers(m: "Model", given: str) -> Draft:
  stack, count = m.config.stacks[-1], given.removeprefix(LAYERS)
  depth = m.config.depth(stack)
  if not count.isdecimal() or not 0 < int(count) < depth:
    raise InputError(
      f"draft={given!r}: the model has {depth} layers in its {stack}; name from 1 to {depth - 1} "
      "of them."
    )
  field = "num_layers" if m.config.shape == "decoder" else "num_decoder_layers"
  cfg = dataclasses.replace(m.config, **{field: int(count)})
  net = nnx.merge(*m.unstacked())
  decoder = getattr(net, stack)
  decoder.layers = nnx.List(list(decoder.layers)[: int(count)])
  graphdef, state = nnx.split(net, nnx.Param)
  return Draft(cfg, graphdef, nnx.to_pure_dict(state))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
  """How many guesses of each row were looked at, and how many of them were right."""

  guessed: Int[Array, "B"]
  right: Int[Array, "B"]


@functools.partial(
  FewRows, static_argnames=("graphdef", "drafter", "ahead"), donate_argnames=("cache", "drafts")
)
def speculate(
  graphdef: nnx.GraphDef, params: dict, drafter: nnx.GraphDef | None, draft_params: Any,
  cache: Cache, drafts: Cache | None, progress: Progress, tally: Tally, stopped: Bool[Array, "B"],
  until: Int[Array, ""], request: Request, *, ahead: int,
) -> tuple[Cache, Cache | None, Progress, Tally]:  # fmt: skip
  """As `decode`, several tokens a step where guesses are right.

  Args:
    drafter, draft_params, drafts: the network that guesses and its cache; None: lookup.
    ahead: tokens that are guessed in each step.
  """
  net = nnx.merge(graphdef, params)
  guesser = None if drafter is None else nnx.merge(drafter, draft_params)
  progress = dataclasses.replace(progress, ended=progress.ended | stopped)

  def step(carry):
    cache, drafts, progress, tally = carry
    if guesser is None:
      guesses = lookup(progress.said, ahead)
    else:
      guesses, drafts = _guesses(guesser, drafts, progress, until, request, ahead)
    cache, progress, tally = compared(net, cache, progress, tally, guesses, until, request, None)
    return cache, drafts, progress, tally

  more = lambda carry: jnp.any(active(carry[2], until))
  return jax.lax.while_loop(more, step, (cache, drafts, progress, tally))


def compared(
  net: Any, cache: Cache, progress: Progress, tally: Tally, guesses: Int[Array, "B G"],
  until: Int[Array, ""], request: Request, masks: Int[Array, "B A words"] | None,
) -> tuple[Cache, Progress, Tally]:  # fmt: skip
  """One pass over the newest tokens and the guesses behind them, -1 where there is none.

  Args:
    masks: the tokens that a constraint allows in each place, if the guesses before it are right.
  """
  going, pos = active(progress, until), _places(progress, until, guesses.shape[1])
  guesses = jnp.where(pos[:, 1:] >= 0, guesses, -1)
  tokens = jnp.concatenate((progress.token[:, None], jnp.maximum(guesses, 0)), axis=1)
  x, cache, _ = net.hidden(Inputs(tokens, pos), cache=cache)
  logits = net.logits(x)
  return cache, *_verified(progress, tally, logits, guesses, going, until, request, masks)


def _places(progress: Progress, until: Int[Array, ""], ahead: int) -> Int[Array, "B A"]:
  """Positions of the newest token and of the guesses; -1 where the successor is one too many."""
  places = jnp.arange(ahead + 1)
  of_use = active(progress, until)[:, None] & (progress.count[:, None] + places < until)
  return jnp.where(of_use, progress.pos[:, None] + places, -1)


def _verified(
  progress: Progress, tally: Tally, logits: Float[Array, "B A V"], guesses: Int[Array, "B G"],
  going: Bool[Array, "B"], until: Int[Array, ""], request: Request,
  masks: Int[Array, "B A words"] | None,
) -> tuple[Progress, Tally]:  # fmt: skip
  """The model's own choices, one behind the other, while the guesses before them are right."""
  guesses = jnp.concatenate((guesses, jnp.full_like(guesses[:, :1], -1)), axis=1)

  def place(i, carry):
    progress, tally, going = carry
    asked = request if masks is None else dataclasses.replace(request, allowed=masks[:, i])
    progress = choose(progress, logits[:, i], asked, going)
    looked_at = going & (guesses[:, i] >= 0)
    right = looked_at & (progress.token == guesses[:, i])
    tally = Tally(tally.guessed + looked_at, tally.right + right)
    return progress, tally, right & active(progress, until)

  return jax.lax.fori_loop(0, guesses.shape[1], place, (progress, tally, going))[:2]


def _guesses(
  net: Any, cache: Cache, progress: Progress, until: Int[Array, ""], request: Request, ahead: int
) -> tuple[Int[Array, "B G"], Cache]:
  """What a draft model says next, by the same rules and keys."""
  said, token, out = progress.said, progress.token, []
  for i in range(ahead):
    told = guess(net, cache, progress, said, token, i, until, request, first=i == 0)
    token, said, cache = told
    out.append(token)
  return jnp.stack(out, axis=1), cache


def guess(
  net: Any, cache: Cache, progress: Progress, said: History, token: Int[Array, "B"],
  i: int | Int[Array, ""], until: Int[Array, ""], request: Request, *, first: bool,
) -> tuple[Int[Array, "B"], History, Cache]:  # fmt: skip
  """(guess number i, the history with it, the draft's cache) behind the guess before, `token`.

  The first one begins with the two newest tokens: of the one before the newest the draft may not
  have read what was chosen in the place of its own guess.
  """
  count = progress.count + i
  of_use = active(progress, until) & (count < until)
  tokens, pos = token[:, None], jnp.where(of_use, progress.pos + i, -1)[:, None]
  if first:
    before = jnp.maximum(said.count - 2, 0)
    last = jnp.take_along_axis(said.tokens, before[:, None], axis=1)
    tokens = jnp.concatenate((last, tokens), axis=1)
    pos = jnp.concatenate((jnp.where(pos > 0, pos - 1, -1), pos), axis=1)
  x, cache, _ = net.hidden(Inputs(tokens, pos), cache=cache)
  token = pick(request, net.logits(x[:, -1]), said, progress.pos + 1 + i, count)[0]
  return token, said.push(token, of_use), cache


def lookup(said: History, ahead: int) -> Int[Array, "B ahead"]:
  """What followed the last time that the newest tokens were said; -1 where there is nothing.

  The longest run of up to `LONGEST_MATCH` tokens counts, then the latest place. Source: prompt
  lookup decoding (Saxena, 2023), as in Transformers.
  """
  length, count = said.tokens.shape[1], said.count[:, None]
  place = jnp.arange(length)
  alike = place < count - 1  # Something follows.
  best = jnp.full(len(said.tokens), -1)
  for size in range(1, LONGEST_MATCH + 1):
    newest = jnp.take_along_axis(said.tokens, jnp.maximum(count - size, 0), axis=1)
    before = jnp.roll(said.tokens, size - 1, axis=1)
    alike &= (before == newest) & (place >= size - 1) & (count > size)
    found = jnp.max(jnp.where(alike, place, -1), axis=1)
    best = jnp.where(found >= 0, found, best)
  places = best[:, None] + 1 + jnp.arange(ahead)
  known = (best[:, None] >= 0) & (places < count)
  tokens = jnp.take_along_axis(said.tokens, jnp.minimum(places, length - 1), axis=1)
  return jnp.where(known, tokens, -1)
