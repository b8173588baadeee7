"""`python -m infer.evaluate --checkpoint=PATH --task=perplexity --data=FILE`: says how well a model
does, on stdout; with --json as one object.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import json
import sys

from absl import flags

from infer.evaluate.perplexity import perplexity
from infer.text import text_of_file
from model import load
from model.compilation import use_compilation_cache
from model.errors import InputError, run
from model.quant import NAMES, is_quantized
from model.quant_tree import report

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step in it, PATH@best, a Hugging Face folder or a GGUF file."
)
_QUANTIZE = flags.DEFINE_string(
  "quantize", None, f"Keep matrices in fewer bits: {', '.join(NAMES)} or int4:GROUP."
)
_TASK = flags.DEFINE_enum("task", None, ["perplexity"], "What is measured.")
_DATA = flags.DEFINE_string("data", None, "A text file in UTF-8: one text.")
_WINDOW = flags.DEFINE_integer(
  "window", None, "Tokens that are read at a time (default: the model's positions)."
)
_STRIDE = flags.DEFINE_integer(
  "stride", None,
  "Tokens between the beginnings of two windows, which share the others (default: one is shared).",
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "~/.cache/triune", "Where compiled programs are kept."
)


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise InputError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value.")
  for name, what in (("checkpoint", "a checkpoint"), ("task", "perplexity"), ("data", "a file")):
    if not flags.FLAGS[name].value:
      raise InputError(f"--{name} is missing: give {what}.")
  text = text_of_file(_DATA.value or "")
  use_compilation_cache(_CACHE_DIR.value)
  m = load(_CHECKPOINT.value or "", quantize=_QUANTIZE.value)
  if is_quantized(m.params):
    print(report(m.params), file=sys.stderr)
  found = perplexity(m, text, window=_WINDOW.value, stride=_STRIDE.value)
  told = {"task": _TASK.value, **dataclasses.asdict(found), "protocol": found.protocol()}
  if _JSON.value:
    print(json.dumps(told))
    return 0
  print(f"perplexity {found.perplexity:.4f} per token ({found.tokens:,} tokens)")
  print(f"perplexity {found.word_perplexity:.4f} per word ({found.words:,} words)")
  print(f"perplexity {found.byte_perplexity:.4f} per byte, {found.bits_per_byte:.4f} bits per byte")
  print(f"protocol: {found.protocol()}")
  return 0


if __name__ == "__main__":
  run(main)
