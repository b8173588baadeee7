"""`python -m infer.quantize --checkpoint=PATH --target=DIR --method=gptq --data=FILE`: writes a
quantized model, and says on stdout what that costs each matrix; with --json as one object.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

import dataclasses
import json
from typing import Any

from absl import flags

from infer.calibrate import calibrated
from infer.calibrate.methods import METHODS
from infer.calibrate.run import Report, check
from infer.text import text_of_file
from model import load, save
from model.compilation import use_compilation_cache
from model.errors import InputError, run
from model.peft.attach import is_adapted
from model.quant_tree import resident_bytes
from model.saving import unused_folder

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step in it, PATH@best, a Hugging Face folder or a GGUF file."
)
_TARGET = flags.DEFINE_string("target", None, "A new or empty folder: the workdir to be.")
_FORMAT = flags.DEFINE_string(
  "format", "int4", "int8, int4, int4:GROUP, nf4, nf4:GROUP, fp8, int8_dynamic or fp8_dynamic."
)
_METHOD = flags.DEFINE_string("method", "plain", f"What chooses the values: {', '.join(METHODS)}.")
_DATA = flags.DEFINE_string("data", None, "A text file in UTF-8 to calibrate with.")
_SAMPLES = flags.DEFINE_integer(
  "samples", None, "Rows of the text that are read (default: 64, or as many as there are)."
)
_LENGTH = flags.DEFINE_integer(
  "length", None, "Tokens of a row (default: 512, or the model's positions)."
)
_ALPHA = flags.DEFINE_float(
  "alpha", None, "Of smoothquant: the share of a range that weights take over (default: 0.5)."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "~/.cache/triune", "Where compiled programs are kept."
)


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise InputError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value.")
  for name, what in (("checkpoint", "a checkpoint"), ("target", "a new folder")):
    if not flags.FLAGS[name].value:
      raise InputError(f"--{name} is missing: give {what}.")
  chosen: Any = dict(format=_FORMAT.value, method=_METHOD.value, samples=_SAMPLES.value,
                length=_LENGTH.value, alpha=_ALPHA.value)  # fmt: skip
  check(**chosen, text=_DATA.value is not None)  # What is impossible is said before the load.
  target = unused_folder(_TARGET.value or "")
  text = None if _DATA.value is None else text_of_file(_DATA.value)
  use_compilation_cache(_CACHE_DIR.value)
  m = load(_CHECKPOINT.value or "")
  m = m.merged() if is_adapted(m.params) else m
  made, report = calibrated(m, text, **chosen)
  save(made, target)
  tell(report, resident_bytes(m.params), resident_bytes(made.params))
  return 0


def tell(report: Report, before: int, after: int) -> None:
  """Prints what became of a model of so many bytes."""
  if _JSON.value:
    print(json.dumps({**dataclasses.asdict(report), "float_bytes": before, "bytes": after}))
    return
  width = max(len(part.name) for part in report.parts)
  for part in report.parts:
    cost = "" if part.error is None else f"{part.plain_error:.3e} -> {part.error:.3e}"
    print(f"{part.name:{width}}  {part.format:12}  {part.method:11}  {cost}".rstrip())
  print("\n".join([*_summary(report), f"{before:,} bytes became {after:,}"]))


def _summary(report: Report) -> list[str]:
  lines, met = [], [part for part in report.parts if part.error is not None]
  if met:
    mean = lambda errors: sum(errors) / len(met)
    plain, now = mean(p.plain_error or 0 for p in met), mean(p.error or 0 for p in met)
    lines.append(
      f"squared error of outputs beside their squares, mean of {len(met)} matrices on "
      f"{report.samples} samples of {report.length} tokens: {plain:.3e} plain -> {now:.3e} "
      f"{report.method}"
    )
  left = len(report.parts) - sum(part.method == report.method for part in report.parts)
  if left:
    lines.append(
      f"{left} of {len(report.parts)} matrices are rounded plainly: they lie outside of layers, "
      "met no token, or have nothing before them that could take scales"
    )
  return lines


if __name__ == "__main__":
  run(main)
