"""The tree as it is sent to other machines: the files that git tracks, as they are now."""

import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from launch.job import Job
from model.errors import InputError


def tracked(folder: Path) -> list[str]:
  """Files below `folder` that git tracks and that are there, relative to it.

  Raises:
    InputError: outside of a git repository.
  """
  words = ["git", "-C", str(folder), "ls-files", "-z"]
  try:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    raise InputError("git is not installed here: it says which files are to be copied.") from None
  if done.returncode:
    raise InputError(f"{folder} cannot be copied: {done.stderr.strip()}")
  return [name for name in done.stdout.split("\0") if name and (folder / name).is_file()]


def check_command(job: Job, folder: Path, names: list[str]) -> None:
  """Refuses a command that names a file of ours which would not be copied."""
  known = set(names)
  for word in job.command:
    value = word.partition("=")[2] or word
    path = folder / value.partition(":")[0]
    try:
      here = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except OSError:  # No name of a file at all.
      continue
    if here and str(path.resolve().relative_to(folder.resolve())) not in known:
      raise InputError(f"{value} is not copied, since git does not track it: git add {value}.")


def pack(target: Path, folder: Path, names: list[str], further: Mapping[str, str]) -> None:
  """Writes a .tar.gz of files, and of texts under names of their own."""
  with tarfile.open(target, "w:gz") as archive:
    for name in names:
      archive.add(folder / name, arcname=name, recursive=False)
    for name, text in further.items():
      data = text.encode()
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))


def orders(job: Job, environment: Mapping[str, str]) -> str:
  """What launch.worker reads: the command and its environment."""
  return json.dumps(
    dict(argv=job.argv(".venv/bin/python"), environment=dict(environment)), indent=2
  )
