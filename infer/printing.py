"""What `python -m infer` prints of generated text, each prompt's part as soon as it is done."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infer.batch import text_of
from infer.chat import as_messages, turn_ends
from infer.generate import Completion, results, stream, told_whole
from infer.probabilities import legend, shown
from infer.progress import Progress
from infer.settings import Settings
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

COLOURS = ("terminal", "always")  # Where probabilities are shown.


@dataclasses.dataclass(frozen=True)
class How:
  """How completions are printed.

  Attributes:
    stream: as text comes, a prompt after the other; None: on a terminal, if there is one sequence.
    show_probs: one of `COLOURS`; None: not at all.
    progress: whether stderr tells how many prompts are done.
  """

  json: bool
  chat: bool
  stream: bool | None
  show_probs: str | None
  progress: bool

  def check(self, settings: Settings) -> None:
    """Raises an InputError for what does not go together, or with stdout."""
    if self.stream and (self.json or self.show_probs):
      other = "--json" if self.json else "--show_probs"
      raise InputError(f"--stream and {other} exclude each other: that is printed whole.")
    if self.show_probs and self.json:
      raise InputError("--show_probs and --json exclude each other: JSON has the logprobs.")
    for name in ("logprobs", "echo"):
      if getattr(settings, name) and not self.json:
        raise InputError(f"--{name} is reported in JSON only: add --json.")
    if self.show_probs == "terminal" and not sys.stdout.isatty():
      raise InputError(
        "--show_probs colours a terminal and stdout is none: leave it out, use --json, or write "
        "--show_probs=always."
      )


def print_completions(m: "Model", prompts: list[Any], settings: dict[str, Any], how: How) -> None:
  """Prints what `infer.generate` gives for the prompts."""
  if how.chat:
    prompts = as_messages(m, prompts)
    given = settings.get("stop", [])
    settings = settings | {"stop": [*given, *turn_ends(m)]}
  chosen = Settings(**settings)
  single = len(prompts) == 1 and not told_whole(chosen)
  whole = how.json or how.show_probs
  if not whole and (single and sys.stdout.isatty() if how.stream is None else how.stream):
    _print_pieces(m, prompts, chosen, settings)
  else:
    _print_whole(m, prompts, settings, how)


def _print_pieces(m: "Model", prompts: list[Any], chosen: Settings, settings: dict) -> None:
  seeds, adapters = chosen.seeds(len(prompts)), chosen.adapters(len(prompts))
  for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
    if i:
      print("---")
    own = {"seed": seed} | ({} if adapters is None else {"adapter": [adapters[i]]})
    for piece in stream(m, prompt, **settings | own):
      print(piece, end="", flush=True)
    print(flush=True)


def _print_whole(m: "Model", prompts: list[Any], settings: dict, how: How) -> None:
  groups = results(m, prompts, **settings)
  if how.show_probs:
    print(legend(), file=sys.stderr, flush=True)
  progress, first = Progress(len(prompts)) if how.progress else None, True
  with contextlib.closing(progress) if progress is not None else contextlib.nullcontext():
    for prompt, group in zip(prompts, groups, strict=True):
      with contextlib.nullcontext() if progress is None else progress.one():
        for completion in group:
          if not (first or how.json):
            print("---")
          print(_line(m, prompt, completion, how), flush=True)
          first = False


def _line(m: "Model", prompt: str | Sequence[int], completion: Completion, how: How) -> str:
  if how.json:
    return json.dumps(as_json(completion, m), ensure_ascii=False)
  return shown(m, prompt, completion) if how.show_probs else completion.text


def as_json(completion: Completion, m: "Model") -> dict:
  """The object of --json."""
  values = dataclasses.asdict(completion)
  text = lambda token: text_of(m)([token])
  for name in ("top_logprobs", "prompt_top_logprobs"):
    top = values.pop(name)
    if top is not None:
      values[name] = [
        [{"token": t, "text": text(t), "logprob": p} for t, p in place] for place in top
      ]
  return {name: value for name, value in values.items() if value is not None}
