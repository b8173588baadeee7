"""Which of several completions is best, and what most of them say."""

import collections
import math
from collections.abc import Callable, Hashable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

from model.errors import InputError

if TYPE_CHECKING:
  from infer.generate import Completion
  from model import Model

Answer = TypeVar("Answer", bound=Hashable)


def check_scorer(scorer: Any) -> None:
  """Raises an InputError for what cannot rank completions."""
  if scorer == "mean_logprob" or (callable(scorer) and not hasattr(scorer, "config")):
    return
  if hasattr(scorer, "config") and scorer.config.head_kind == "sequence":
    if scorer.config.outputs == 1 and scorer.tokenizer is not None:
      return
    raise InputError(
      f"scorer tells {scorer.config.outputs} labels apart: a reward model says one number and has "
      "a tokenizer."
    )
  raise InputError(
    f"scorer={scorer!r} must be 'mean_logprob', a function of (prompt, completion), or a model "
    "that says one number about a text."
  )


def scores(
  m: "Model", prompt: str | Sequence[int], completions: "list[Completion]", scorer: Any
) -> list[float]:
  """What a scorer gives the completions of a prompt; the highest is the best.

  Args:
    scorer: "mean_logprob", the mean log-probability of a completion's tokens, -inf where it has
      none, as one that begins with a stop string; a function of (prompt, completion); or a reward
      model, which reads prompt and completion as one text.

  Raises:
    InputError: for a function that returns no number.
  """
  if scorer == "mean_logprob":
    return [_mean(c.logprobs) for c in completions]
  if hasattr(scorer, "config"):
    before = prompt if isinstance(prompt, str) else _text(m, prompt)
    ids = scorer.tokenizer.encode_batch([before + c.text for c in completions])
    return [float(scorer([tokens])[0, 0]) for tokens in ids]
  given = [scorer(prompt, c) for c in completions]
  for value in given:
    if not isinstance(value, Real) or math.isnan(value):
      raise InputError(f"scorer returned {value!r}: a number is needed.")
  return [float(value) for value in given]


def _mean(logprobs: Sequence[float]) -> float:
  return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf


def _text(m: "Model", tokens: Sequence[int]) -> str:
  if m.tokenizer is None:
    raise InputError("a reward model reads text, and this model has no tokenizer.")
  return m.tokenizer.decode(list(tokens))


def vote(
  completions: "Sequence[Completion]", answer: Callable[[str], Answer | None] = str.strip
) -> tuple[Answer, float]:
  """The answer that most completions give, and its share of those that give one.

  Ties go to the one that was given first. Source: self-consistency, Wang et al., arXiv:2203.11171.

  Args:
    completions: of one prompt, drawn with a temperature.
    answer: finds the answer in a text; None where there is none.

  Raises:
    InputError: if no completion has an answer.
  """
  found = [a for a in (answer(c.text) for c in completions) if a is not None]
  if not found:
    raise InputError(f"none of the {len(completions)} completions has an answer to vote on.")
  best, votes = collections.Counter(found).most_common(1)[0]
  return best, votes / len(found)
