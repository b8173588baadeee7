"""What a workdir remembers of its run, and whether the run may go on with another config."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from model import checkpoint
from model.errors import InputError
from train.config import Config

# What may change when a run is continued; anything else makes it another run.
RESUMABLE = (
  "steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints",
  "max_bad_steps", "barrier_seconds", "profile_steps", "wandb_project", "sample_prompt",
  "cache_dir", "cache_gib", "mesh", "data.workers", "model.micro_batches", "model.stage_rounds",
  "model.context_attention", "objective.loss_parts",
)  # fmt: skip

# Of an adapter's run, whose base and data are compared by what they hold: they may have moved.
MOVABLE = ("init_from", "data.tokenizer")

# What the data decides where the config has this value (`train.resolve`).
OF_THE_DATA = {
  ("model", "vocab_size"): None, ("model", "head"): None, ("model", "pair_head"): False,
  ("model", "num_labels"): None, ("model", "decoder_start_id"): None, ("data", "labels"): None,
  ("peft", "init_tokens"): [],
}  # fmt: skip


def check_workdir(workdir: Path, config: Config) -> None:
  """Makes sure that `workdir` is new, or that its run was started with this config.

  Raises:
    InputError: listing the fields that differ, or when the workdir is a file.
  """
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"--workdir={workdir} is a file: name a folder.")
  saved = read_config(workdir)
  if saved is None:
    return
  current = as_dict(config)
  for section, name in OF_THE_DATA:  # It was the data's then, and will be again.
    if current[section][name] == OF_THE_DATA[section, name]:
      current[section][name] = saved[section][name]
  if any((workdir / "checkpoints").glob("[0-9]*")):
    movable = () if config.peft.trains_all else MOVABLE
    checkpoint.check_config(saved, current, allowed=(*RESUMABLE, *movable))
  elif saved != current:
    _forget(workdir)


def read_config(workdir: Path) -> dict[str, Any] | None:
  """The config of the run in `workdir`; None where none was started."""
  try:
    return json.loads((workdir / "config.json").read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    text = f"{workdir}/config.json is damaged ({error}): restore or delete it."
    raise InputError(text) from error


def write_config(workdir: Path, config: Config) -> None:
  """Writes config.json whole or not at all."""
  new = workdir / "config.json.new"
  new.write_text(json.dumps(as_dict(config), indent=2) + "\n")
  new.replace(workdir / "config.json")


def as_dict(config: Config) -> dict[str, Any]:
  """Plain values, as JSON gives them back."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def check_same_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
  """Raises an InputError if the corpus or tokenizer is not the one that the run began with."""
  checkpoint.check_config({"data": saved}, {"data": json.loads(json.dumps(current))})


def _forget(workdir: Path) -> None:
  """Removes what a run left that never saved a checkpoint, and that had another config."""
  for name in ("tokenizer", "profile"):
    shutil.rmtree(workdir / name, ignore_errors=True)
  for pattern in ("config.json", "metrics.jsonl", "events.*", "curves.png"):
    for file in workdir.glob(pattern):
      file.unlink()
