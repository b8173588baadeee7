"""`python -m infer --checkpoint=PATH --prompt=TEXT`: continues texts on the command line, or says
what --task asks of them.

stdout holds results only, each as soon as it and those before it are done. A completion is its text
and a newline; several have a line `---` between them, like the results of other tasks, which are
lines for a person; with --json it is one object a line for each completion. On a terminal a single
completion appears as it is made. Files of prompts tell on stderr how far they are.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from infer import setting_flags
from infer.heads import TASKS, check_head
from infer.prefix_cache import PrefixCache
from infer.printing import COLOURS, How, print_completions
from infer.settings import Settings
from infer.tasks import flags as task_flags
from infer.tasks.command import Asked, tell
from model import Model, load
from model.compilation import use_compilation_cache
from model.errors import InputError, run
from model.quant import NAMES, is_quantized
from model.quant_tree import report

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Workdir of a run, a step inside it, PATH@best, a Hugging Face folder or a GGUF file.",
)
_QUANTIZE = flags.DEFINE_string(
  "quantize", None, f"Keep matrices in fewer bits: {', '.join(NAMES)}, int4:GROUP or nf4:GROUP."
)
_ADAPTER = flags.DEFINE_multi_string(
  "adapter", [], "Adapter for the checkpoint: a folder of PEFT's, or the workdir of its run; or "
  "NAME=PATH, again for more of them, of which --prompt_adapter names each prompt's."
)  # fmt: skip
_TASK = flags.DEFINE_enum("task", "generate", list(TASKS.values()), "What the model is asked for.")
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "Text to continue or to judge, or question; again for more prompts."
)
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "File with one prompt a line.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line for each prompt.")
_CHAT = flags.DEFINE_bool(
  "chat", False, "Each prompt is a message to answer, in the checkpoint's chat template."
)
_STREAM = flags.DEFINE_bool(
  "stream", None, "Print text as it comes, one prompt after the other (default: on a terminal)."
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "~/.cache/triune", "Where compiled programs are kept."
)


class _Shown(flags.ArgumentParser):
  """--show_probs alone means a terminal."""

  def parse(self, argument: object) -> str | None:
    values = {"true": COLOURS[0], "false": None} | {name: name for name in COLOURS}
    if argument not in values:
      raise ValueError(f"it is given alone, or is one of {', '.join(COLOURS)}")
    return values[str(argument)]


_SHOW_PROBS = flags.DEFINE_flag(
  flags.Flag(
    _Shown(), None, "show_probs", None, boolean=True,
    help_string="Colour tokens by their probability in a terminal; --show_probs=always: in a pipe "
    "too. With NO_COLOR set they are numbers.",
  )
)  # fmt: skip
for _module in (setting_flags, task_flags):
  flags.adopt_module_key_flags(_module)  # So that --help tells of them.
_SETTINGS = [setting_flags.flag_of(field.name) for field in dataclasses.fields(Settings)]
_GENERATE = ("chat", "stream", "show_probs", *_SETTINGS)


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise InputError(
      f"unexpected argument {argv[1]!r}: write --prompt=TEXT, every setting is a flag."
    )
  _check_task_flags()
  if _CHECKPOINT.value is None:
    raise InputError("--checkpoint is missing: give the workdir of a run.")
  prompts = [*_PROMPT.value, *_prompts_of_file(_PROMPTS_FILE.value)]
  if not prompts:
    raise InputError("there is no prompt: give --prompt=TEXT or --prompts_file=FILE.")
  if _TASK.value == "generate":
    answer = _generation(prompts)
  else:
    answer = functools.partial(_tell, task_flags.asked(_TASK.value, prompts, as_json=_JSON.value))
  adapter = _adapter()
  use_compilation_cache(_CACHE_DIR.value)  # What is impossible was said before the load.
  m = load(_CHECKPOINT.value, quantize=_QUANTIZE.value, adapter=adapter)
  if is_quantized(m.params):
    print(report(m.params), file=sys.stderr)
  if _TASK.value != "embed":
    check_head(m.config, _TASK.value)
  try:
    answer(m)
    sys.stdout.flush()
  except BrokenPipeError:  # The reader has seen enough; Python must not flush into it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    print(flush=True)
    return 130
  return 0


def _adapter() -> str | dict[str, str] | None:
  """The PATH of the one adapter, or several by name.

  Raises:
    InputError: for names that no prompt is given, or that are not told apart.
  """
  texts = _ADAPTER.value
  pairs = [("", "", text) if Path(text).exists() else text.partition("=") for text in texts]
  names = [name for name, equals, _ in pairs if equals]
  chosen = flags.FLAGS[setting_flags.flag_of("adapter")].value
  if not names and len(texts) < 2:
    return texts[0] if texts else None
  if len(names) < len(texts) or len(set(names)) < len(names) or {"", "none"} & {*names}:
    raise InputError(
      f"--adapter={' --adapter='.join(texts)}: several adapters are told apart by names, "
      "--adapter=NAME=PATH, all of them different and none of them 'none'."
    )
  if not chosen:
    raise InputError(
      f"--adapter names {', '.join(names)}, and no prompt has one: add --prompt_adapter=NAME, once "
      "or for each prompt ('none': the base)."
    )
  return {name: path for name, _, path in pairs}


def _check_task_flags() -> None:
  """Refuses flags that the task does not read."""
  read = {"generate": _GENERATE, **task_flags.READ}
  for name in dict.fromkeys(name for names in read.values() for name in names):
    readers = [task for task, names in read.items() if name in names]
    if flags.FLAGS[name].present and _TASK.value not in readers:
      raise InputError(
        f"--{name} has no effect on --task={_TASK.value}: leave it out. It is read by "
        f"--task={' and --task='.join(readers)}."
      )


def _generation(prompts: list[str]) -> Callable[[Model], None]:
  """What generates and prints, after all checks that need no model."""
  settings = setting_flags.given_settings()
  how = How(
    _JSON.value, _CHAT.value, _STREAM.value, _SHOW_PROBS.value, _PROMPTS_FILE.value is not None
  )
  how.check(setting_flags.checked_settings(settings, len(prompts)))

  def answer(m: Model) -> None:
    made: dict[str, Any] = {n: load(p) for n, p in setting_flags.models_of(settings).items()}
    made["prefix_cache"] = PrefixCache(m) if settings.get("prefix_cache") else None
    print_completions(m, prompts, settings | made, how)

  return answer


def _tell(asked: Asked, m: Model) -> None:
  for i, (values, lines) in enumerate(tell(m, asked)):
    if i and not _JSON.value:
      print("---")
    print(json.dumps(values, ensure_ascii=False) if _JSON.value else "\n".join(lines))


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
