"""Tokens guessed ahead of a text that is to stay within a language.

What may stand in a place depends on the guesses before it, so the masks of a block are computed
along the guesses, on a copy of the text's way through the language; a guess that leads out of it is
none. The model then chooses in each place by that place's mask. Where the guesses before a place
are right this is the mask that plain decoding has, and where one is wrong the place is not reached.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from infer.constrain import Walk
from infer.decode import Progress, Request
from infer.shaping import History
from infer.speculative import Draft, Tally, compared, guess, lookup
from model.cache import Cache


def speculate_within(
  graphdef: nnx.GraphDef, params: dict, draft: Draft, cache: Cache, drafts: Cache | None,
  progress: Progress, tally: Tally, stopped: Bool[np.ndarray, "B"], until: np.int32,
  request: Request, walks: Sequence[Walk | None], *, ahead: int,
) -> tuple[Cache, Cache | None, Progress, Tally]:  # fmt: skip
  """One block of `infer.speculative.speculate`.

  Args:
    request: with the masks of the first place.
    walks: of the first rows; None for a row that has ended. At least one goes on.
  """
  progress = dataclasses.replace(progress, ended=progress.ended | stopped)
  path = _Path(request, walks, ahead)
  found = None if draft.graphdef else np.asarray(_lookup(progress.said, ahead=ahead))
  said, token = progress.said, progress.token
  for i in range(ahead):
    if found is not None:
      path.follow(i, found[:, i])
    else:
      asked = dataclasses.replace(request, allowed=path.masks[:, i])
      token, said, drafts = _guess(
        draft.graphdef, draft.params, drafts, progress, said, token, np.int32(i), until, asked,
        first=i == 0,
      )  # fmt: skip
      path.follow(i, np.asarray(token))
    if not path.open:
      break
  cache, progress, tally = _compare(
    graphdef, params, cache, progress, tally, path.guesses, until, request, path.masks
  )
  return cache, drafts, progress, tally


class _Path:
  """The guesses of each row, and the masks of the places that they lead to."""

  def __init__(self, request: Request, walks: Sequence[Walk | None], ahead: int):
    first: Any = request.allowed
    size, words = first.shape
    self.guesses = np.full((size, ahead), -1, np.int32)
    self.masks = np.full((size, ahead + 1, words), -1, np.int32)
    self.masks[:, 0] = first
    self.open = {row: walk.fork() for row, walk in enumerate(walks) if walk is not None}

  def follow(self, place: int, tokens: Int[np.ndarray, "B"]) -> None:
    """Takes the guesses of a place, of the rows whose guesses have all been possible."""
    for row, walk in list(self.open.items()):
      token = int(tokens[row])
      if token < 0 or not self.masks[row, place, token // 32] >> (token % 32) & 1:
        del self.open[row]
        continue
      walk.take(token)
      self.guesses[row, place] = token
      if walk.ended:
        self._close(row, walk, place)
    rows = list(self.open)
    if not rows:
      return
    masks = self.open[rows[0]].language.masks([self.open[row] for row in rows])
    for row, mask in zip(rows, masks, strict=True):
      self.masks[row, place + 1] = mask
      if not mask.any():
        self._close(row, None, place)

  def _close(self, row: int, walk: Walk | None, place: int) -> None:
    """Guesses no further. The last guess counts only if it is an end that the model can choose:
    elsewhere nothing could be chosen behind it."""
    del self.open[row]
    if walk is None or not walk.language.vocabulary.ends:
      self.guesses[row, place] = -1


@functools.partial(jax.jit, static_argnames=("ahead",))
def _lookup(said: History, *, ahead: int) -> Int[Array, "B ahead"]:
  return lookup(said, ahead)


@functools.partial(jax.jit, static_argnames=("graphdef", "first"), donate_argnames=("drafts",))
def _guess(
  graphdef: nnx.GraphDef, params: dict, drafts: Cache, progress: Progress, said: History,
  token: Int[Array, "B"], i: Int[Array, ""], until: Int[Array, ""], request: Request, *,
  first: bool,
) -> tuple[Int[Array, "B"], History, Cache]:  # fmt: skip
  net = nnx.merge(graphdef, params)
  return guess(net, drafts, progress, said, token, i, until, request, first=first)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def _compare(
  graphdef: nnx.GraphDef, params: dict, cache: Cache, progress: Progress, tally: Tally,
  guesses: Int[Array, "B G"], until: Int[Array, ""], request: Request,
  masks: Int[Array, "B A words"],
) -> tuple[Cache, Progress, Tally]:  # fmt: skip
  net = nnx.merge(graphdef, params)
  return compared(net, cache, progress, tally, guesses, until, request, masks)
