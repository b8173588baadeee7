"""Classification of texts and of pairs of texts; regression tells one number."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infer.heads import check_head
from infer.tasks.passes import checked_length, encoded, scores
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

NUMBER = "value"  # The label of a regression without a name for it.


@dataclasses.dataclass(frozen=True)
class Label:
  """A label with its probability; of a regression, the number itself."""

  label: str
  score: float


def classify(
  m: "Model", texts: str | Sequence[str], text_pairs: str | Sequence[str] | None = None
) -> list[list[Label]]:
  """For each text all labels, most probable first.

  Probabilities sum to 1 where a text has one label; where it may have several, each is by itself.

  Args:
    text_pairs: the second text of each pair.

  Raises:
    InputError: if the model classifies no texts, or one has more tokens than the model positions.
  """
  check_head(m.config, "classify")
  rows = checked_length(m, encoded(m, texts, text_pairs))
  if m.config.problem == "regression":
    name = m.labels[0] if m.labels else NUMBER
    return [[Label(name, float(x[0]))] for x in scores(m, rows)]
  told = sigmoid if m.config.problem == "multi_label" else softmax
  names, out = label_names(m), []
  for values in scores(m, rows):
    labels = [Label(n, float(p)) for n, p in zip(names, told(values), strict=True)]
    out.append(sorted(labels, key=lambda label: -label.score))
  return out


def label_names(m: "Model") -> tuple[str, ...]:
  """The names of the head's labels; numbers where the model has none.

  Raises:
    InputError: if there is another number of names than of labels.
  """
  if m.labels is None:
    return tuple(map(str, range(m.config.outputs)))
  if len(m.labels) != m.config.outputs:
    raise InputError(
      f"the model has names of {len(m.labels)} labels and its head tells {m.config.outputs} apart."
    )
  return m.labels


def softmax(x: np.ndarray) -> np.ndarray:
  """Probabilities along the last axis, in float64."""
  mass = np.exp(x.astype(np.float64) - np.max(x, axis=-1, keepdims=True))
  return mass / np.sum(mass, axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
  """Probability of each, in float64, without overflow."""
  return 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))
