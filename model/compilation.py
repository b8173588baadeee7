"""How programs are compiled: their cache on disk, so that a program that ran before starts at once,
and what XLA is asked for on a CPU.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from model.sharding import platform

MAX_BYTES = 8 * 2**30  # The least recently used programs are removed beyond this size.


def use_compilation_cache(cache_dir: str | Path) -> None:
  """Keeps compiled programs under `cache_dir`/xla; safe for concurrent runs."""
  folder = Path(cache_dir).expanduser() / "xla"
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run_one_at_a_time() -> None:
  """On a CPU a program ends before the call returns; to be called before JAX knows its devices.

  Those in flight would each hold temporary memory, and two devices of a process wait for each other
  for ever (jax 0.10) when steps are dispatched while their collectives run. Accelerators are not
  changed: they wait for nothing but their own queue.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def wide_vectors(kind: str) -> dict[str, Any] | None:
  """Compiler options for a platform: on a CPU loops take vectors of 512 bits if it has them.

  XLA's own choice is 256. Products are not touched: their kernels are compiled beforehand.
  """
  return {"xla_cpu_prefer_vector_width": 512} if kind == "cpu" else None


class FewRows:
  """`jax.jit` of a program that multiplies few rows with many matrices, such as a decoding step.

  On a CPU with wide vectors: with XLA's it is up to 2.3 times as slow with whole numbers in eight
  bits.
  """

  def __init__(self, call: Callable[..., Any], **options: Any):
    """
    Args:
      options: of `jax.jit`.
    """
    self._call, self._options = call, options
    functools.update_wrapper(self, call)

  def __call__(self, *args: Any, **named: Any) -> Any:
    return self.jitted()(*args, **named)

  @functools.cache  # noqa: B019
  def _jitted(self, kind: str) -> Any:
    return jax.jit(self._call, compiler_options=wide_vectors(kind), **self._options)

  def jitted(self) -> Any:
    """The jitted function for the devices in use."""
    return self._jitted(platform())
