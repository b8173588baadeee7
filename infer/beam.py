"""Beam search: the sequences of the highest score, in one compiled loop.

Equal to Transformers' search where it has the same thing; groups that differ from each other are
diverse beam search (Vijayakumar et al., arXiv:1610.02424, algorithm 1, Hamming diversity).
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from infer.batch import LEAST_ROOM, cache_length, distinct, read_prompts, said
from infer.constrain import Language, Walk, language_of
from infer.decode import Request
from infer.found import Found
from infer.prompts import prefix
from infer.reading import Behind, reader
from infer.requests import bucket, end_ids, request_of
from infer.settings import Settings
from infer.shaping import History
from model.cache import Cache
from model.compilation import FewRows
from model.errors import InputError
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

NOTHING = -1e9  # The score of what there is not.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
  """Sequences of new tokens, for each prompt and beam, and what the model gave each token."""

  tokens: Int[Array, "P B M"]
  logprobs: Float[Array, "P B M"]
  lengths: Int[Array, "P B"]
  score: Float[Array, "P B"]

  def take(self, index: Int[Array, "P C"]) -> "Sequences":
    """The sequences of each prompt at `index`."""

    def pick(a):
      places = index.reshape(index.shape + (1,) * (a.ndim - 2))
      return jnp.take_along_axis(a, places, axis=1)

    return jax.tree.map(pick, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """Where a search is: beams that go on, the best sequences that have ended, in each group."""

  count: Int[Array, ""]
  running: Sequences
  ended: Sequences
  full: Bool[Array, "P B"]  # Places of `ended` that hold something.
  open: Bool[Array, "P G"]  # Groups that may still become better.
  going: Bool[Array, ""]
  said: History  # Of the rows P · B.
  logits: Float[Array, "PB V"]  # Behind the newest token of each row.
  cache: Cache


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a search is compiled for: beams and groups of a prompt, candidates of a group, rules."""

  beams: int
  groups: int
  kept: int
  stop_when_full: bool  # early_stopping=True.
  patient: bool  # early_stopping="never".


