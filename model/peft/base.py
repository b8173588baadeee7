"""What an adapter was trained on: its path, and a hash by which it is known again."""

import hashlib
from pathlib import Path
from typing import Any

from model import checkpoint, hf
from model.checkpoint_files import absolute, read_record
from model.errors import InputError

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def pinned(path: str) -> str:
  """A checkpoint PATH as an absolute one that will mean the same later: of a workdir the step.

  Raises:
    InputError: if there is no such checkpoint.
  """
  if hf.is_folder(path):
    return str(Path(path).expanduser().resolve())
  workdir, step = checkpoint.resolve(path)
  return str(workdir / "checkpoints" / str(step))


def hash_of(path: str) -> str:
  """64 hexadecimal digits for the weights at a pinned PATH, whatever dtype they are read in.

  Of a folder or GGUF file SHA-256 of the files; of a step SHA-256 of its arrays' fingerprints.
  """
  found = hashlib.sha256()
  if not hf.is_folder(path):
    leaves = read_record(absolute(path)).leaves
    for name in sorted(leaves):
      if name.startswith("params."):
        found.update(f"{name} {leaves[name].fingerprint}\n".encode())
    return found.hexdigest()
  folder = Path(path)
  files = [folder] if folder.is_file() else sorted(f for w in _WEIGHTS for f in folder.glob(w))
  for file in files:
    with file.open("rb") as stream:
      found.update(hashlib.file_digest(stream, "sha256").digest())
  return found.hexdigest()


def check_same(path: str, told: dict[str, Any], adapter: str) -> None:
  """Raises an InputError if another base lies at a pinned PATH than an adapter was trained on."""
  if hash_of(path) != told["hash"]:
    raise InputError(
      f"{path} is not the base that the adapter in {adapter} was trained on ({told['path']}): its "
      "weights have another hash. Name the right one with base=."
    )
