"""How many bytes a second this machine reads from memory, with all of its cores or its accelerator.

What a product of a matrix with few rows can reach: a step of decoding reads every weight once.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_BYTES = 2**29  # Far more than caches hold.
_ROUNDS = 20


def read_bandwidth(*, gpu: bool) -> float:
  """Bytes a second, the best of some passes over an array."""
  return _gpu_bandwidth() if gpu else _cpu_bandwidth()


def _cpu_bandwidth() -> float:
  """NumPy's maximum, which takes wide loads and no lock, in a thread for each core."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  parts = [np.ones(_BYTES // 4 // cores, np.float32) for _ in range(cores)]
  with ThreadPoolExecutor(cores) as pool:
    run = lambda: list(pool.map(np.max, parts))
    return sum(part.nbytes for part in parts) / _best(run)


def _gpu_bandwidth() -> float:
  """A sum that XLA compiles."""
  import jax
  import jax.numpy as jnp

  values = jnp.zeros(8 * _BYTES // 2, jnp.bfloat16)
  total: Any = jax.jit(lambda a: jnp.sum(a, dtype=jnp.float32))
  return values.nbytes / _best(lambda: total(values).block_until_ready())


def _best(run) -> float:
  """Seconds of the fastest of some rounds, after one that does not count."""
  times = []
  for _ in range(_ROUNDS + 1):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times[1:])
