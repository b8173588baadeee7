"""Eight simulated devices in every test process, and programs that are compiled quickly.

With JAX_PLATFORMS=cuda tests of one device run on an NVIDIA GPU, in float32 without TF32.
"""

import gc
import os
from pathlib import Path

import pytest

from tests.quick import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
else:
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("WANDB_MODE", "offline")

_MOST_MAPS = 40_000  # Linux gives a process 65,530.
_LONGEST = (
  "test_certify.py", "test_run.py", "test_sharding.py", "test_step.py", "test_generate.py",
  "test_shapes.py", "test_pipeline.py", "test_expert_parallel.py", "test_processes.py",
  "test_encoder_decoder.py", "test_beam.py", "test_speculative.py", "test_analysis.py",
  "test_preflight.py",
)  # fmt: skip
# What these show is decided by our own code, whichever JAX computes: commands, files, searches.
_ONCE = (
  "test_house.py", "launch/", "model/hf/", "model/peft/", "model/test_chat.py",
  "infer/test_adapters.py", "infer/test_attention.py", "infer/test_beam.py", "infer/test_cache.py",
  "infer/test_calibrate.py", "infer/test_chat.py", "infer/test_command.py",
  "infer/test_constrain.py", "infer/test_perplexity.py", "infer/test_printing.py",
  "infer/test_probes.py", "infer/test_shaping.py", "infer/test_speculative.py",
  "infer/test_task_command.py", "infer/test_tasks.py", "infer/test_text.py",
  "infer/test_virtual.py", "infer/test_windows.py", "train/objectives/", "train/peft/",
  "train/test_init_from.py", "train/test_report.py",
)  # fmt: skip
_HERE = Path(__file__).parent

# Many objects live to a process's end: looking through them all took a tenth of its time.
gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(tryfirst=True)  # Before pytest chooses by marks.
def pytest_collection_modifyitems(items):
  """Marks what is shown once. Files that take longest come first, so that no worker is left alone
  with one at the end.
  """
  for item in items:
    if item.path.relative_to(_HERE).as_posix().startswith(_ONCE):
      item.add_marker("once")
  rank = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
  """Forgets compiled programs."""
  yield
  import jax  # Not before its environment is set.

  jax.clear_caches()


@pytest.fixture(autouse=True)
def _room_for_programs():
  """Forgets compiled programs where a process has few memory maps left for the next: LLVM crashes
  without them.
  """
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
    import jax

    jax.clear_caches()
