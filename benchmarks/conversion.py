"""Memory of a conversion both ways: a Llama of random weights to Orbax and back.

    python -m benchmarks.conversion [--layers=16] [--write]

Each way is the command that a user starts, as a process whose memory is looked at many times a
second. `own` is what it holds (anonymous memory), `resident` counts pages of mapped files too,
which the system takes back when it needs them. Bounds: twice the largest stacked parameter and
1 GiB; towards Orbax the stored size besides.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import psutil
from absl import app, flags

from benchmarks.measure import RESULTS, commit
from model import hf
from model.config import ModelConfig
from model.hf.engine import Layout
from model.hf.safetensors_files import open_folder, write_folder

_LAYERS = flags.DEFINE_integer("layers", 16, "Of a model 2,048 wide.", lower_bound=1)
_WRITE = flags.DEFINE_bool("write", False, "Write the result.")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main(_: list[str]) -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    layout = write_random(folder / "theirs", config(_LAYERS.value))
    leaf = max(math.prod(leaf.shape) for leaf in layout.leaves.values()) * _BFLOAT16.itemsize
    stored = sum(math.prod(piece.shape) for piece in layout.pieces) * _BFLOAT16.itemsize
    bound = 2 * leaf + 2**30
    rows = [
      {"what": "Hugging Face to Orbax", "bound": bound + stored,
       **peak(folder / "theirs", folder / "ours", "orbax")},
      {"what": "Orbax to Hugging Face", "bound": bound,
       **peak(folder / "ours", folder / "back", "hf")},
    ]  # fmt: skip
    want, got = (open_folder(folder / one) for one in ("theirs", "back"))
    same = want.keys() == got.keys() and all(np.array_equal(want[n], got[n]) for n in want)
  gib = 2**30
  print(f"{stored / 2 / 1e9:.2f} billion parameters, the largest {leaf / gib:.2f} GiB")
  for row in rows:
    print(
      f"{row['what']}: own {row['own'] / gib:.2f} GiB, resident {row['resident'] / gib:.2f} GiB, "
      f"bound {row['bound'] / gib:.2f} GiB, {row['seconds']:.0f} s"
    )
  print("the same bits" if same else "NOT the same bits")
  if _WRITE.value:
    result = dict(
      commit=commit(), jax=jax.__version__, parameters=stored // 2, largest_bytes=leaf,
      stored_bytes=stored, same_bits=same, rows=rows,
    )  # fmt: skip
    path = RESULTS / "conversion.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


def config(layers: int) -> ModelConfig:
  """Llama 3.2 1B, with so many layers."""
  return ModelConfig(
    vocab_size=128_256, num_layers=layers, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=8,
    rope_theta=5e5, max_positions=131_072,
  )  # fmt: skip


def write_random(folder: Path, cfg: ModelConfig) -> Layout:
  """A Llama of Hugging Face's with random bfloat16 weights, one tensor at a time."""
  family = hf.FAMILIES["llama"]
  name, values = family.write(cfg)
  layout = Layout(cfg, family.table(name), name)
  pieces = layout.ordered()
  rng = np.random.default_rng(0)
  random = lambda shape: (rng.standard_normal(shape, np.float32) * 0.02).astype(_BFLOAT16)
  folder.mkdir()
  shapes = {piece.theirs: (_BFLOAT16, piece.shape) for piece in pieces}
  write_folder(folder, shapes, ((piece.theirs, random(piece.shape)) for piece in pieces))
  (folder / "config.json").write_text(json.dumps(values))
  return layout


def peak(source: Path, target: Path, format: str) -> dict[str, float]:
  """Bytes and seconds of `python -m model.hf`."""
  command = [sys.executable, "-m", "model.hf", f"--source={source}", f"--target={target}"]
  start = time.perf_counter()
  process = subprocess.Popen([*command, f"--format={format}"])
  looked, own, resident = psutil.Process(process.pid), 0, 0
  while process.poll() is None:
    try:
      memory = looked.memory_info()
    except psutil.Error:
      break
    own, resident = max(own, memory.rss - memory.shared), max(resident, memory.rss)
    time.sleep(0.01)
  if process.wait():
    raise RuntimeError(f"{command} failed")
  return dict(own=own, resident=resident, seconds=time.perf_counter() - start)


if __name__ == "__main__":
  app.run(main)
