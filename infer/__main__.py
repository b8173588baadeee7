"""`python -m infer --checkpoint=PATH --prompt=TEXT`: continues texts on the command line.

stdout holds completions only: one and a newline; several with a line `---` between them; with
--json one object a line for each prompt. On a terminal a single completion appears as it is made.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from infer.batch import text_of
from infer.generate import Completion, generate, stream
from infer.settings import Settings
from model import Model, load
from model.compilation import use_compilation_cache
from model.errors import InputError, run

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Workdir of a run, or a step inside it; PATH@best is its best step."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; again for more prompts.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "File with one prompt a line.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line for each prompt.")
_STREAM = flags.DEFINE_bool(
  "stream", None, "Print text as it comes, one prompt after the other (default: on a terminal)."
)

_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "~/.cache/triune", "Where compiled programs are kept."
)

_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", None, "The most tokens to add to a prompt (default: 64, if there is room)."
)
_MIN_NEW_TOKENS = flags.DEFINE_integer("min_new_tokens", 0, "Nothing ends a text before so many.")
_STOP = flags.DEFINE_multi_string("stop", [], "End before this text; again for more.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Spread of the draw; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most probable tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the most probable tokens that sum to p.")
_MIN_P = flags.DEFINE_float("min_p", None, "Draw from tokens at least p times the best one's.")
_SEED = flags.DEFINE_multi_integer("seed", [0], "Of the draws; one for all prompts or one each.")
_LOGPROBS = flags.DEFINE_integer("logprobs", None, "Report the N most probable tokens (--json).")


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise InputError(
      f"unexpected argument {argv[1]!r}: write --prompt=TEXT, every setting is a flag."
    )
  if _CHECKPOINT.value is None:
    raise InputError("--checkpoint is missing: give the workdir of a run.")
  prompts = [*_PROMPT.value, *_prompts_of_file(_PROMPTS_FILE.value)]
  if not prompts:
    raise InputError("there is no prompt: give --prompt=TEXT or --prompts_file=FILE.")
  if _JSON.value and _STREAM.value:
    raise InputError("--stream and --json exclude each other: JSON is printed whole.")
  if _LOGPROBS.value is not None and not _JSON.value:
    raise InputError("--logprobs is reported in JSON only: add --json.")
  seed = _SEED.value[0] if len(_SEED.value) == 1 else _SEED.value
  settings: dict[str, Any] = dict(
    max_new_tokens=_MAX_NEW_TOKENS.value, min_new_tokens=_MIN_NEW_TOKENS.value,
    stop=_STOP.value, temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
    min_p=_MIN_P.value, seed=seed, logprobs=_LOGPROBS.value,
  )  # fmt: skip
  seeds = Settings(**settings).seeds(len(prompts))  # What is impossible is said before the load.
  use_compilation_cache(_CACHE_DIR.value)
  m = load(_CHECKPOINT.value)
  live = sys.stdout.isatty() and len(prompts) == 1 if _STREAM.value is None else _STREAM.value
  try:
    if live and not _JSON.value:
      _print_pieces(m, prompts, seeds, settings)
    else:
      _print_whole(m, prompts, settings)
    sys.stdout.flush()
  except BrokenPipeError:  # The reader has seen enough; Python must not flush into it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    print(flush=True)
    return 130
  return 0


def _print_pieces(m: Model, prompts: list[str], seeds: list[int], settings: dict) -> None:
  for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
    if i:
      print("---")
    for piece in stream(m, prompt, **settings | {"seed": seed}):
      print(piece, end="", flush=True)
    print(flush=True)


def _print_whole(m: Model, prompts: list[str], settings: dict) -> None:
  for i, completion in enumerate(generate(m, prompts, **settings)):
    if _JSON.value:
      print(json.dumps(as_json(completion, m), ensure_ascii=False))
      continue
    if i:
      print("---")
    print(completion.text)


def as_json(completion: Completion, m: Model) -> dict:
  """The object of --json."""
  values = dataclasses.asdict(completion)
  top = values.pop("top_logprobs")
  if top is not None:
    text = lambda token: text_of(m)([token])
    values["top_logprobs"] = [
      [{"token": t, "text": text(t), "logprob": p} for t, p in place] for place in top
    ]
  return values


def _prompts_of_file(path: str | None) -> list[str]:
  if path is None:
    return []
  try:
    lines = Path(path).read_text(encoding="utf-8").split("\n")
  except UnicodeDecodeError as error:
    raise InputError(f"--prompts_file={path} is not UTF-8 text: {error}.") from error
  if not lines[-1]:
    lines.pop()
  if not lines:
    raise InputError(f"--prompts_file={path} is empty: write one prompt a line.")
  return lines


if __name__ == "__main__":
  run(main)
