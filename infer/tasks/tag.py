"""Tagging: the labels of words, joined into spans of the text."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infer.heads import check_head
from infer.tasks.classify import label_names, softmax
from infer.tasks.passes import encoded, listed, scores
from infer.tasks.windows import owners, windows
from infer.tasks.words import word_pieces
from model.tokenizer import Encoded

if TYPE_CHECKING:
  from model import Model

OUTSIDE = "O"
_SCHEME = re.compile(r"([BILOUES])-(.+)", re.DOTALL)  # BIO, BILOU and BIOES; IO has none, or I-.


@dataclasses.dataclass(frozen=True)
class Span:
  """Characters `start` to `end` of a text, with the mean probability of the label of its words."""

  label: str
  start: int
  end: int
  text: str
  score: float


def tag(m: "Model", texts: str | Sequence[str], *, stride: int | None = None) -> list[list[Span]]:
  """For each text the spans that have a label, in order.

  The first piece of a word speaks for the word. Words whose labels go on (B-X I-X; X X) are one
  span; where no label is O, each word is a span of its own. A text longer than the model's
  positions is read in windows: each token counts in the window where it has most context.

  Args:
    stride: tokens that neighbouring windows share at least; None: a quarter of a window.

  Raises:
    InputError: if the model labels no tokens, or `stride` leaves a window no room.
  """
  check_head(m.config, "tag")
  texts, names = listed(texts), label_names(m)
  rows = encoded(m, texts)
  out = []
  for text, row, odds in zip(texts, rows, _probabilities(m, rows, stride), strict=True):
    offsets = [o for o, s in zip(row.offsets, row.sequence, strict=True) if s == 0]
    words = [
      Span(names[best := int(np.argmax(odds[i]))], start, end, text[start:end],
           float(odds[i, best]))
      for i, start, end in word_pieces(text, offsets)
    ]  # fmt: skip
    out.append(joined(text, words) if OUTSIDE in names else words)
  return out


def _probabilities(m: "Model", rows: list[Encoded], stride: int | None) -> list[np.ndarray]:
  """(tokens of the text itself, labels) of each."""
  parts = [windows(row, m.room(m.config.stacks[0]), text=0, stride=stride) for row in rows]
  said = iter(scores(m, [w.encoded for one in parts for w in one if w.stop]))
  out = []
  for one in parts:
    logits = [(w, next(said)[w.first : w.first + w.stop - w.start]) for w in one if w.stop]
    owner = owners(one)
    odds = np.zeros((len(owner), m.config.outputs))
    for i, (w, values) in enumerate(logits):
      own = owner[w.start : w.stop] == i
      odds[w.start : w.stop][own] = softmax(values[own])
    out.append(odds)
  return out


def joined(text: str, words: Sequence[Span]) -> list[Span]:
  """The spans of labelled words; see `tag`.

  B, U and S begin a span, L, E, U and S end one; I goes on with a span of its label, and begins one
  where there is none.
  """
  groups: list[tuple[str, list[Span]]] = []
  going = None  # The label that the next word may go on with.
  for word in words:
    scheme = _SCHEME.fullmatch(word.label)
    mark, label = scheme.groups() if scheme else ("I", word.label)
    if word.label == OUTSIDE:
      going = None
      continue
    if label != going or mark in "BUS":
      groups.append((label, []))
    groups[-1][1].append(word)
    going = None if mark in "LEUS" else label
  return [_span(text, label, members) for label, members in groups]


def _span(text: str, label: str, words: list[Span]) -> Span:
  start, end = words[0].start, words[-1].end
  score = float(np.mean([word.score for word in words]))
  return Span(label, start, end, text[start:end], score)
