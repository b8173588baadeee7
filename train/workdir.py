"""What a workdir remembers of its run, and whether the run may go on with another config."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from model import checkpoint
from model.checkpoint_files import absolute, numbered
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
    if current[section][name] == OF_THE_DATA[section, name] and name in saved[section]:
      current[section][name] = saved[section][name]
  if _has_checkpoints(workdir):
    movable = () if config.peft.trains_all else MOVABLE
    checkpoint.check_config(saved, current, allowed=(*RESUMABLE, *movable))
  elif saved != current:
    _forget(workdir)


def read_config(workdir: Path) -> dict[str, Any] | None:
  """The config of the run in `workdir`; None where none was started.

  Where config.json is missing, the newest checkpoint knows it too.

  Raises:
    InputError: if what is there is damaged, or not a run's.
  """
  source = f"{workdir}/config.json"
  try:
    saved = json.loads((workdir / "config.json").read_text())
  except FileNotFoundError:
    if not _has_checkpoints(workdir):
      return None
    source = f"the config in {workdir}/checkpoints"
    saved = checkpoint.describe(str(workdir)).meta.get("config")
  except ValueError as error:
    text = f"{source} is damaged ({error}): restore or delete it."
    raise InputError(text) from error
  if not _is_of_a_run(saved):
    raise InputError(f"{source} is not that of a run: name another folder as --workdir.")
  return saved


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


def _has_checkpoints(workdir: Path) -> bool:
  """Whether steps were saved; a save that did not end has another name than a step."""
  return bool(numbered(absolute(workdir) / "checkpoints"))


def _is_of_a_run(saved: Any) -> bool:
  sections = {section for section, _ in OF_THE_DATA}
  if not isinstance(saved, dict) or "init_from" not in saved:
    return False
  return all(isinstance(saved.get(section), dict) for section in sections)


def _forget(workdir: Path) -> None:
  """Removes what a run left that never saved a checkpoint, and that had another config."""
  for name in ("tokenizer", "profile"):
    shutil.rmtree(workdir / name, ignore_errors=True)
  for pattern in ("config.json", "metrics.jsonl", "events.*", "curves.png"):
    for file in workdir.glob(pattern):
      file.unlink()
