"""The cache: whole entries only, whoever else uses it, whatever was killed or damaged."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.data.cache import Cache

ROOT = Path(__file__).parents[3]


def _filler(content: bytes, calls: list[bytes]):
  def build(folder: Path) -> None:
    calls.append(content)
    (folder / "a.bin").write_bytes(content)

  return build


def test_an_entry_is_built_once_and_again_when_it_is_damaged(tmp_path):
  cache, calls = Cache(tmp_path, 1e9), []
  build = _filler(b"12345678" * 1000, calls)
  for _ in range(2):
    file = cache.entry("k", build).path / "a.bin"
    assert file.read_bytes() == b"12345678" * 1000
  assert len(calls) == 1
  with file.open("r+b") as f:
    f.seek(4000)
    f.write(b"x")
  for damage in (None, lambda: file.write_bytes(b""), file.unlink):
    if damage:
      damage()
    assert (cache.entry("k", build).path / "a.bin").read_bytes() == b"12345678" * 1000
  assert len(calls) == 4


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path):
  cache, calls = Cache(tmp_path, 1e9), []

  def fail(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"half")
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space"):
    cache.entry("k", fail)
  assert [f.name for f in tmp_path.iterdir()] == ["locks"]
  (tmp_path / "dead.new-0123").mkdir()
  cache.entry("k", _filler(b"x", calls))
  assert sorted(f.name for f in tmp_path.iterdir()) == ["k", "locks"]


def test_the_entries_used_longest_ago_go_first_and_never_one_in_use(tmp_path):
  cache, calls = Cache(tmp_path, 3000), []
  held = cache.entry("held", _filler(b"h" * 1000, calls))
  for name in ("old", "newer", "newest"):
    time.sleep(0.01)
    cache.entry(name, _filler(name.encode() * 150, calls))
    if name == "newer":
      time.sleep(0.01)
      cache.entry("old", _filler(b"never", calls))  # Used again: not the oldest any more.
  kept = {f.name for f in tmp_path.iterdir()} - {"locks"}
  assert kept == {"held", "old", "newest"}
  assert held.path.is_dir()


def test_many_processes_build_one_entry_once_and_all_read_it_whole(tmp_path):
  program = (
    "import sys, time; from pathlib import Path; from train.data.cache import Cache\n"
    "def build(folder):\n"
    "  with open(sys.argv[1] + '/built', 'a') as f: f.write('x')\n"
    "  for i in range(20):\n"
    "    with open(folder / 'a.bin', 'ab') as f: f.write(bytes([i]) * 100)\n"
    "    time.sleep(0.01)\n"
    "e = Cache(Path(sys.argv[1]) / 'c', 1e9).entry('k', build)\n"
    "print(len((e.path / 'a.bin').read_bytes()))\n"
  )
  start = lambda: subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  runs = [start() for _ in range(4)]
  assert [run.communicate(timeout=60)[0] for run in runs] == ["2000\n"] * 4
  assert (tmp_path / "built").read_text() == "x"
