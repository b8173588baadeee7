"""Large pages for the arrays of the CPU, which glibc grants only from the start of a process."""

import os
import sys

_SETTING = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
  """Starts this program again with huge pages under malloc; returns where there is nothing to do.

  XLA takes the memory of a step from malloc and gives it back after the step, and glibc maps so
  large a block anew each time: with pages of 4 KiB a step of GPT-2 small starts with 350,000 page
  faults, with huge ones with 1,000. To be called before imports and threads, by a program that
  Python started; the process keeps its number.
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
  return environment | {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{_SETTING}=1"]))}


def _supported() -> bool:
  """Linux with glibc 2.35 or later."""
  try:
    name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    return sys.platform == "linux" and name == "glibc" and _numbers(version) >= (2, 35)
  except (AttributeError, ValueError):
    return False


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(map(int, version.split(".")[:2]))
