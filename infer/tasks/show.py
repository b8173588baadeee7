"""The answers of tasks as lines that a person reads."""

from infer.tasks.answer import Answer
from infer.tasks.classify import Label
from infer.tasks.fill_mask import Guess
from infer.tasks.tag import Span


def guesses(masks: list[list[Guess]]) -> list[str]:
  """Probability and token; where a text has several masks, a heading for each."""
  lines = []
  for i, mask in enumerate(masks, 1):
    lines += [f"mask {i}:"] if len(masks) > 1 else []
    text = lambda guess: _one_line(guess.text) or f"(token {guess.token})"
    lines += [f"{guess.probability:.4f}  {text(guess)}" for guess in mask]
  return lines


def labels(told: list[Label]) -> list[str]:
  """Score and label."""
  return [f"{one.score:.4f}  {one.label}" for one in told]


def spans(found: list[Span]) -> list[str]:
  """Score, label, the characters and their text, in columns."""
  width = max((len(span.label) for span in found), default=0)
  places = [f"{span.start}-{span.end}" for span in found]
  wide = max(map(len, places), default=0)
  return [
    f"{span.score:.4f}  {span.label:{width}}  {place:{wide}}  {_one_line(span.text)}"
    for span, place in zip(found, places, strict=True)
  ] or ["(nothing is tagged)"]


def answers(found: Answer) -> list[str]:
  """Score and answer."""
  return [f"{found.score:.4f}  {_one_line(found.answer) or '(no answer)'}"]


def vector(values: list[float]) -> list[str]:
  """The numbers in one line."""
  return [" ".join(f"{value:.6g}" for value in values)]


def _one_line(text: str) -> str:
  return text.replace("\n", "\\n").replace("\r", "\\r")