def search(
  m: "Model", prompts: list[list[int]], settings: Settings, adapters: list[int] | None = None
) -> list[list[Found]]:
  """The best `num_return_sequences` sequences of each prompt, best first.

  Args:
    prompts: with room for the same number of new tokens; of an encoder–decoder, what its encoder
      reads.
    adapters: the number of each among the model's adapters; None: as the model is.
  """
  ends = end_ids(m, settings)
  beams, groups = settings.num_beams, settings.num_beam_groups
  shape = Shape(
    beams, groups, max(2, 1 + len(ends)) * (beams // groups), settings.early_stopping is True,
    settings.early_stopping == "never",
  )  # fmt: skip
  reads, room = [prefix(m, prompt) for prompt in prompts], settings.most_new_tokens()
  size = bucket(len(prompts), 1)
  length = cache_length(m, reads, settings)
  own, ways = reader(m, settings, length), distinct(m, prompts, size, adapters=adapters)
  behind, reused = read_prompts(own, ways, settings)
  net, params = own.graphdef, own.with_adapters(adapters, size).params
  request = request_of(m, settings, [0] * size * beams, None, size * beams, ends)
  rules = np.array([settings.length_penalty, settings.diversity_penalty], np.float32)
  read, most = (behind, said(reads, size, length)), np.int32(room)
  sizes: dict[str, Any] = dict(room=bucket(room, LEAST_ROOM), shape=shape)
  language = language_of(m, settings)
  if language is None:
    ended = _search(net, params, *read, request, most, rules, **sizes)
  else:
    begun = {(i, ()): language.begin(tokens) for i, tokens in enumerate(reads)}
    state = _begin(net, params, *read, **sizes)
    ended = _within(net, params, state, language, begun, request, most, rules, shape)
  found = _results(jax.device_get(ended), len(prompts), settings.num_return_sequences, ends)
  cached = lambda group, n: [dataclasses.replace(one, cached=n) for one in group]
  return [cached(*pair) for pair in zip(found, reused, strict=True)]


def _within(
  graphdef: nnx.GraphDef, params: dict, state: "Search", language: Language,
  walks: dict[tuple[int, tuple[int, ...]], Walk], request: Request, most: np.int32,
  rules: Float[np.ndarray, "2"], shape: Shape,
) -> Sequences:  # fmt: skip
  """The search, a step at a time: each beam goes its own way through a language.

  Args:
    walks: the beginning of each prompt; then one for each prompt and tokens of a beam.
  """
  rows: list[Walk | None] = [walks.get((i // shape.beams, ())) for i in range(len(state.logits))]
  while True:
    asked = dataclasses.replace(request, allowed=language.masks(rows))
    state = _advance(graphdef, params, state, asked, most, rules, shape=shape)
    if not state.going:
      return state.ended
    tokens = np.asarray(state.running.tokens)[:, :, : int(state.count)]
    alive = np.asarray(state.running.score) > NOTHING / 2
    before, walks, rows = walks, {}, []
    for (p, b), lives in np.ndenumerate(alive):
      key = (p, tuple(tokens[p, b].tolist()))
      if lives and key not in walks and (p, key[1][:-1]) in before:
        walks[key] = before[p, key[1][:-1]].fork()
        walks[key].take(key[1][-1])
      rows.append(walks.get(key) if lives else None)


def _results(
  ended: Sequences, prompts: int, wanted: int, ends: frozenset[int]
) -> list[list[Found]]:
  out = []
  for p in range(prompts):
    found = []
    for b in np.argsort(-np.asarray(ended.score[p]), kind="stable")[:wanted]:
      n = int(ended.lengths[p, b])
      if ended.score[p, b] < NOTHING / 2:
        raise InputError(
          f"prompt {p} of the batch has only {len(found)} sequences that the settings allow, and "
          f"num_return_sequences={wanted} are asked for: loosen what restricts them."
        )
      tokens = np.asarray(ended.tokens[p, b, :n]).tolist()
      logprobs = np.asarray(ended.logprobs[p, b, :n]).tolist()
      found.append(Found(tokens, logprobs, float(ended.score[p, b]), tokens[-1] in ends))
    out.append(found)
  return out


@functools.partial(jax.jit, static_argnames=("graphdef", "room", "shape"))
def _search(
  graphdef: nnx.GraphDef, params: dict, behind: Behind, said: History, request: Request,
  most: Int[Array, ""], rules: Float[Array, "2"], *, room: int, shape: Shape,
) -> Sequences:  # fmt: skip
  net = nnx.merge(graphdef, params)
  step = functools.partial(_step, net, request, most, rules, shape)
  start = _start(net, behind, said, room, shape)
  return jax.lax.while_loop(lambda state: state.going, step, start).ended


@functools.partial(jax.jit, static_argnames=("graphdef", "room", "shape"))
def _begin(
  graphdef: nnx.GraphDef, params: dict, behind: Behind, said: History, *, room: int, shape: Shape
) -> Search:
  """A search before its first step."""
  return _start(nnx.merge(graphdef, params), behind, said, room, shape)


@functools.partial(FewRows, static_argnames=("graphdef", "shape"), donate_argnames=("state",))
def _advance(
  graphdef: nnx.GraphDef, params: dict, state: Search, request: Request, most: Int[Array, ""],
  rules: Float[Array, "2"], *, shape: Shape,
) -> Search:  # fmt: skip
  """A search after one more step."""
  return _step(nnx.merge(graphdef, params), request, most, rules, shape, state)


def _start(net: Any, behind: Behind, said: History, room: int, shape: Shape) -> Search:
  P, B = len(said.tokens), shape.beams
  logits = net.logits(behind.last)
  each = lambda a: jnp.repeat(a, B, axis=0)
  none = Sequences(
    jnp.full((P, B, room), -1), jnp.zeros((P, B, room)), jnp.zeros((P, B), jnp.int32),
    jnp.full((P, B), NOTHING),
  )  # fmt: skip
  # All beams of a group begin alike: the first one speaks for them.
  first = jnp.where(jnp.arange(B) % (B // shape.groups) == 0, 0.0, NOTHING)
  return Search(
    count=jnp.zeros((), jnp.int32),
    running=dataclasses.replace(none, score=jnp.broadcast_to(first, (P, B))),
    ended=none,
    full=jnp.zeros((P, B), bool),
    open=jnp.broadcast_to((said.prompt > 0)[:, None], (P, shape.groups)),
    going=jnp.ones((), bool),
    said=jax.tree.map(each, said),
    logits=each(logits.astype(jnp.float32)),
    cache=jax.tree.map(each, behind.cache),
  )


def _step(
  net: Any, request: Request, most: Int[Array, ""], rules: Float[Array, "2"], shape: Shape,
  state: Search,
) -> Search:  # fmt: skip
  """One more token for each beam."""
  P, B = state.running.score.shape
  vocab = state.logits.shape[-1]
  ends = jnp.zeros(vocab, bool).at[request.stop_ids].set(True, mode="drop")
  own = jax.nn.log_softmax(state.logits, axis=-1)
  shaped = request.shaped(own, state.said, state.count)
  by_beam = lambda a: a.reshape(P, B, *a.shape[1:])
  parts, taken = [], jnp.zeros((P, vocab))
  for g in range(shape.groups):
    part = _group(by_beam(shaped), by_beam(own), state, g, taken, ends, most, rules, shape)
    chosen = part[0].tokens[:, :, state.count]
    taken = taken.at[jnp.arange(P)[:, None], chosen].add(state.open[:, [g]].astype(jnp.float32))
    parts.append(part)
  join = lambda *leaves: jnp.concatenate(leaves, axis=1)
  running, beam, ended, full, is_open = jax.tree.map(join, *parts)
  going = jnp.any(is_open)
  state = dataclasses.replace(
    state, count=state.count + 1, running=running, ended=ended, full=full, open=is_open, going=going
  )
  row = (jnp.arange(P)[:, None] * B + beam).reshape(-1)
  newest = running.tokens[:, :, state.count - 1].reshape(-1)
  return jax.lax.cond(going, lambda s: _read_newest(net, row, newest, s), lambda s: s, state)


def _read_newest(net: Any, row: Int[Array, "PB"], token: Int[Array, "PB"], state: Search) -> Search:
  """Each row becomes the one that its beam came from, and reads its newest token."""
  said = jax.tree.map(lambda a: a[row], state.said)
  cache = jax.tree.map(lambda a: a[row], state.cache)
  pos = jnp.where(said.prompt > 0, said.count, -1)
  x, cache, _ = net.hidden(Inputs(token[:, None], pos[:, None]), cache=cache)
  logits = net.logits(x[:, 0]).astype(jnp.float32)
  said = said.push(token, jnp.ones(len(row), bool))
  return dataclasses.replace(state, said=said, logits=logits, cache=cache)


def _group(
  shaped: Float[Array, "P B V"], own: Float[Array, "P B V"], state: Search, g: int,
  taken: Float[Array, "P V"], ends: Bool[Array, "V"], most: Int[Array, ""],
  rules: Float[Array, "2"], shape: Shape,
):  # fmt: skip
  """One step of a group: (running, the beam that each came from, ended, full, open).

  Args:
    taken: how often the groups before have chosen each token in this step.
  """
  P, _, V = shaped.shape
  length_penalty, diversity = rules
  size, last = shape.beams // shape.groups, state.count + 1 >= most
  places = slice(g * size, (g + 1) * size)
  mine = lambda tree: jax.tree.map(lambda a: a[:, places], tree)
  running, ended, full = mine(state.running), mine(state.ended), state.full[:, places]
  is_open = state.open[:, [g]]
  gain = shaped[:, places] - diversity * taken[:, None]
  total = (running.score[:, :, None] + gain).reshape(P, -1)
  score, flat = jax.lax.top_k(total, min(shape.kept, total.shape[1]))
  beam, token = flat // V, flat % V
  rows = running.take(beam)
  given = jnp.take_along_axis(own[:, places].reshape(P, -1), flat, axis=1)
  candidates = Sequences(
    rows.tokens.at[:, :, state.count].set(token), rows.logprobs.at[:, :, state.count].set(given),
    rows.lengths + 1, score,
  )  # fmt: skip
  hit = ends[token] | last
  next_score, order = jax.lax.top_k(score + hit * NOTHING, size)
  running = dataclasses.replace(candidates.take(order), score=next_score)
  length = (state.count + 1).astype(jnp.float32)
  ending = hit & (jnp.arange(hit.shape[1]) < size) & is_open & (score > NOTHING / 2)
  final = jnp.where(ending, score / length**length_penalty, NOTHING)
  both = lambda a, b: jnp.concatenate((a, b), axis=1)
  merged = jax.tree.map(both, ended, dataclasses.replace(candidates, score=final))
  best = jax.lax.top_k(merged.score, size)[1]
  full = jnp.take_along_axis(both(full, ending), best, axis=1)
  ended = merged.take(best)
  # The best that a beam could still reach, by its score of now at this length or at the longest.
  reach = most.astype(jnp.float32) if shape.patient else length
  reach = jnp.where(length_penalty > 0, reach, length)
  worst = jnp.where(full, jnp.min(ended.score, axis=1, keepdims=True), NOTHING)
  improves = jnp.any(running.score[:, :1] / reach**length_penalty > worst, axis=1, keepdims=True)
  settled = jnp.all(full, axis=1, keepdims=True) & shape.stop_when_full
  is_open &= improves & ~settled & ~jnp.all(hit, axis=1, keepdims=True)
  return running, jnp.take_along_axis(beam, order, axis=1) + g * size, ended, full, is_open
