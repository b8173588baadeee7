"""python -m model.hf --source=PATH --target=DIR --format=orbax|hf: converts checkpoints, and with
--adapter=PATH merges an adapter into them.
"""

import sys

from absl import flags

from model import errors
from model.errors import InputError

_SOURCE = flags.DEFINE_string(
  "source", None, "A workdir, a step in it, a Hugging Face folder, or a .gguf file."
)
_TARGET = flags.DEFINE_string("target", None, "A new or empty folder.")
_FORMAT = flags.DEFINE_enum("format", "hf", ["orbax", "hf"], "What to write.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "Of what is written; not given: as it is."
)
_FAMILY = flags.DEFINE_string(
  "family", None, "model_type to write; not given: what it came from, or the first that fits."
)


_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Adapter to merge: a folder of PEFT's, or the workdir of its run."
)
_QUANTIZE = flags.DEFINE_string(
  "quantize", None, "Read and write matrices in fewer bits, with --format=orbax: int8, int4, …"
)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is no flag: settings are written --name=value.")
  if not _SOURCE.value or not _TARGET.value:
    raise InputError("--source and --target are needed: what to read and where to write.")
  from model import saving  # After the flags: what is wrong with them is said sooner.

  config = saving.convert(
    _SOURCE.value, _TARGET.value, format=_FORMAT.value, dtype=_DTYPE.value, family=_FAMILY.value,
    adapter=_ADAPTER.value, quantize=_QUANTIZE.value,
  )  # fmt: skip
  print(f"{_TARGET.value}: {config.num_params():,} parameters", file=sys.stderr)
  return 0


if __name__ == "__main__":
  errors.run(main)
