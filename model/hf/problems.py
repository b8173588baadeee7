"""Labels of classifiers in config.json: their number, their names, what problem they are of."""

from collections.abc import Mapping
from typing import Any

from model.architecture import LABELLED
from model.config import ModelConfig
from model.errors import InputError

_PROBLEMS = {"single_label_classification": "single_label", "regression": "regression",
             "multi_label_classification": "multi_label"}  # fmt: skip


def read_labels(head: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Number of labels and problem of a classifier, as fields of ModelConfig. Where config.json names
  no problem, a single label is a number: so the loss of Transformers takes it.

  Raises:
    InputError: for a problem that is not known, and as `label_names`.
  """
  if head not in LABELLED:
    return {}
  names = label_names(values)  # Without names, Transformers assumes two.
  labels = {"num_labels": values.get("num_labels") or 2 if names is None else len(names)}
  if head != "sequence":
    return labels
  told = values.get("problem_type")
  if told is None:
    problem = "regression" if labels["num_labels"] == 1 else "single_label"
    return {**labels, "problem": problem}
  if told not in list(_PROBLEMS):
    raise InputError(
      f"config.json: problem_type={told!r} is not known, expected one of {', '.join(_PROBLEMS)}."
    )
  return {**labels, "problem": _PROBLEMS[told]}


def label_names(values: Mapping[str, Any]) -> tuple[str, ...] | None:
  """The names of `id2label` in their order; None where config.json has none.

  Raises:
    InputError: if they are no texts by the numbers 0, 1, …
  """
  names = values.get("id2label")
  if names is None:
    return None
  known = isinstance(names, dict) and set(names) == set(map(str, range(len(names))))
  if not known or not all(isinstance(name, str) for name in names.values()):
    raise InputError(
      f"config.json: id2label={names!r} must name each label by its number, from "
      f'"0" on: {{"0": "no", "1": "yes"}}.'
    )
  return tuple(names[str(i)] for i in range(len(names)))


def write_labels(cfg: ModelConfig) -> dict[str, Any]:
  """What `read_labels` makes the same again; labels are named by their numbers."""
  theirs = {ours: name for name, ours in _PROBLEMS.items()}
  names = {str(i): f"LABEL_{i}" for i in range(cfg.outputs)}
  return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()},
          "problem_type": theirs[cfg.problem]}  # fmt: skip
