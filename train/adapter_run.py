"""Runs that train a part of a model, or an adapter beside it: where the rest comes from."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from model.checkpoint import Checkpoints, describe
from model.errors import InputError
from model.fingerprint import fingerprints
from model.hf import is_folder
from model.peft.attach import apart, of_adapter, together
from model.peft.base import hash_of, pinned
from train.config import Config
from train.data.pipeline import Data
from train.init_from import initial_params
from train.objectives import make_objective
from train.program import Program
from train.step import TrainState
from train.workdir import check_same_data, read_config


def with_pinned_base(config: Config, workdir: Path) -> Config:
  """The config with `init_from` as a path that means the same base whenever the run goes on.

  Raises:
    InputError: if there is none, or it is a run of an adapter itself.
  """
  if config.peft.trains_all or config.init_from is None:
    return config
  saved = (read_config(workdir) or {}).get("init_from")
  given = config.init_from.removesuffix("@best")
  if saved is not None and saved.startswith(f"{Path(given).expanduser().resolve()}/checkpoints/"):
    return dataclasses.replace(config, init_from=saved)
  path = pinned(config.init_from)
  if not is_folder(path) and "base" in describe(path).meta:
    raise InputError(
      f"init_from={config.init_from!r} holds an adapter, which another one cannot be trained on: "
      "save what model.load gives, merged, and begin from that."
    )
  return dataclasses.replace(config, init_from=path)


def about_base(config: Config) -> dict[str, Any]:
  """What a checkpoint says of the base of its run; {} of a run that trains all."""
  if config.peft.trains_all or config.init_from is None:
    return {}
  return {"base": {"path": config.init_from, "hash": _hash(config.init_from)}}


_hash = functools.cache(hash_of)


def first_state(config: Config, program: Program, data: Data) -> TrainState:
  """The state before the first step: the base, and new adapters.

  Raises:
    InputError: if something that stays frozen is not in the base.
  """
  return program.begin(_base(config, program, data))


def restored_state(
  config: Config, program: Program, checkpoints: Checkpoints, data: Data
) -> tuple[TrainState, int] | None:
  """The newest good state of the workdir with its base, and its step; None where none was saved.

  Raises:
    InputError: if the base, corpus or tokenizer is not that of the run.
  """
  restored = checkpoints.restore_latest(without_base(program.state))
  if restored is None:
    return None
  check_same_data(restored.meta["data"], data.fingerprint)
  told = restored.meta["base"]
  if told["hash"] != about_base(config)["base"]["hash"]:
    raise InputError(
      f"init_from={config.init_from!r} holds other weights than when the run began, "
      f"{told['path']}: restore them, or use another workdir."
    )
  return _with_base(restored.state, _base(config, program, data), program), restored.step


def without_base(state: TrainState) -> TrainState:
  """What a checkpoint holds of the state of such a run; `state` may be abstract."""
  return dataclasses.replace(state, frozen=apart(state.frozen)[1])


def _with_base(state: TrainState, base: dict, program: Program) -> TrainState:
  parts = program.parts
  if parts is None:
    return state
  frozen = apart(program.state.frozen)[0]
  where = jax.tree.map(lambda a: a.sharding, frozen)
  rest = parts.consuming(lambda base: parts.split(base)[1], out_shardings=where)(base)
  return dataclasses.replace(state, frozen=together(rest, state.frozen))


def _base(config: Config, program: Program, data: Data) -> dict:
  """Parameters without adapters: from `init_from`, but for a head that is new and trained."""
  read = initial_params(config, {}, program.base, data)
  new = program.base.keys() - read.keys()
  if not new:
    return read
  rows: Any = program.parts.rows if program.parts is not None else {}
  still = [path for path, trained in rows.items()
           if path[0] in new and trained is not None and not of_adapter(path)]  # fmt: skip
  if still:
    name = ".".join(map(str, still[0]))
    raise InputError(
      f"{name} is not in init_from={config.init_from!r}, and peft.method={config.peft.method!r} "
      f"would leave it as it is drawn: {_way_out(config, still[0][0])}, or take another base."
    )
  return read | _fresh(config, program, new)


def _way_out(config: Config, part: str | int) -> str:
  """How a part of the network is trained, too."""
  if config.peft.method == "full" and not config.peft.targets:
    return f"leave {part!r} out of peft.freeze"
  return f"name {part!r} in peft.{'targets' if config.peft.method == 'full' else 'also'}"


def _fresh(config: Config, program: Program, names: set[str]) -> dict:
  objective = make_objective(config)

  def make() -> dict:
    net = objective.build(config.model, nnx.Rngs(params=jax.random.key(config.seed)))
    made = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    return {name: made[name] for name in names}

  where = {name: jax.tree.map(lambda a: a.sharding, program.base[name]) for name in names}
  return jax.jit(make, out_shardings=where)()


class FirstUpdate:
  """Sees to it that the first update of an adapter changes it."""

  def __init__(self, config: Config, state: TrainState):
    self._before = None if config.peft.trains_all else _prints(state)

  def check(self, state: TrainState, metrics: dict[str, Any]) -> None:
    """Compares once, behind the first step that was to change something.

    Raises:
      InputError: if it changed nothing.
    """
    if self._before is None:
      return
    told = jax.device_get({k: metrics[k] for k in ("learning_rate", "bad_steps", "skipped_steps")})
    if told["learning_rate"] == 0 or told["bad_steps"] or told["skipped_steps"]:
      return
    if self._before == _prints(state):
      raise InputError(
        "after the first update what is trained is as before it: it has no effect on the loss, or "
        f"optimizer.learning_rate={told['learning_rate']:g} is lost in rounding. Raise the rate, "
        "or change peft.targets."
      )
    self._before = None


def _prints(state: TrainState) -> list[str]:
  leaves: Any = flatten_dict(state.params)
  return fingerprints([leaves[path] for path in sorted(leaves, key=json.dumps)])
