"""`python -m infer --checkpoint=PATH --prompt=TEXT`: continues texts on the command line, or says
what --task asks of them.

stdout holds results only. A completion is its text and a newline; several have a line `---` between
them, like the results of other tasks, which are lines for a person; with --json it is one object a
line for each prompt. On a terminal a single completion appears as it is made.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from infer.batch import text_of
from infer.chat import as_messages, turn_ends
from infer.generate import Completion, generate, stream
from infer.heads import TASKS, check_head
from infer.settings import Settings
from infer.tasks.command import Asked, tell
from model import Model, load
from model.compilation import use_compilation_cache
from model.errors import InputError, run

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Workdir of a run, a step inside it, PATH@best, a Hugging Face folder or a GGUF file.",
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Adapter for the checkpoint: a folder of PEFT's, or the workdir of its run."
)
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

_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", None, "The most tokens to add to a prompt (default: 64, if there is room)."
)
_MIN_NEW_TOKENS = flags.DEFINE_integer("min_new_tokens", 0, "Nothing ends a text before so many.")
_STOP = flags.DEFINE_multi_string("stop", [], "End before this text; again for more.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Spread of the draw; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most probable tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the most probable tokens that sum to p.")
_MIN_P = flags.DEFINE_float("min_p", None, "Draw from tokens at least p times the best one's.")
_TYPICAL_P = flags.DEFINE_float(
  "typical_p", None, "Draw from tokens of about the expected surprise that sum to p."
)
_EPSILON_CUTOFF = flags.DEFINE_float(
  "epsilon_cutoff", None, "Draw from tokens of at least this probability."
)
_SEED = flags.DEFINE_multi_integer("seed", [0], "Of the draws; one for all prompts or one each.")
_REPETITION_PENALTY = flags.DEFINE_float(
  "repetition_penalty", 1.0, "Above 1: against tokens of the prompt and the text."
)
_PRESENCE_PENALTY = flags.DEFINE_float(
  "presence_penalty", 0.0, "Taken off the scores of tokens that the text has."
)
_FREQUENCY_PENALTY = flags.DEFINE_float(
  "frequency_penalty", 0.0, "Taken off as often as the text has them."
)
_NO_REPEAT_NGRAM_SIZE = flags.DEFINE_integer(
  "no_repeat_ngram_size", None, "No run of so many tokens is there twice."
)
_LOGIT_BIAS = flags.DEFINE_string(
  "logit_bias", None, 'JSON: token ids, or texts, with what is added: {"50256": -5, "very": 2}.'
)
_BAD_WORDS = flags.DEFINE_multi_string("bad_words", [], "Never say this; again for more.")
_ALLOWED_TOKENS = flags.DEFINE_multi_integer(
  "allowed_tokens", None, "A token id that may be chosen, again for more; no others are."
)
_NUM_RETURN_SEQUENCES = flags.DEFINE_integer(
  "num_return_sequences", 1, "Sequences to draw for each prompt."
)
_BEST_OF = flags.DEFINE_integer(
  "best_of", None, "Draw so many for each prompt and keep those of the best --scorer."
)
_SCORER = flags.DEFINE_string(
  "scorer", "mean_logprob", "'mean_logprob', or the checkpoint of a reward model."
)
_PREFIX = flags.DEFINE_string("prefix", "", "What each completion begins with.")
_PENALTY_ALPHA = flags.DEFINE_float(
  "penalty_alpha", 0.0, "Contrastive search among --top_k tokens: weight of their likeness."
)
_NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "Sequences that a search goes on with.")
_NUM_BEAM_GROUPS = flags.DEFINE_integer(
  "num_beam_groups", 1, "Groups of beams that are to differ from each other."
)
_DIVERSITY_PENALTY = flags.DEFINE_float(
  "diversity_penalty", 0.0, "For each time that groups before have just chosen a token."
)
_LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", 1.0, "Power of the length that a sequence's score is divided by."
)
_EARLY_STOPPING = flags.DEFINE_enum(
  "early_stopping", "false", ["false", "true", "never"],
  "When a search ends: by a rule of thumb, when num_beams have ended, or proven to be the best.",
)  # fmt: skip
_DRAFT = flags.DEFINE_string(
  "draft", None, "What guesses tokens ahead: a checkpoint, 'lookup', or 'layers:N' (early layers)."
)
_SPECULATE = flags.DEFINE_integer("speculate", None, "Tokens that --draft guesses (default: 4).")
_LOGPROBS = flags.DEFINE_integer("logprobs", None, "Report the N most probable tokens (--json).")
_ECHO = flags.DEFINE_bool("echo", False, "Report the prompt's log-probabilities (--json).")

_TOP = flags.DEFINE_integer("top", 5, "Tokens that are shown for each mask.", lower_bound=1)
_TEXT_PAIR = flags.DEFINE_multi_string("text_pair", [], "Second text of each prompt, in order.")
_CONTEXT = flags.DEFINE_string("context", None, "Text that answers every question (answer).")
_MAX_ANSWER_TOKENS = flags.DEFINE_integer(
  "max_answer_tokens", 30, "The longest answer.", lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
  "stride", None, "Tokens that windows over a long text share (default: a quarter of a window).",
  lower_bound=0,
)  # fmt: skip
_OUTPUT = flags.DEFINE_string("output", None, "File for the vectors, as a NumPy array.")

# The flags that each task reads besides those that all read.
_READ = {
  "generate": ("chat", "stream", *(f.name for f in dataclasses.fields(Settings))),
  "fill-mask": ("top",),
  "classify": ("text_pair",),
  "tag": ("stride",),
  "answer": ("context", "max_answer_tokens", "stride"),
  "embed": ("text_pair", "output"),
}  # fmt: skip


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
    answer = functools.partial(_generate, prompts=prompts, settings=_settings(prompts))
  else:
    answer = functools.partial(_tell, asked=_asked(prompts))
  use_compilation_cache(_CACHE_DIR.value)  # What is impossible was said before the load.
  m = load(_CHECKPOINT.value, adapter=_ADAPTER.value)
  if _TASK.value == "generate" and _drafts_from_a_checkpoint():
    answer.keywords["settings"]["draft"] = load(str(_DRAFT.value))
  if _TASK.value == "generate" and _SCORER.value != "mean_logprob":
    answer.keywords["settings"]["scorer"] = load(_SCORER.value)
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


def _check_task_flags() -> None:
  """Refuses flags that the task does not read."""
  for name in dict.fromkeys(name for names in _READ.values() for name in names):
    readers = [task for task, names in _READ.items() if name in names]
    if flags.FLAGS[name].present and _TASK.value not in readers:
      raise InputError(
        f"--{name} has no effect on --task={_TASK.value}: leave it out. It is read by "
        f"--task={' and --task='.join(readers)}."
      )


def _settings(prompts: list[str]) -> dict[str, Any]:
  if _JSON.value and _STREAM.value:
    raise InputError("--stream and --json exclude each other: JSON is printed whole.")
  for flag in (_LOGPROBS, _ECHO):
    if flag.value and not _JSON.value:
      raise InputError(f"--{flag.name} is reported in JSON only: add --json.")
  settings: dict[str, Any] = {
    f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Settings)
  }
  seeds, bias, stopping = (settings[name] for name in ("seed", "logit_bias", "early_stopping"))
  settings |= dict(
    early_stopping={"false": False, "true": True}.get(stopping, stopping),
    seed=seeds[0] if len(seeds) == 1 else seeds,
    logit_bias=None if bias is None else _biases(bias),
  )
  known: dict[str, Any] = settings | ({"draft": "lookup"} if _drafts_from_a_checkpoint() else {})
  Settings(**known).seeds(len(prompts))
  return settings


def _drafts_from_a_checkpoint() -> bool:
  name = (_DRAFT.value or "lookup").partition(":")[0]
  return name not in ("lookup", "layers")


def _biases(text: str) -> dict[str | int, float]:
  """--logit_bias: keys of digits are token ids, others are texts."""
  try:
    pairs = json.loads(text)
  except ValueError as error:
    raise InputError(f"--logit_bias={text} is not JSON ({error}).") from error
  if not isinstance(pairs, dict):
    raise InputError(f'--logit_bias={text} must be an object such as {{"50256": -5}}.')
  return {int(key) if key.isdecimal() else key: value for key, value in pairs.items()}


def _asked(prompts: list[str]) -> Asked:
  task, pairs, output = _TASK.value, _TEXT_PAIR.value, _OUTPUT.value
  if task == "answer" and not (_CONTEXT.value or "").strip():
    raise InputError("--context is missing: give the text that --prompt asks about.")
  if pairs and len(pairs) != len(prompts):
    raise InputError(
      f"there are {len(prompts)} prompts and {len(pairs)} of --text_pair: give one for each."
    )
  if output is not None and (pairs or _JSON.value):
    raise InputError(
      "--output holds the vectors of the prompts in place of what is printed: leave out "
      f"{'--text_pair' if pairs else '--json'}."
    )
  if output is not None and not output.endswith(".npy"):
    raise InputError(f"--output={output} is a NumPy array: name a file that ends in .npy.")
  return Asked(
    task, prompts, pairs, _CONTEXT.value, _TOP.value, _MAX_ANSWER_TOKENS.value, _STRIDE.value,
    output,
  )  # fmt: skip


def _tell(m: Model, asked: Asked) -> None:
  for i, (values, lines) in enumerate(tell(m, asked)):
    if i and not _JSON.value:
      print("---")
    print(json.dumps(values, ensure_ascii=False) if _JSON.value else "\n".join(lines))


def _generate(m: Model, prompts: list[Any], settings: dict[str, Any]) -> None:
  if _CHAT.value:
    prompts = as_messages(m, prompts)
    settings = settings | {"stop": [*settings["stop"], *turn_ends(m)]}
  many = ("num_return_sequences", "num_beams", "best_of", "penalty_alpha")
  single = len(prompts) == 1 and all(settings[name] in (0, 1, None) for name in many)
  live = sys.stdout.isatty() and single if _STREAM.value is None else _STREAM.value
  if live and not _JSON.value:
    _print_pieces(m, prompts, Settings(**settings).seeds(len(prompts)), settings)
  else:
    _print_whole(m, prompts, settings)


def _print_pieces(m: Model, prompts: list[Any], seeds: list[int], settings: dict) -> None:
  for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
    if i:
      print("---")
    for piece in stream(m, prompt, **settings | {"seed": seed}):
      print(piece, end="", flush=True)
    print(flush=True)


def _print_whole(m: Model, prompts: list[Any], settings: dict) -> None:
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
  text = lambda token: text_of(m)([token])
  for name in ("top_logprobs", "prompt_top_logprobs"):
    top = values.pop(name)
    if top is not None:
      values[name] = [
        [{"token": t, "text": text(t), "logprob": p} for t, p in place] for place in top
      ]
  return {name: value for name, value in values.items() if value is not None}


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
