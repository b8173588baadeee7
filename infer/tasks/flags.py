"""Flags of the tasks besides generation, and what they ask for together."""

from absl import flags

from infer.tasks.command import Asked
from model.errors import InputError

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
READ = {
  "fill-mask": ("top",),
  "classify": ("text_pair",),
  "tag": ("stride",),
  "answer": ("context", "max_answer_tokens", "stride"),
  "embed": ("text_pair", "output"),
}  # fmt: skip


def asked(task: str, prompts: list[str], *, as_json: bool) -> Asked:
  """What the flags ask of a task.

  Raises:
    InputError: for what is missing, or does not go together.
  """
  pairs, output = _TEXT_PAIR.value, _OUTPUT.value
  if task == "answer" and not (_CONTEXT.value or "").strip():
    raise InputError("--context is missing: give the text that --prompt asks about.")
  if pairs and len(pairs) != len(prompts):
    raise InputError(
      f"there are {len(prompts)} prompts and {len(pairs)} of --text_pair: give one for each."
    )
  if output is not None and (pairs or as_json):
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
