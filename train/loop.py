"""A run from the first line to the last: it reads from top to bottom."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import jax

from model.checkpoint import Checkpoints
from model.compilation import run_one_at_a_time, use_compilation_cache
from model.errors import DONE, NON_FINITE, PREEMPTED, Stop
from model.peft.written import written_out
from model.sharding import make_mesh
from train import report
from train.adapter_run import (
  FirstUpdate,
  about_base,
  first_state,
  restored_state,
  with_pinned_base,
  without_base,
)
from train.agreement import check_same_config, check_same_fingerprint, check_seen_by_all
from train.analysis.exhausted import explained
from train.config import Config
from train.data.pipeline import Data, load_data
from train.group import ALONE, Group
from train.init_from import initial_params, with_its_model, with_its_tokenizer
from train.metrics import MetricsLog
from train.preemption import Preemption
from train.processes import joined
from train.program import Program, build_program, check_batch, local_rows, put_batch
from train.resolve import check_base, check_fit, resolved
from train.sample import check_sample, sample
from train.step import TrainState, first_average
from train.workdir import as_dict, check_same_data, check_workdir, write_config


def train(config: Config, workdir: Path) -> int:
  """Trains until `config.steps` are done or a signal comes; continues what `workdir` holds.

  Returns:
    The exit status: done, or preempted with the last finished step saved.

  Raises:
    InputError: for what a user can put right.
    Stop: with the status for a loss that stays non-finite.
  """
  run_one_at_a_time()
  config = with_its_model(config, workdir)
  check_fit(config)
  check_base(config)
  with joined(config.barrier_seconds) as group:
    check_same_config(group, config)
    use_compilation_cache(config.cache_dir)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    config = prepared(config, workdir, group)
    with jax.set_mesh(mesh):
      check_batch(config, mesh)
      data = load_data(
        config, workdir=workdir, rows=local_rows(mesh, config.batch_size), group=group
      )
      check_same_fingerprint(group, data.fingerprint)
      config = resolved(config, data)
      check_sample(config, data)  # What is wrong with the prompt is said before the training.
      if group.index == 0:
        write_config(workdir, config)
      program = build_program(config, mesh)
      checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
      with explained(config, mesh, program):
        group.at("reading the checkpoint")
        state, start = restore_or_init(config, program, checkpoints, data)
        group.at("compiling the step", patient=True)
        report.before(config, program, data, mesh, start)
        with Preemption(group) as preemption:
          return run_steps(config, workdir, program, checkpoints, data, preemption, state, start)


def prepared(config: Config, workdir: Path, group: Group) -> Config:
  """The config with the tokenizer of `init_from`; makes the workdir that process 0 writes to."""
  with group.turn("the workdir"):
    config = with_its_tokenizer(with_pinned_base(config, workdir), workdir)
    check_workdir(workdir, config)
    if group.index == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      if not (workdir / "config.json").exists():
        write_config(workdir, config)  # What a failed start leaves is known as this config's.
  check_seen_by_all(group, workdir)
  return config


def _left_out(config: Config, data: Data) -> dict[str, int]:
  """What of the corpus is not learned from, where the config allows that."""
  counted = {}
  if config.data.truncate or config.objective.too_long == "truncate":
    counted["truncated_tokens"] = data.truncated_tokens
  if config.objective.too_long in ("drop", "truncate"):
    counted["dropped_documents"] = data.dropped_documents
  return counted


def run_steps(
  config: Config, workdir: Path, program: Program, checkpoints: Checkpoints, data: Data,
  preemption: Preemption, state: TrainState, start: int,
) -> int:  # fmt: skip
  """The steps from `start` on, with validation, checkpoints, and what a person sees."""
  group = preemption.group
  log = MetricsLog(workdir, config, program, start)
  counted = _left_out(config, data)
  saved = start
  with contextlib.closing(checkpoints), contextlib.closing(log), group.telling():
    train_step, batches = program.train_step, data.batches(start)
    first, base = FirstUpdate(config, state), about_base(config)
    group.share("the first step", None)  # Collectives of the CPU wait for half a minute only.
    for step in range(start + 1, config.steps + 1):
      group.at(f"the rows of step {step}")
      log.trace(step - 1)
      batch = put_batch(program, next(batches))
      group.at(f"step {step}", together=True)
      with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, batch)
      log.step(step, metrics | counted)
      first.check(state, metrics)
      last, validation = step == config.steps, {}
      if last:
        log.flush()  # No step comes after it that would wait for its metrics.
      if log.bad_steps >= config.max_bad_steps:
        raise Stop(_non_finite(config, log), NON_FINITE)
      if step % config.eval_every == 0 or last:
        with log.paused():
          validation = evaluate(program, state, data, group)
        log.validation(step, validation)
      stopping = preemption.asked(step)
      if step % config.checkpoint_every == 0 or last or stopping:
        group.at(f"saving step {step}")
        log.flush()
        with log.paused():
          meta = {"config": as_dict(config), "data": data.fingerprint} | base
          kept = without_base(state) if base else state
          checkpoints.save(step, kept, meta, validation_loss=validation.get("loss"))
        saved = step
      if stopping:
        break
    group.at(f"the end of saving step {saved}")
  if saved < config.steps:
    if group.index == 0:
      print(f"stopped: step {saved} is saved; the same command goes on.", file=sys.stderr)
    return PREEMPTED
  group.at("the sample", patient=True)
  whole = written_out(program.tree(state.params, state.frozen), config.model)
  text = sample(config, data, dataclasses.replace(state, params=whole))
  if group.index == 0:
    print(f"curves: {workdir / 'curves.png'}", file=sys.stderr)
    if text is not None:
      print(f"sample: {text}", flush=True)
  return DONE


def restore_or_init(
  config: Config, program: Program, checkpoints: Checkpoints, data: Data
) -> tuple[TrainState, int]:
  """The newest good state of the workdir and its step, or a fresh state and 0."""
  if not config.peft.trains_all:
    found = restored_state(config, program, checkpoints, data)
    return (first_state(config, program, data), 0) if found is None else found
  restored = checkpoints.restore_latest(program.state)
  if restored is not None:
    check_same_data(restored.meta["data"], data.fingerprint)
    return restored.state, restored.step
  state = program.init()
  if config.init_from is not None:
    params = initial_params(config, state.params, program.state.params, data)
    ema = first_average(params) if state.ema else {}
    state = dataclasses.replace(state, params=params, ema=ema)
  return state, 0


def evaluate(
  program: Program, state: TrainState, data: Data, group: Group = ALONE
) -> dict[str, float]:
  """Means over the validation rows by name; `loss` is nats a target. {} where there are none."""
  if not data.num_validation_batches:
    return {}
  group.at("compiling the validation", patient=True)
  eval_step, sums = program.eval_step, {}
  group.share("the validation", None)
  for number, rows in enumerate(data.validation_batches(), start=1):
    group.at(f"validation batch {number}")
    means = eval_step(state.params, state.frozen, put_batch(program, rows))
    for name, (total, weight) in jax.device_get(means).items():
      sums.setdefault(name, [0.0, 0.0])
      sums[name] = [sums[name][0] + float(total), sums[name][1] + float(weight)]
  return {name: total / weight for name, (total, weight) in sums.items() if weight}


def _non_finite(config: Config, log: MetricsLog) -> str:
  step = log.last_step
  first = (step - config.max_bad_steps) * config.batch_size
  shown = ("step", "loss", "grad_norm", "learning_rate")
  finite = {k: v for k, v in log.last_finite.items() if k in shown}
  return (
    f"loss or gradient was not finite in {config.max_bad_steps} steps in a row, the last of them "
    f"step {step}, rows {first} to {step * config.batch_size - 1} of the data; last finite "
    f"metrics: {finite or 'none'}. Lower optimizer.learning_rate, or look at these rows."
  )
