"""Extractive question answering: the stretch of a text that answers a question."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infer.heads import check_head
from infer.tasks.classify import softmax
from infer.tasks.passes import encoded, listed, scores
from infer.tasks.windows import Window, body, windows
from infer.tasks.words import trimmed
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model


@dataclasses.dataclass(frozen=True)
class Answer:
  """Characters `start` to `end` of the context; empty, at 0, where it holds no answer.

  `score` is the probability of the first token times that of the last one, among the tokens of the
  context that were read together and the first token of all, which stands for no answer.
  """

  answer: str
  start: int
  end: int
  score: float


def answer(
  m: "Model", questions: str | Sequence[str], contexts: str | Sequence[str], *,
  max_answer_tokens: int = 30, stride: int | None = None,
) -> list[Answer]:  # fmt: skip
  """The answer to each question in its context.

  A context longer than the model's positions is read in windows, and the best of their answers is
  given. No answer competes with the least probability that any window gives it.

  Args:
    contexts: one for each question.
    max_answer_tokens: the longest answer.
    stride: tokens that neighbouring windows share at least; None: a quarter of a window.

  Raises:
    InputError: if the model finds no spans, a context is empty, a number is impossible, or a
      question leaves no room for its context.
  """
  check_head(m.config, "answer")
  if max_answer_tokens < 1:
    raise InputError(f"max_answer_tokens={max_answer_tokens} must be at least 1.")
  contexts = listed(contexts)
  rows = encoded(m, questions, contexts)
  for i, row in enumerate(rows):
    if not body(row, 1)[1]:
      raise InputError(f"context {i} holds no token: give the text that is read.")
  parts = [windows(row, m.room(m.config.stacks[0]), text=1, stride=stride) for row in rows]
  said = iter(scores(m, [w.encoded for one in parts for w in one]))
  return [
    _best(context, [(w, next(said)) for w in one], max_answer_tokens)
    for context, one in zip(contexts, parts, strict=True)
  ]


def _best(context: str, parts: list[tuple[Window, np.ndarray]], longest: int) -> Answer:
  found, none = [], 1.0
  for window, logits in parts:
    places = np.arange(window.first, window.first + window.stop - window.start)
    odds = softmax(logits[np.r_[0, places]].T)  # (start or end, no answer and the context)
    none = min(none, odds[0, 0] * odds[1, 0])
    first, last, score = best_span(odds[0, 1:], odds[1, 1:], longest)
    offsets = window.encoded.offsets
    found.append((score, offsets[places[first]][0], offsets[places[last]][1]))
  score, start, end = max(found, key=lambda f: f[0])
  if none > score:
    return Answer("", 0, 0, float(none))
  start, end = trimmed(context, start, end)
  return Answer(context[start:end], start, end, float(score))


def best_span(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[int, int, float]:
  """(first, last, product) of the largest start[first] · end[last] whose span has at most `longest`
  tokens.
  """
  best = (0, 0, -1.0)
  for extra in range(min(longest, len(start))):
    product = start[: len(start) - extra] * end[extra:]
    first = int(np.argmax(product))
    if product[first] > best[2]:
      best = first, first + extra, float(product[first])
  return best
