"""Training steps a second beside PyTorch + Transformers: same shape, batch and optimizer.

    python -m benchmarks.train_step [--write]

Both take whole optimizer steps (forward, backward, clipping, AdamW) on the same machine in the same
run, in turns, each in a process of its own. On CPU in float32, and PyTorch a second time with the
huge pages that `python -m train` asks for; on a GPU with bfloat16 activations (PyTorch: autocast)
and the PyTorch model compiled too.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import Worker, interleaved, rates, report, serve
from configs import gpt_small
from model.sharding import make_mesh
from train.program import build_program, put_batch

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which all take turns.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "Steps in a round.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences in a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=2)
_WAY = flags.DEFINE_string("way", None, "Do the work of one way: what the benchmark starts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")


def ours(batch: dict[str, np.ndarray], steps: int) -> Callable[[], None]:
  """GPT-2 small as configs/gpt_small.py has it, in a program of train/program.py."""
  size, length = batch["tokens"].shape
  config = gpt_small.get_config()
  model = dataclasses.replace(config.model, remat="none")
  optimizer = dataclasses.replace(config.optimizer, warmup_steps=10)
  config = dataclasses.replace(
    config, model=model, optimizer=optimizer, batch_size=size, seq_len=length, steps=10_000
  )
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state = [program.init()]
    rows = put_batch(program, batch)

  def run() -> None:
    for _ in range(steps):
      state[0], metrics = program.train_step(state[0], rows)
    jax.block_until_ready(metrics)

  return run


def pytorch(batch: dict[str, np.ndarray], steps: int, *, compiled: bool) -> Callable[[], None]:
  """GPT2LMHeadModel and torch.optim.AdamW."""
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
  model = transformers.GPT2LMHeadModel(config)
  torch.nn.Module.to(model, device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
  forward = torch.compile(model) if compiled else model
  tokens = torch.tensor(batch["tokens"], dtype=torch.long, device=device)
  targets = torch.tensor(batch["targets"], dtype=torch.long, device=device)

  def step() -> None:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
      logits = forward(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

  def run() -> None:
    for _ in range(steps):
      step()
    if device == "cuda":
      torch.cuda.synchronize()

  return run


def main(_: list[str]) -> None:
  if _WAY.value:
    serve(one_way(_WAY.value))
  else:
    report("train_step", [compared()], write=_WRITE.value)


def one_way(way: str) -> Callable[[], None]:
  """What a worker does."""
  batch = random_batch(_BATCH.value, _LENGTH.value)
  if way == "triune":
    return ours(batch, _STEPS.value)
  return pytorch(batch, _STEPS.value, compiled=way == "compiled")


def compared() -> dict:
  """A row of the report. JAX is left alone, as it would take a GPU's memory from the workers."""
  import torch

  start = functools.partial(Worker, "benchmarks.train_step")
  ways = {
    "triune": start("triune", huge_pages=True),
    "pytorch eager": start("eager", huge_pages=False),
  }
  if torch.cuda.is_available():
    ways["pytorch compiled"] = start("compiled", huge_pages=False)
  else:
    ways["pytorch eager, huge pages"] = start("eager", huge_pages=True)
  tokens = _STEPS.value * _BATCH.value * _LENGTH.value
  measured = rates(interleaved(ways, _ROUNDS.value, 1), tokens)
  median = lambda name: measured[name]["median"]
  return dict(
    what=f"GPT-2 small, {_BATCH.value} x {_LENGTH.value} tokens, AdamW",
    unit="tokens/s", rates=measured,
    ratios={f"triune / {n}": median("triune") / median(n) for n in ways if n != "triune"},
  )  # fmt: skip


def random_batch(size: int, length: int) -> dict[str, np.ndarray]:
  """Rows of one document each."""
  tokens = np.random.default_rng(0).integers(0, 50_257, (size, length + 1)).astype(np.int32)
  return dict(
    tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((size, length), np.float32),
    segments=np.ones((size, length), np.int32),
    positions=np.tile(np.arange(length, dtype=np.int32), (size, 1)),
  )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
