"""The cache of compiled programs on disk, so that a program that ran before starts at once."""

from pathlib import Path

import jax

MAX_BYTES = 8 * 2**30  # The least recently used programs are removed beyond this size.


def use_compilation_cache(cache_dir: str | Path) -> None:
  """Keeps compiled programs under `cache_dir`/xla; safe for concurrent runs."""
  folder = Path(cache_dir).expanduser() / "xla"
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
