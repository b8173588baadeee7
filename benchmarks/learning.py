"""Learning beside PyTorch: the same files, batches, optimizer and schedule, one after the other."""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, commit, machine
from model.config import ModelConfig
from train.config import Config, checked
from train.data.pipeline import Data, load_data
from train.resolve import resolved
from train.schedules import make_schedule

CURVES = Path(__file__).parents[1] / "docs" / "curves"
EVERY = 10  # Steps between two points of a curve.


@dataclasses.dataclass(frozen=True)
class Learned:
  """What a run gave: its score, and its losses by step."""

  score: float
  parameters: int
  losses: list[tuple[int, float]]


def overrides(*, steps: int, warmup: int, seed: int, **data: str | None) -> dict[str, Any]:
  """Settings of both sides by dotted names: one validation and one checkpoint, at the end."""
  return {
    "steps": steps, "seed": seed, "eval_every": steps, "checkpoint_every": steps,
    "log_every": EVERY, "optimizer.warmup_steps": warmup,
    **{f"data.{name}": value for name, value in data.items()},
  }  # fmt: skip


def prepare_peer(config: Config, values: dict[str, Any], workdir: Path) -> tuple[Config, Data]:
  """(config, data) of a peer that learns what the run of `workdir` did; torch is seeded.

  Args:
    values: set by dotted names, as --config.NAME=VALUE sets them.
  """
  import torch

  for path, value in values.items():
    *sections, name = path.split(".")
    setattr(functools.reduce(getattr, sections, config), name, value)
  config = checked(config)
  data = load_data(config, workdir=workdir)
  torch.manual_seed(config.seed)
  return resolved(config, data), data


def train_ours(file: str, values: dict[str, Any], workdir: Path) -> None:
  """Runs the command as a user does."""
  command = [sys.executable, "-m", "train", f"--config={file}", f"--workdir={workdir}"]
  settings = [f"--config.{name}={value}" for name, value in values.items()]
  subprocess.run([*command, *settings], check=True)


def losses_of(workdir: Path) -> list[tuple[int, float]]:
  """Training losses of a workdir."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def train_peer(
  config: Config, data: Data, net, loss_of: Callable[[Any], tuple[Any, float]]
) -> list[tuple[int, float]]:
  """Trains a torch module as `config` says: its losses by step.

  Args:
    loss_of: a batch of torch tensors -> (what is learned from, what is reported).
  """
  import torch

  o, moments, losses = config.optimizer, config.optimizer.moments(), []
  groups = [
    dict(params=[p for p in net.parameters() if p.ndim >= 2], weight_decay=o.weight_decay),
    dict(params=[p for p in net.parameters() if p.ndim < 2], weight_decay=0.0),
  ]
  adamw = torch.optim.AdamW(groups, betas=(moments["b1"], moments["b2"]), eps=moments["eps"])
  schedule = make_schedule(o, config.steps)
  for step, batch in zip(range(config.steps), _tensors(data.batches()), strict=False):
    loss, reported = loss_of(batch)
    adamw.zero_grad(set_to_none=True)
    loss.backward()
    if o.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip_norm)
    for group in adamw.param_groups:
      group["lr"] = float(np.asarray(schedule(step)))
    adamw.step()
    if (step + 1) % EVERY == 0:
      losses.append((step + 1, reported))
      print(f"pytorch {step + 1}/{config.steps}  loss {reported:.4f}", file=sys.stderr)
  return losses


def _tensors(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
  import torch

  long = lambda a: a.astype(np.int64) if a.dtype == np.int32 else a
  for batch in batches:
    yield {name: torch.from_numpy(long(array)) for name, array in batch.items()}


def sinusoids(cfg: ModelConfig):
  """Positions of a torch model (P, D): sines, then cosines (Vaswani et al., arXiv:1706.03762)."""
  import torch

  frequency = 10_000.0 ** (-torch.arange(0, cfg.d_model, 2) / cfg.d_model)
  angle = torch.arange(cfg.max_positions or 512)[:, None] * frequency
  return torch.cat((angle.sin(), angle.cos()), -1)


def report(
  name: str, runs: dict[str, list[Learned]], measure: str, *, write: bool, **said: Any
) -> None:
  """Prints each side's scores, one for each seed; on request writes them and draws the losses."""
  rows = {}
  for side, each in runs.items():
    scores = [run.score for run in each]
    rows[side] = dict(
      scores=scores, mean=round(float(np.mean(scores)), 2), parameters=each[0].parameters,
      last_loss=each[0].losses[-1][1],
    )  # fmt: skip
    print(f"{side:<28}{measure} {np.mean(scores):.2f}  {rows[side]}")
  if not write:
    return
  result = dict(machine=machine(), commit=commit(), measure=measure, **said, rows=rows)
  (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
  _draw(CURVES / f"{name}.png", runs)


def _draw(path: Path, runs: dict[str, list[Learned]]) -> None:
  """The losses of all runs, smoothed over 5 points, against the step."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
  canvas, axes = FigureCanvasAgg(figure), figure.subplots()
  for color, (side, each) in zip(("tab:blue", "tab:orange"), runs.items(), strict=False):
    for i, run in enumerate(each):
      steps, losses = zip(*run.losses, strict=True)
      smooth = np.convolve(np.pad(losses, 2, mode="edge"), np.ones(5) / 5, mode="valid")
      axes.plot(steps, smooth, color=color, linewidth=1.2, label=None if i else side)
  axes.set(xlabel="step", ylabel="training loss (nats)", title=path.stem)
  axes.legend()
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(exist_ok=True)
  canvas.print_png(str(path))
