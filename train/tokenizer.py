"""Trains a tokenizer.

python -m train.tokenizer --input=FILE --kind=bpe --vocab_size=N --target=DIR
"""

from pathlib import Path

from absl import flags

from model.errors import InputError, run
from model.vocabulary import TRAINED, build_tokenizer
from train.config import DataConfig
from train.data.sources import TextSource, open_source
from train.data.vocabulary import Texts

_INPUT = flags.DEFINE_multi_string(
  "input", None, "File, glob, python_stdlib or tfds:NAME to train on; several are separated by "
  "commas or follow one another.", required=True,
)  # fmt: skip
_KIND = flags.DEFINE_enum("kind", "bpe", TRAINED, "Kind of vocabulary.")
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", None, "Entries, special tokens included.", lower_bound=1, required=True
)
_TARGET = flags.DEFINE_string("target", None, "Folder to write.", required=True)
_DOCUMENTS = flags.DEFINE_string("documents", "file", "A document: file, paragraph or line.")
_TEXT = flags.DEFINE_string("text", "text", "Column that holds the text.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS data sets lie.")


def main(argv: list[str]) -> None:
  """Trains and writes; prints one line.

  Raises:
    InputError: for a missing or empty input, or a target that is in use.
  """
  target = Path(_TARGET.value).expanduser()
  if target.is_file() or (target.is_dir() and any(target.iterdir())):
    raise InputError(f"--target={target} exists and is not an empty folder: name a new one.")
  config = DataConfig(documents=_DOCUMENTS.value, text=_TEXT.value, data_dir=_DATA_DIR.value)
  names = [
    name.strip()
    for value in (*_INPUT.value, *argv[1:])
    for name in value.split(",")
    if name.strip()
  ]
  sources = [open_source(name, config) for name in names]
  texts = [source for source in sources if isinstance(source, TextSource)]
  if len(texts) < len(names):
    raise InputError("--input names token arrays: a vocabulary is trained on text.")
  tokenizer = build_tokenizer(_KIND.value, _VOCAB_SIZE.value, Texts(texts, float("inf")))
  tokenizer.save(target)
  print(f"{_KIND.value} tokenizer of {tokenizer.vocab_size} entries in {target}")


if __name__ == "__main__":
  run(main)
