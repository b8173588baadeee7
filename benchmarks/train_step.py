"""Training steps a second beside PyTorch + Transformers: same shape, batch and optimizer.

    python -m benchmarks.train_step [--cases=gpt2,bert,t5] [--write]

Both take whole optimizer steps (forward, backward, clipping, AdamW), without dropout, on the same
machine in the same run, in turns, each in a process of its own. On CPU in float32, and PyTorch a
second time with the huge pages that `python -m train` asks for; on a GPU with bfloat16 activations
(PyTorch: autocast) and the PyTorch model compiled too. A masked language model's head reads the
masked places alone in ours; Transformers' reads all.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from benchmarks import torch_steps
from benchmarks.measure import Worker, has_gpu, interleaved, rates, report, serve
from configs import bert_base, gpt_small, t5_base
from model.compilation import run_one_at_a_time
from model.sharding import make_mesh
from train.config import Config
from train.objectives import make_objective
from train.objectives.objective import Batch, batch_fields
from train.program import build_program, put_batch


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape, with the sequences and tokens of its batch on a CPU and on a GPU."""

  name: str
  config: Callable[[], Config]
  cpu: tuple[int, int]
  gpu: tuple[int, int]


CASES = {
  "gpt2": Case("GPT-2 small", gpt_small.get_config, cpu=(4, 128), gpu=(8, 1024)),
  "bert": Case("BERT base, masked LM", bert_base.get_config, cpu=(2, 512), gpu=(16, 512)),
  "t5": Case("T5 base", t5_base.get_config, cpu=(2, 512), gpu=(16, 512)),
}
_CASES = flags.DEFINE_list("cases", [*CASES], "Shapes to measure, a comma between them.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which all take turns.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
  "steps", None, "Steps in a round: 2 on a CPU, 20 on a GPU.", lower_bound=1
)
_BATCH = flags.DEFINE_integer("batch", None, "Sequences in a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens in a sequence.", lower_bound=2)
_WAY = flags.DEFINE_string("way", None, "CASE/WAY to do the work of: what the benchmark starts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")


def main(_: list[str]) -> None:
  if _WAY.value:
    case, way = _WAY.value.split("/")
    serve(one_way(settings(CASES[case]), case, way))
  else:
    report("train_step", [compared(case) for case in _CASES.value], write=_WRITE.value)


def settings(case: Case) -> Config:
  """The config of a case: its published shape, AdamW, no dropout, no remat."""
  config, (batch, length) = case.config(), case.gpu if has_gpu() else case.cpu
  model = dataclasses.replace(config.model, remat="none", dropout=0.0, attention_dropout=0.0)
  optimizer = dataclasses.replace(config.optimizer, name="adamw", warmup_steps=10)
  return dataclasses.replace(
    config, model=model, optimizer=optimizer, batch_size=_BATCH.value or batch,
    seq_len=_LENGTH.value or length, steps=10_000,
  )  # fmt: skip


def steps_in_a_round() -> int:
  """By the flag, or what takes long enough to be timed."""
  return _STEPS.value or (20 if has_gpu() else 2)


def random_batch(config: Config) -> Batch:
  """Full rows of one document each."""
  rng, batch = np.random.default_rng(0), {}
  for name, ((length,), dtype, _) in batch_fields(make_objective(config).sides).items():
    shape = (config.batch_size, length)
    kind = name.rpartition("_")[2]
    if kind in ("tokens", "targets"):
      values = rng.integers(0, config.model.real_vocab, shape)
    elif kind == "places":
      values = np.stack(
        [rng.choice(config.seq_len, length, replace=False) for _ in range(shape[0])]
      )
    else:
      values = np.broadcast_to(np.arange(length) if kind == "positions" else 1, shape)
    batch[name] = values.astype(dtype)
  return batch


def ours(config: Config, batch: Batch, steps: int) -> Callable[[], None]:
  """The compiled step of train/program.py."""
  run_one_at_a_time()  # As train/loop.py does.
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state, step = [program.init()], program.train_step
    rows = put_batch(program, batch)

  def run() -> None:
    for _ in range(steps):
      state[0], metrics = step(state[0], rows)
    jax.block_until_ready(metrics)

  return run


def one_way(config: Config, case: str, way: str) -> Callable[[], None]:
  """What a worker does."""
  batch, steps = random_batch(config), steps_in_a_round()
  if way == "triune":
    return ours(config, batch, steps)
  return torch_steps.make(case, config, batch, steps, compiled=way == "compiled")


def compared(case: str) -> dict:
  """A row of the report. JAX is left alone, as it would take a GPU's memory from the workers."""
  start = lambda way, **how: Worker("benchmarks.train_step", f"{case}/{way}", **how)
  ways = {
    "triune": start("triune", huge_pages=True),
    "pytorch eager": start("eager", huge_pages=False),
  }
  if has_gpu():
    ways["pytorch compiled"] = start("compiled", huge_pages=False)
  else:
    ways["pytorch eager, huge pages"] = start("eager", huge_pages=True)
  config = settings(CASES[case])
  lengths = [n for n in (config.seq_len, config.target_len) if n is not None]
  tokens = config.batch_size * sum(lengths)
  measured = rates(interleaved(ways, _ROUNDS.value, 1), steps_in_a_round() * tokens)
  median = lambda name: measured[name]["median"]
  return dict(
    what=f"{CASES[case].name}, {config.batch_size} x {'/'.join(map(str, lengths))} tokens, AdamW",
    unit="tokens/s", rates=measured,
    ratios={f"triune / {n}": median("triune") / median(n) for n in ways if n != "triune"},
  )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
