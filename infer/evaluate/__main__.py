"""`python -m infer.evaluate --checkpoint=PATH --task=perplexity --data=FILE`: says how well a model
does, on stdout; with --json as one object.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import json
import math
import sys

from absl import flags

from infer.evaluate.perplexity import Perplexity, perplexity, rise
from infer.text import text_of_file
from model import load
from model.compilation import use_compilation_cache
from model.errors import InputError, run
from model.peft.load import base_of, is_adapter
from model.quant import NAMES, is_quantized
from model.quant_tree import report

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step in it, PATH@best, a Hugging Face folder or a GGUF file."
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Adapter for the checkpoint: a folder of PEFT's, or the workdir of its run."
)
_QUANTIZE = flags.DEFINE_string(
  "quantize", None, f"Keep matrices in fewer bits: {', '.join(NAMES)}, int4:GROUP or nf4:GROUP."
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
_WINDOWS = flags.DEFINE_integer(
  "windows", None, "How many windows are read, evenly spaced over the text (default: all)."
)
_BESIDE_FLOAT = flags.DEFINE_bool(
  "beside_float", False, "With --quantize: say what it costs beside the model as it is stored."
)
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
  if _BESIDE_FLOAT.value and not _QUANTIZE.value:
    raise InputError("--beside_float compares with --quantize=FORMAT: give a format.")
  text = text_of_file(_DATA.value or "")
  use_compilation_cache(_CACHE_DIR.value)
  path, adapter = _CHECKPOINT.value or "", _ADAPTER.value
  found = _measured(text, path, adapter, _QUANTIZE.value)
  told = {"task": _TASK.value, **dataclasses.asdict(found), "protocol": found.protocol()}
  if _BESIDE_FLOAT.value:
    if adapter is None and is_adapter(path):  # Alone it would bring the format it was trained on.
      path, adapter = base_of(path), path
    told |= _beside(found, _measured(text, path, adapter, None))
  if _JSON.value:
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    print(json.dumps({name: finite(value) for name, value in told.items()}, allow_nan=False))
    return 0
  print(f"perplexity {found.perplexity:.4f} per token ({found.tokens:,} tokens)")
  print(f"perplexity {found.word_perplexity:.4f} per word ({found.words:,} words)")
  print(f"perplexity {found.byte_perplexity:.4f} per byte, {found.bits_per_byte:.4f} bits per byte")
  if _BESIDE_FLOAT.value:
    error = told["rise_error_percent"]
    print(
      f"perplexity {told['float_perplexity']:.4f} per token as it is stored: quantized "
      f"{told['rise_percent']:+.2f} %" + (f" ± {error:.2f}" if error is not None else "")
    )
  print(f"protocol: {found.protocol()}")
  return 0


def _measured(text: str, path: str, adapter: str | None, quantize: str | None) -> Perplexity:
  m = load(path, adapter=adapter, quantize=quantize)
  if is_quantized(m.params):
    print(report(m.params), file=sys.stderr)
  return perplexity(m, text, window=_WINDOW.value, stride=_STRIDE.value, windows=_WINDOWS.value)


def _beside(found: Perplexity, plain: Perplexity) -> dict[str, float | None]:
  """What --beside_float adds; one window alone has no standard error."""
  more, error = rise(found, plain)
  return {"float_perplexity": plain.perplexity, "rise_percent": more, "rise_error_percent": error}


if __name__ == "__main__":
  run(main)
