"""What a run writes down: metrics.jsonl, TensorBoard events, curves.png, and W&B on request."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.errors import InputError
from model.hardware import peak_flops
from train.config import Config
from train.curves import draw_curves
from train.flops import step_flops
from train.program import Program
from train.report import Progress

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
FIRST = ("loss", "learning_rate", "grad_norm")  # Of a line; JAX returns metrics sorted by name.
_WORK = ("tokens.", "pairs.")  # What model FLOPs are counted by.
_SHOWN_AFTER = 120.0  # Seconds after which TensorBoard is to see what was written.


class MetricsLog:
  """Takes in the metrics of each step and writes them down; process 0 writes, the others count.

  A step is written down when the next one comes in, so that the device is never waited for while
  it has nothing else to do. Each step stands in metrics.jsonl once, also when a killed run repeats
  it: lines after `start` are removed first, atomically.

  Attributes:
    last_step: the last step that was written down; 0 before there is one.
    bad_steps: non-finite steps in a row, up to `last_step`.
    last_finite: the metrics of the last step whose loss and gradient were finite, with its `step`.
  """

  def __init__(self, workdir: Path, config: Config, program: Program, start: int):
    self._workdir, self._config = workdir, config
    self.last_step, self.bad_steps, self.last_finite = 0, 0, {}
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._sums, self._seconds = {}, 0.0
    self._tracing = False
    self._flops = step_flops(config)
    peak = peak_flops(jax.devices()[0].device_kind, config.model.compute_dtype)
    mesh = program.batch["tokens"].sharding.mesh
    self._peak = None if peak is None else peak * mesh.size
    self._writers: list[Any] = []
    self._progress = None
    if jax.process_index() == 0:
      drop_after(workdir / FILE, start)
      self._writers = [_JsonLines(workdir / FILE), _TensorBoard(workdir, start)]
      if config.wandb_project is not None:
        self._writers.append(_WandB(workdir, config, start))
      self._progress = Progress(config.steps, start)
    self._mark = time.perf_counter()

  def step(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes in what the train step returned for `step`; arrays may still be being computed."""
    self._settle()
    self._pending = (step, metrics)
    # Where the step was not computed in the background, its time is up now.
    arrays: list[Any] = [a for a in metrics.values() if isinstance(a, jax.Array)]
    if all(a.is_ready() for a in arrays):
      self._settle()

  def validation(self, step: int, means: dict[str, float]) -> None:
    """Writes means over the validation rows, `loss` in nats a target; {} (no rows): nothing."""
    self._settle()
    if means:
      names = sorted(means, key=lambda name: name != "loss")  # The loss first.
      self._write({"step": step, **{f"validation_{name}": means[name] for name in names}})
      if self._progress is not None:
        self._progress.validation(step, means["loss"])

  def trace(self, step: int) -> None:
    """To be called before each step, with the steps done so far: starts and ends the profile."""
    first, end = self._config.profile_steps or (0, 0)
    if self._progress is None:  # Of several processes the first one is traced.
      return
    if not self._tracing and first <= step < end:
      self._settle()
      jax.profiler.start_trace(self._workdir / "profile")
      self._tracing = True
    elif self._tracing and step >= end:
      self._stop_trace()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is no training (validation, saving): its time is not in tokens per second."""
    self._settle()
    yield
    self._mark = time.perf_counter()

  def flush(self) -> None:
    """Makes sure that all that came in is on disk: before each checkpoint."""
    self._settle()
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Writes what is left and draws curves.png."""
    try:
      self.flush()
      if self._tracing:
        self._stop_trace()
    finally:
      for writer in self._writers:
        with contextlib.suppress(OSError):  # `flush` has said that the disk is full.
          writer.close()
      if self._progress is not None:
        self._progress.close()
    if self._progress is not None:
      draw_curves(self._workdir / FILE, self._workdir / "curves.png")

  def _settle(self) -> None:
    """Waits for the pending step and writes it down."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: _shortest(np.asarray(v)) for name, v in jax.device_get(metrics).items()}
    now = time.perf_counter()
    self._seconds, self._mark = self._seconds + now - self._mark, now
    for name in values:
      if name.startswith(_WORK):
        self._sums[name] = self._sums.get(name, 0) + values[name]
    self.last_step, self.bad_steps = step, values["bad_steps"]
    if self.bad_steps == 0:
      self.last_finite = {"step": step, **_without_work(values)}
    if step % self._config.log_every == 0 or step == self._config.steps:
      self._log(step, _without_work(values))

  def _log(self, step: int, values: dict[str, float]) -> None:
    tokens, pairs = (
      {n.removeprefix(kind): v for n, v in self._sums.items() if n.startswith(kind)}
      for kind in _WORK
    )
    flops = self._flops(tokens, pairs)
    rate = sum(tokens[stack] for stack in self._config.model.stacks) / self._seconds
    mfu = None if self._peak is None else flops / self._seconds / self._peak
    self._sums, self._seconds = {}, 0.0
    measured = {"tokens_per_second": round(rate, 1), "mfu": None if mfu is None else round(mfu, 4)}
    first = {name: values[name] for name in FIRST}
    self._write({"step": step, **first, **measured, **values})
    if self._progress is not None:
      self._progress.step(step, values["loss"], rate, mfu)

  def _write(self, line: dict[str, Any]) -> None:
    for writer in self._writers:
      writer.write(line)

  def _stop_trace(self) -> None:
    self._settle()
    jax.profiler.stop_trace()
    self._tracing = False


def drop_after(path: Path, step: int) -> None:
  """Removes the lines of steps after `step`, and a last line that was not finished, atomically."""
  if not path.exists():
    return
  new, changed = path.with_name(path.name + ".new"), False
  with path.open() as old, new.open("w") as kept:
    for number, line in enumerate(old, start=1):
      place = _step_of(line)
      if place is None:
        print(f"{path}: line {number} is not whole and was removed.", file=sys.stderr)
      keep = place is not None and 0 < place <= step
      changed |= not keep
      kept.write(line if keep else "")
    kept.flush()
    os.fsync(kept.fileno())
  if changed:
    new.replace(path)
  else:
    new.unlink()


def _step_of(line: str) -> int | None:
  try:
    return json.loads(line)["step"] if line.endswith("\n") else None
  except (ValueError, KeyError, TypeError):
    return None


def _without_work(values: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if not name.startswith(_WORK)}


def _shortest(scalar: np.ndarray) -> float | int:
  """A Python number: for floats the shortest that reads back as the same value of their dtype."""
  return scalar.item() if np.issubdtype(scalar.dtype, np.integer) else float(str(scalar))


class _JsonLines:
  """One object a line. JSON has no NaN: such a value is null, and `non_finite` says what it was."""

  def __init__(self, path: Path):
    self._file = path.open("a")

  def write(self, line: dict[str, Any]) -> None:
    odd = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    plain = {k: None if k in odd else v for k, v in line.items()}
    text = json.dumps(plain | ({"non_finite": odd} if odd else {}), allow_nan=False)
    self._file.write(text + "\n")
    self._file.flush()

  def flush(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class _TensorBoard:
  """Event files; TensorBoard hides what earlier files hold of the steps after `start`.

  The thread that calls writes them. SummaryWriter has one of its own: a full disk ends it, and
  whoever goes on giving it events waits for ever.
  """

  def __init__(self, workdir: Path, start: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    proto: Any = event_pb2  # Its classes are made when it is imported.
    self._event, self._scalar = proto.Event, scalar
    # The suffix keeps files apart whose names, seconds, are equal: they would be overwritten.
    self._writer = EventsWriter(str(workdir / "events"), f".{start}")
    self._flushed = time.monotonic()
    self._add(start + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))

  def write(self, line: dict[str, Any]) -> None:
    for name, value in line.items():
      if name != "step" and value is not None:
        self._add(line["step"], summary=self._scalar(name, value))
    if time.monotonic() - self._flushed > _SHOWN_AFTER:
      self.flush()

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()

  def _add(self, step: int, **content: Any) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))


class _WandB:
  """A W&B run, continued by the id that the workdir holds.

  A repeated step has the same metrics, so what the run on the server already has is left out.
  """

  def __init__(self, workdir: Path, config: Config, start: int):
    try:
      import wandb
    except ImportError as error:
      raise InputError(
        f"wandb_project={config.wandb_project!r} needs the package wandb: pip install wandb, or "
        "leave wandb_project out."
      ) from error
    id_file = workdir / WANDB_ID
    if start == 0 or not id_file.exists():
      id_file.write_text(uuid.uuid4().hex[:12])
    settings = wandb.Settings(console="off", silent=True)
    try:
      self._run = wandb.init(
        project=config.wandb_project, id=id_file.read_text(), resume="allow", dir=str(workdir),
        config=dataclasses.asdict(config), settings=settings,
      )  # fmt: skip
    except wandb.Error as error:
      raise InputError(
        f"wandb_project={config.wandb_project!r} cannot be used: {error} Set WANDB_MODE=offline to "
        "log without an account, or leave wandb_project out."
      ) from error
    self._first = self._run.step

  def write(self, line: dict[str, Any]) -> None:
    if line["step"] >= self._first:
      values = {k: v for k, v in line.items() if k != "step" and v is not None}
      self._run.log(values, step=line["step"])

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()
