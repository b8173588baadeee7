"""Windows on long texts: pieces that overlap, so that each answer lies whole in one of them."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from model.errors import InputError
from train.data.arrays import Corpus
from train.data.labels import place_of


def window_starts(length: int, room: int, stride: int) -> Int64[np.ndarray, "w"]:
  """First tokens of the windows on a text; neighbours share `stride` tokens, the last ends it.

  Args:
    length: tokens of the text.
    room: tokens of a window, more than `stride`.
  """
  step = room - stride
  return np.arange(max(1, -(-(length - stride) // step))) * step


def windows(corpus: Corpus, room: Int64[np.ndarray, "d"], stride: int) -> Corpus:
  """Each example once for each window on its `text_pair`.

  `label` becomes the first and last token of the answer, counted from the window's beginning, of
  windows that hold it whole, and stays empty in others. An answer that is longer than the overlap
  and lies across two windows gets one of its own that begins with it.

  Args:
    room: tokens of `text_pair` that there is a place for beside each text.
    stride: tokens that two windows share.

  Raises:
    InputError: naming an example whose text leaves no more room than the overlap, or whose answer
      is longer than that room.
  """
  context, label = corpus.columns["text_pair"], corpus.columns["label"]
  which, starts, lengths, answers = [], [], [], []
  for d, (size, length) in enumerate(zip(room.tolist(), context.lengths.tolist(), strict=True)):
    if size <= stride:
      raise InputError(
        f"{place_of(corpus, d)}: data.text has {corpus.lengths[d]} tokens and leaves room for "
        f"{size} of the context; windows that share objective.stride={stride} need more: raise "
        "seq_len, lower the stride, or set data.truncate."
      )
    answer = label.of(d)
    found = window_starts(length, size, stride)
    if len(answer):
      first, last = map(int, answer)
      if last - first >= size:
        raise InputError(
          f"{place_of(corpus, d)}: the answer has {last - first + 1} tokens and a window room for "
          f"{size}: raise seq_len, or leave the example out."
        )
      if not any(start <= first and last < start + size for start in found):
        found = np.append(found, first)
    which += [d] * len(found)
    starts += found.tolist()
    lengths += np.minimum(size, length - found).tolist()
    answers += [_inside(answer, start, size) for start in found]
  begins, sizes = np.array(starts), np.array(lengths)
  taken = corpus.take(np.array(which))
  pair = dataclasses.replace(context, starts=context.starts[which] + begins, lengths=sizes)
  counts = np.array([len(a) for a in answers])
  values = np.concatenate([np.zeros(0, np.int32), *answers]).astype(np.int32)
  spans = dataclasses.replace(
    label, values=values, starts=np.cumsum(counts) - counts, lengths=counts
  )
  columns = {**taken.columns, "text_pair": pair, "label": spans}
  return dataclasses.replace(taken, columns=columns)


def _inside(answer: np.ndarray, start: int, size: int) -> np.ndarray:
  """The answer from the window's beginning; nothing where it is not whole inside."""
  whole = len(answer) > 0 and start <= answer[0] and answer[1] < start + size
  return answer - start if whole else answer[:0]
