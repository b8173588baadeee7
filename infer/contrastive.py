"""Contrastive search: of the most probable tokens, the one least like what has been said.

Source: Su et al., arXiv:2202.06417, equation 5: (1 - α) · probability - α · the largest cosine
between the last hidden state that the token would have and those of all tokens before it.
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
from infer.found import Found, nothing_left
from infer.prompts import prefix
from infer.reading import Behind, reader
from infer.requests import bucket, end_ids, request_of
from infer.settings import Settings
from infer.shaping import History
from model.cache import Cache
from model.compilation import FewRows
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """Where the rows are; `states` are the last hidden states of their tokens, of length 1."""

  count: Int[Array, ""]
  ended: Bool[Array, "B"]
  said: History
  states: Float[Array, "B L D"]
  logits: Float[Array, "B V"]  # Behind the newest token of each row.
  cache: Cache
  tokens: Int[Array, "B M"]  # New ones; -1 where a row had ended, -2 where none was allowed.
  logprobs: Float[Array, "B M"]


def contrast(
  m: "Model", prompts: list[list[int]], settings: Settings, adapters: list[int] | None = None
) -> list[Found]:
  """The sequence of each prompt.

  Args:
    prompts: with room for the same number of new tokens; of an encoder–decoder, what its encoder
      reads.
    adapters: the number of each among the model's adapters; None: as the model is.
  """
  ends, reads = end_ids(m, settings), [prefix(m, prompt) for prompt in prompts]
  room, size = settings.most_new_tokens(), bucket(len(prompts), 1)
  length = cache_length(m, reads, settings)
  own = reader(m, settings, length)
  ways = distinct(m, prompts, size, adapters=adapters)
  behind, _ = read_prompts(own, ways, settings, states=True)
  net, params = own.graphdef, own.with_adapters(adapters, size).params
  request = request_of(m, settings, [0] * size, None, size, ends)
  alpha, among = np.float32(settings.penalty_alpha), min(settings.top_k or 1, m.config.real_vocab)
  read, language = (behind, said(reads, size, length)), language_of(m, settings)
  most = bucket(room, LEAST_ROOM)
  if language is None:
    told = _search(
      net, params, *read, request, np.int32(room), alpha, room=most, among=among
    )  # fmt: skip
  else:
    walks = [language.begin(prompt) for prompt in reads]
    state = _begin(net, params, *read, room=most)
    told = _within(net, params, state, language, walks, request, room, alpha, among)
  out = []
  for row, values, _ in zip(*jax.device_get(told), prompts, strict=False):
    n = int((row >= 0).sum())
    if (row == -2).any():
      raise nothing_left(n)
    new = row[:n].tolist()
    out.append(Found(new, values[:n].tolist(), None, new[-1] in ends))
  return out


def _within(
  graphdef: nnx.GraphDef, params: dict, state: Search, language: Language, walks: list[Walk],
  request: Request, most: int, alpha: np.float32, among: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:  # fmt: skip
  """The search, a step at a time: each row goes its own way through a language."""
  for place in range(most):
    ended = np.asarray(state.ended)
    if ended.all():
      break
    rows = [None if over else walk for walk, over in zip(walks, ended, strict=False)]
    masks = language.masks([*rows, *[None] * (len(ended) - len(rows))])
    for walk, mask in zip(rows, masks, strict=False):
      if walk is not None and not mask.any() and (error := walk.stuck()) is not None:
        raise error
    asked = dataclasses.replace(request, allowed=masks)
    state = _advance(graphdef, params, state, asked, alpha, among=among)
    for walk, token in zip(rows, np.asarray(state.tokens)[:, place].tolist(), strict=False):
      if walk is not None and token >= 0:
        walk.take(token)
  return state.tokens, state.logprobs


@functools.partial(jax.jit, static_argnames=("graphdef", "room", "among"))
def _search(
  graphdef: nnx.GraphDef, params: dict, behind: Behind, said: History, request: Request,
  most: Int[Array, ""], alpha: Float[Array, ""], *, room: int, among: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:  # fmt: skip
  net = nnx.merge(graphdef, params)
  going = lambda state: (state.count < most) & ~jnp.all(state.ended)
  step = functools.partial(_step, net, request, alpha, among)
  end = jax.lax.while_loop(going, step, _start(net, behind, said, room))
  return end.tokens, end.logprobs


@functools.partial(jax.jit, static_argnames=("graphdef", "room"))
def _begin(
  graphdef: nnx.GraphDef, params: dict, behind: Behind, said: History, *, room: int
) -> Search:
  """A search before its first step."""
  return _start(nnx.merge(graphdef, params), behind, said, room)


@functools.partial(FewRows, static_argnames=("graphdef", "among"), donate_argnames=("state",))
def _advance(
  graphdef: nnx.GraphDef, params: dict, state: Search, request: Request, alpha: Float[Array, ""],
  *, among: int,
) -> Search:  # fmt: skip
  """A search after one more step."""
  return _step(nnx.merge(graphdef, params), request, alpha, among, state)


def _start(net: Any, behind: Behind, said: History, room: int) -> Search:
  B = len(said.tokens)
  return Search(
    count=jnp.zeros((), jnp.int32),
    ended=said.prompt == 0,
    said=said,
    states=_directions(behind.states),  # pyright: ignore[reportArgumentType]
    logits=net.logits(behind.last).astype(jnp.float32),
    cache=behind.cache,
    tokens=jnp.full((B, room), -1),
    logprobs=jnp.zeros((B, room)),
  )


def _step(net: Any, request: Request, alpha: Float[Array, ""], among: int, state: Search) -> Search:
  """One more token for each row: each of the most probable ones is read to see what it would be."""
  B, V = state.logits.shape
  ends = jnp.zeros(V, bool).at[request.stop_ids].set(True, mode="drop")
  shaped = request.shaped(state.logits, state.said, state.count)
  probs, tokens = jax.lax.top_k(jax.nn.softmax(shaped, axis=-1), among)
  each = lambda a: jnp.repeat(a, among, axis=0)
  pos = jnp.where(state.ended, -1, state.said.count)
  cache = jax.tree.map(each, state.cache)
  x, cache, _ = net.hidden(Inputs(tokens.reshape(-1, 1), each(pos)[:, None]), cache=cache)
  new = _directions(x[:, 0]).reshape(B, among, -1)
  alike = jnp.einsum("BKD,BLD->BKL", new, state.states, precision="highest")
  known = jnp.arange(state.states.shape[1]) < state.said.count[:, None]
  alike = jnp.max(jnp.where(known[:, None], alike, -1.0), axis=-1)
  score = jnp.where(probs > 0, (1 - alpha) * probs - alpha * alike, -jnp.inf)
  best = jnp.argmax(score, axis=1)
  stuck = jnp.max(shaped, axis=1) == -jnp.inf
  row = jnp.arange(B)
  token = jnp.where(state.ended, 0, tokens[row, best])
  put = lambda old, value: old.at[:, state.count].set(value)
  own = jax.nn.log_softmax(state.logits, axis=-1)[row, token]
  chosen = row * among + best
  return Search(
    count=state.count + 1,
    ended=state.ended | ends[token] | stuck,
    said=state.said.push(token, ~state.ended),
    states=state.states.at[row, state.said.count].set(new[row, best], mode="drop"),
    logits=net.logits(x[chosen, 0]).astype(jnp.float32),
    cache=jax.tree.map(lambda a: a[chosen], cache),
    tokens=put(state.tokens, jnp.where(state.ended, -1, jnp.where(stuck, -2, token))),
    logprobs=put(state.logprobs, own),
  )


def _directions(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """Vectors of length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
