"""Memory for the arrays of the CPU as glibc gives it only from the start of a process: in large
pages, and kept.
"""

import os
import sys
from pathlib import Path

_SETTING = "glibc.malloc.hugetlb"
# One heap, for blocks of any size, that gives nothing back: a step finds the memory of the last.
_KEPT = ("glibc.malloc.arena_max=1", "glibc.malloc.mmap_max=0",
         f"glibc.malloc.trim_threshold={1 << 46}")  # fmt: skip
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")


def use_huge_pages() -> None:
  """Starts this program again with huge pages under malloc; returns where there is nothing to do.

  XLA takes the memory of a step from malloc and gives it back after the step, and glibc maps so
  large a block anew each time: with pages of 4 KiB a step of GPT-2 small starts with 350,000 page
  faults, with huge ones with 1,000. Where the CPU computes, the memory is kept too, and there are
  none. To be called before imports and threads, by a program that Python started; the process keeps
  its number.
  """
  environment = with_huge_pages(dict(os.environ))
  if environment != dict(os.environ) and sys.executable:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_huge_pages(environment: dict[str, str]) -> dict[str, str]:
  """The environment of a process that is to use huge pages: the same where glibc has none.

  What the environment says about them already stays.
  """
  tunables = environment.get("GLIBC_TUNABLES", "")
  if _SETTING in tunables or not _supported():
    return environment
  kept = _KEPT if _cpu_computes(environment) else ()
  return environment | {
    "GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{_SETTING}=1", *kept]))
  }


def _cpu_computes(environment: dict[str, str]) -> bool:
  """Whether JAX will compute on the CPU, as far as can be told before it starts."""
  platform = environment.get("JAX_PLATFORMS", "")
  return platform == "cpu" or not (platform or any(Path(p).exists() for p in _ACCELERATORS))


def _supported() -> bool:
  """Linux with glibc 2.35 or later."""
  try:
    name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    return sys.platform == "linux" and name == "glibc" and _numbers(version) >= (2, 35)
  except (AttributeError, ValueError):
    return False


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(map(int, version.split(".")[:2]))
