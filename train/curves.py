"""curves.png: the losses and the learning rate of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path

import numpy as np


def draw_curves(metrics: Path, target: Path) -> None:
  """Draws training and validation loss, and below the learning rate, against the step."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
  canvas = FigureCanvasAgg(figure)
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  steps, losses = _column(lines, "loss")
  above.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35, label="training")
  if len(losses) >= 50:
    above.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.6, label="training, smoothed")
  else:
    above.lines[0].set(alpha=1.0, linewidth=1.6)
  steps, losses = _column(lines, "validation_loss")
  if losses:
    style = dict(color="tab:orange", linewidth=1.6, marker="o", markersize=3.5)
    above.plot(steps, losses, label=f"validation (last {losses[-1]:.4f})", **style)
  above.set(ylabel="loss (nats per token)", title=metrics.resolve().parent.name)
  above.legend()
  below.plot(*_column(lines, "learning_rate"), color="tab:green")
  below.set(xlabel="step", ylabel="learning rate")
  for axes in (above, below):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  new = target.with_name(target.name + ".new")
  canvas.print_png(str(new))
  new.replace(target)


def _column(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
  """Steps and values of the lines that have a finite one."""
  points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
  return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> np.ndarray:
  """The mean of the values near each, over about a fiftieth of the run."""
  near = np.ones(2 * (len(values) // 100) + 1)
  sums = np.convolve(values, near, mode="same")
  return sums / np.convolve(np.ones(len(values)), near, mode="same")
