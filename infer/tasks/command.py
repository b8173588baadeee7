"""The tasks of `python -m infer` besides generation: an object and lines for each prompt."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from infer.tasks import show
from infer.tasks.answer import answer
from infer.tasks.classify import classify
from infer.tasks.fill_mask import fill_mask
from infer.tasks.similarity import cosines
from infer.tasks.tag import tag

if TYPE_CHECKING:
  from model import Model


@dataclasses.dataclass(frozen=True)
class Asked:
  """What the flags say."""

  task: str
  prompts: list[str]
  pairs: list[str]
  context: str | None
  top: int
  max_answer_tokens: int
  stride: int | None
  output: str | None


# The object of --json, and the lines that are printed without it.
Told = Iterator[tuple[dict[str, Any], list[str]]]


def tell(m: "Model", asked: Asked) -> Told:
  """What the model says of each prompt, in order."""
  tasks = {
    "fill-mask": _filled,
    "classify": _classified,
    "tag": _tagged,
    "answer": _answered,
    "embed": _embedded,
  }
  return tasks[asked.task](m, asked)


def _filled(m: "Model", asked: Asked) -> Told:
  for masks in fill_mask(m, asked.prompts, top=asked.top):
    plain = [[dataclasses.asdict(guess) for guess in mask] for mask in masks]
    yield {"masks": plain}, show.guesses(masks)


def _classified(m: "Model", asked: Asked) -> Told:
  for labels in classify(m, asked.prompts, asked.pairs or None):
    yield {"labels": [dataclasses.asdict(label) for label in labels]}, show.labels(labels)


def _tagged(m: "Model", asked: Asked) -> Told:
  for spans in tag(m, asked.prompts, stride=asked.stride):
    yield {"spans": [dataclasses.asdict(span) for span in spans]}, show.spans(spans)


def _answered(m: "Model", asked: Asked) -> Told:
  contexts = [asked.context or ""] * len(asked.prompts)
  for found in answer(
    m, asked.prompts, contexts, max_answer_tokens=asked.max_answer_tokens, stride=asked.stride
  ):
    yield dataclasses.asdict(found), show.answers(found)


def _embedded(m: "Model", asked: Asked) -> Told:
  """A file in place of what is printed, where --output names one; alike pairs beside vectors."""
  vectors = m.embed([*asked.prompts, *asked.pairs])
  count = len(asked.prompts)
  if asked.output is not None:
    with Path(asked.output).open("wb") as f:  # A path as it is: NumPy would add a suffix.
      np.save(f, vectors)
    logging.info("Wrote %s: float32 %s.", asked.output, vectors.shape)
    return
  if not asked.pairs:
    for values in vectors.tolist():
      yield {"embedding": values}, show.vector(values)
    return
  alike = cosines(vectors[:count], vectors[count:]).tolist()
  for values, score in zip(vectors[:count].tolist(), alike, strict=True):
    yield {"embedding": values, "similarity": score}, [f"{score:.4f}"]
