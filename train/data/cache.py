"""A bounded folder of results that are dear to compute, safe for many processes at once."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from absl import logging

from model.errors import InputError

_BLOCK = 1 << 22  # Bytes read at a time.
_READ_AGAIN = 4 << 30  # Bytes up to which an entry is read whole to see whether it is damaged.
_SUMS = "checksums.json"


class Entry:
  """A folder in the cache that is kept while this object lives."""

  def __init__(self, path: Path, lock: IO):
    self.path = path
    self._lock = lock  # Shared; whoever removes entries takes it alone.


class Cache:
  """Entries by key.

  A new entry is written beside the others and renamed when it is complete. One process builds an
  entry while the others wait; damaged entries are built again; the entries used longest ago are
  removed beyond the limit, except those that a living process uses.

  Args:
    folder: where it lies; made when needed.
    limit: bytes of all entries together.
  """

  def __init__(self, folder: Path, limit: float):
    self.folder, self.limit = folder.expanduser(), limit

  def entry(self, key: str, build: Callable[[Path], None]) -> Entry:
    """The entry of `key`; `build(path)` fills its folder where there is none."""
    path = self.folder / key
    use = self._lock(f"{key}.use", fcntl.LOCK_SH)
    if not _intact(path):
      with self._lock(f"{key}.build", fcntl.LOCK_EX):
        if not _intact(path):
          self._build(path, build)
    os.utime(path)
    return Entry(path, use)

  def _build(self, path: Path, build: Callable[[Path], None]) -> None:
    if path.exists():
      logging.warning("Cache entry %s is damaged: it is built again.", path)
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    try:
      new.mkdir()
      build(new)
      sums = {f.name: _checksum(f) for f in sorted(new.iterdir())}
      (new / _SUMS).write_text(json.dumps(sums))
      for file in (*new.iterdir(), new):
        _sync(file)
      if path.exists():  # Whoever has it open can still read it.
        old = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
      new.rename(path)
      _sync(self.folder)
    finally:
      shutil.rmtree(new, ignore_errors=True)
    self._evict()

  def _evict(self) -> None:
    for left in self.folder.glob("*.new-*"):  # A killed process left it.
      with (
        contextlib.suppress(BlockingIOError),
        self._lock(f"{left.name.partition('.new-')[0]}.build", fcntl.LOCK_EX | fcntl.LOCK_NB),
      ):
        shutil.rmtree(left, ignore_errors=True)
    entries = []
    for path in self.folder.iterdir():
      with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and ".new-" not in path.name:
          size = sum(f.stat().st_size for f in path.iterdir())
          entries.append((path.stat().st_mtime_ns, size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
      if total <= self.limit:
        return
      with (
        contextlib.suppress(BlockingIOError),
        self._lock(f"{path.name}.use", fcntl.LOCK_EX | fcntl.LOCK_NB),
      ):
        shutil.rmtree(path, ignore_errors=True)
        total -= size
    if total > self.limit:
      logging.warning(
        "The cache %s holds %.1f GiB in use, more than cache_gib=%.1f.",
        self.folder, total / 2**30, self.limit / 2**30,
      )  # fmt: skip

  def _lock(self, name: str, how: int) -> IO:
    """A file that is locked until it is closed."""
    folder = self.folder / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name).open("a")
    try:
      fcntl.flock(file, how)
    except OSError as error:
      file.close()
      if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        raise InputError(
          f"cache_dir: the file system of {self.folder} has no file locks: name another folder."
        ) from None
      raise
    return file


def _intact(path: Path) -> bool:
  try:
    sums = json.loads((path / _SUMS).read_text())
    sizes = {f.name: f.stat().st_size for f in path.iterdir() if f.name != _SUMS}
    if sizes != {name: size for name, (size, _, _) in sums.items()}:
      return False
    large = sum(sizes.values()) > _READ_AGAIN
    untouched = lambda name: large and _changed(path / name) == sums[name][2]
    return all(untouched(name) or _checksum(path / name)[1] == sums[name][1] for name in sums)
  except (OSError, ValueError, TypeError, AttributeError):
    return False


def _checksum(path: Path) -> tuple[int, int, int]:
  """Size, CRC-32 and time of change."""
  total = 0
  for block in _blocks(path):
    total = zlib.crc32(block, total)
  return path.stat().st_size, total, _changed(path)


def _changed(path: Path) -> int:
  return path.stat().st_mtime_ns


def _blocks(path: Path) -> Iterator[bytes]:
  with path.open("rb") as f:
    while block := f.read(_BLOCK):
      yield block


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
