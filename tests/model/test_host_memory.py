"""Memory from glibc: asked for once, and what the user says about it stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.host_memory import with_huge_pages

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from model.host_memory import use_huge_pages
use_huge_pages()
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv, sys.flags.dev_mode]))
"""

needs_glibc = pytest.mark.skipif(
  not with_huge_pages({}), reason="Only glibc from 2.35 on has this setting."
)


def started(**environment: str) -> tuple[int, list]:
  """(process number, what the program prints) of a program that asks for huge pages."""
  plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  with subprocess.Popen(
    [sys.executable, "-X", "dev", "-c", PROGRAM, "a b", "--flag"], cwd=ROOT,
    env=plain | environment, stdout=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    out, _ = process.communicate(timeout=60)
  return process.pid, json.loads(out)


@needs_glibc
def test_the_program_starts_again_as_it_was_with_huge_pages():
  pid, printed = started(JAX_PLATFORMS="cuda")
  assert printed == [pid, "glibc.malloc.hugetlb=1", ["-c", "a b", "--flag"], True]


@needs_glibc
def test_a_cpu_that_computes_keeps_its_memory():
  """Blocks of any size come from one heap: allocated and freed again and again, no page faults."""
  program = """
import ctypes, json, resource
from model.host_memory import use_huge_pages
use_huge_pages()
c, size = ctypes.CDLL(None), 1 << 28
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def use():
  block = c.malloc(size)
  ctypes.memset(block, 1, size)
  c.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  use()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""
  faults = {
    platform: int(subprocess.run(
      [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
      env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
      | {"JAX_PLATFORMS": platform},
    ).stdout)
    for platform in ("cpu", "cuda")
  }  # fmt: skip
  assert faults["cpu"] < 50 < 3 * 100 < faults["cuda"]


@needs_glibc
def test_other_tunables_stay():
  _, printed = started(GLIBC_TUNABLES="glibc.malloc.perturb=1", JAX_PLATFORMS="cuda")
  assert printed[1] == "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1"


def test_what_the_user_says_stays():
  given = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "HOME": "/"}
  assert with_huge_pages(given) == given
