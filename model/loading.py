"""Models from any checkpoint PATH, and back to disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from model import checkpoint, hf, sharding
from model.config import PARAM_DTYPES, ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.tokenizer import Tokenizer
from model.trained import Model

__all__ = ["Model", "load", "save"]

FORMATS = ("orbax", "hf")
TRAINED_BESIDE = ("generator",)  # Parameters that a checkpoint may hold and no model has.


def load(
  path: str | Path, *, dtype: str | None = "float32", mesh: jax.sharding.Mesh | None = None,
  ema: bool = False,
) -> Model:  # fmt: skip
  """The model at a checkpoint PATH: a workdir (newest good step), a step in it, `WORKDIR@best`, or
  a Hugging Face folder.

  Args:
    dtype: of parameters and computation; None: what they are stored in.
    mesh: where the parameters go, straight from disk; None: JAX's default device.
    ema: the moving average of the parameters instead of the parameters.

  Raises:
    InputError: if there is no such checkpoint, or it is damaged, holds no average, or is of a
      family of Hugging Face's that is not known here.
  """
  if dtype is not None and dtype not in PARAM_DTYPES:
    raise InputError(f"dtype={dtype!r} is not known: use one of {', '.join(PARAM_DTYPES)}.")
  if dtype == "float64" and not jax.config.read("jax_enable_x64"):
    raise InputError("dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment.")
  if hf.is_folder(path):
    if ema:
      raise InputError(f"ema=True: {path} is a Hugging Face folder and holds no average.")
    return _from_folder(path, dtype, mesh)
  return _from_workdir(str(path), dtype, mesh, "ema" if ema else "params")


def _from_folder(path: str | Path, dtype: str | None, mesh: jax.sharding.Mesh | None) -> Model:
  source = hf.Folder(path)
  cfg = _here(source.config, dtype or source.config.param_dtype)
  tokenizer = None if source.tokenizer is None else Tokenizer.load(source.tokenizer)
  params = source.params(_wanted(cfg, mesh))
  return Model(
    cfg, params, tokenizer, source.labels, source.family, source.end_ids, source.text_limit
  )


def _from_workdir(path: str, dtype: str | None, mesh: Any, part: str) -> Model:
  found = checkpoint.describe(path)
  folder = Path(checkpoint.resolve(path)[0]) / "tokenizer"
  config = found.meta["config"]
  stored = found.state["params"]["embed"]["table"].dtype.name
  cfg = _here(ModelConfig.from_dict(config["model"]), dtype or stored)
  wanted = {part: _wanted(cfg, mesh)}
  state = checkpoint.restore_params(path, wanted, cast=True, leave_out=TRAINED_BESIDE).state
  labels = config.get("data", {}).get("labels")
  tokenizer = Tokenizer.load(folder) if folder.is_dir() else None
  labels = None if labels is None else tuple(labels)
  ends = tuple(config.get("end_ids", ()))
  return Model(
    cfg, state[part], tokenizer, labels, config.get("family"), ends, config.get("text_limit")
  )


def _here(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """A config as a loaded model has it: of one dtype, and with nothing that only training needs."""
  return dataclasses.replace(
    cfg, dtype=dtype, param_dtype=dtype, remat="none", attention_kernel="auto"
  )


def _wanted(cfg: ModelConfig, mesh: jax.sharding.Mesh | None) -> dict:
  """Shapes, dtypes and shardings of the parameters."""
  net = abstract(cfg)
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if mesh is None:
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  else:
    info = param_info(net)
    where = sharding.shardings(shapes, jax.tree.map(lambda i: i.axes, info), mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  return jax.tree.map(place, shapes, where)


def save(m: Model, folder: str | Path, *, format: str = "orbax", family: str | None = None) -> None:
  """Writes a model.

  Args:
    folder: a new or empty folder.
    format: `orbax`, a workdir with config.json, tokenizer/ and checkpoints/0; `hf`, a folder that
      Transformers reads.
    family: `model_type` of such a folder; None: what it came from, or the first that fits.

  Raises:
    InputError: for an unknown format, a folder that holds something, or a model of no family of
      Hugging Face's.
  """
  if format not in FORMATS:
    raise InputError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}.")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} holds something already: name a new or empty folder.")
  folder.mkdir(parents=True, exist_ok=True)
  if format == "hf":
    hf.save(m, folder, family=family or m.family)
    return
  labels = None if m.labels is None else list(m.labels)
  config = {"model": m.config.to_dict(), "data": {"labels": labels}, "family": m.family,
            "end_ids": list(m.end_ids), "text_limit": m.text_limit}  # fmt: skip
  meta = {"config": config}
  (folder / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")
  if m.tokenizer is not None:
    m.tokenizer.save(folder / "tokenizer")
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(0, {"params": m.params}, meta, blocking=True)
  checkpoints.close()
