"""Models from any checkpoint PATH, and back to disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model import checkpoint, hf, sharding
from model.config import PARAM_DTYPES, ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.hf.source import Source
from model.layers import param_info
from model.peft import load as peft
from model.peft import write
from model.peft.attach import is_adapted
from model.tokenizer import Tokenizer
from model.tokenizer_files import holds_tokenizer
from model.trained import Model

__all__ = ["Model", "convert", "load", "save"]

FORMATS = ("orbax", "hf", "peft")
TRAINED_BESIDE = ("generator",)  # Parameters that a checkpoint may hold and no model has.


def load(
  path: str | Path, *, dtype: str | None = "float32", mesh: jax.sharding.Mesh | None = None,
  adapter: str | Path | None = None, base: str | Path | None = None, ema: bool = False,
) -> Model:  # fmt: skip
  """The model at a checkpoint PATH: a workdir (newest good step), a step in it, `WORKDIR@best`, or
  a Hugging Face folder, or a GGUF file. Of an adapter, a folder of PEFT's or the workdir of its
  run, the base with the adapter.

  Args:
    dtype: of parameters and computation; None: what they are stored in.
    mesh: where the parameters go, straight from disk; None: JAX's default device.
    adapter: PATH of an adapter for the model.
    base: PATH of the base of the adapter at `path`; None: the one that it names.
    ema: the moving average of the parameters instead of the parameters.

  Raises:
    InputError: if there is no such checkpoint, or it is damaged, holds no average, or is of a
      family of Hugging Face's that is not known here.
  """
  _check_dtype(dtype)
  if adapter is not None or peft.is_adapter(path):
    return _adapted(path, adapter, base, dtype=dtype, mesh=mesh, ema=ema)
  if base is not None:
    raise InputError(f"base={str(base)!r}: {path} is no adapter, and needs none.")
  if hf.is_folder(path):
    if ema:
      raise InputError(f"ema=True: {path} is no workdir and holds no average.")
    return _from_folder(path, dtype, mesh)
  return _from_workdir(str(path), dtype, mesh, "ema" if ema else "params")


def _adapted(path: Any, adapter: Any, base: Any, *, ema: bool, **how: Any) -> Model:
  if adapter is None:
    adapter, path = path, peft.base_of(path) if base is None else base
  elif base is not None:
    raise InputError(
      f"base={str(base)!r} and adapter= were given: name the base as the checkpoint."
    )
  elif not peft.is_adapter(adapter):
    raise InputError(
      f"adapter={str(adapter)!r} is no adapter: a PEFT folder or an adapter's workdir."
    )
  if peft.is_adapter(path):
    raise InputError(f"{path} is an adapter itself: name a base.")
  return peft.adapted(load(path, **how), adapter, str(path), ema=ema)


def source(path: str | Path, *, dtype: str | None = None) -> Source:
  """What lies at a checkpoint PATH, of which parameters are read when they are asked for.

  Args:
    path, dtype: as `load` takes them.

  Raises:
    InputError: as `load` does.
  """
  _check_dtype(dtype)
  if not hf.is_folder(path):
    return _workdir(str(path), dtype)
  found = hf.Folder(path)
  cfg = _here(found.config, dtype or found.config.param_dtype)
  shapes: Any = flatten_dict(_wanted(cfg, None))
  leaf = lambda path: found.leaf(path, shapes[path].dtype)
  told = (found.tokenizer, found.labels, found.family, found.end_ids, found.text_limit)
  return Source(cfg, leaf, *told)


def tokenizer_path(path: str | Path) -> Path | None:
  """Where the tokenizer of a checkpoint PATH lies: a folder, or a GGUF file; None: it has none."""
  if hf.is_folder(path):
    own = Path(path).expanduser()
    return own if own.is_file() or holds_tokenizer(own) else None
  folder = Path(checkpoint.resolve(path)[0]) / "tokenizer"
  return folder if folder.is_dir() else None


def _check_dtype(dtype: str | None) -> None:
  if dtype is not None and dtype not in PARAM_DTYPES:
    raise InputError(f"dtype={dtype!r} is not known: use one of {', '.join(PARAM_DTYPES)}.")
  if dtype == "float64" and not jax.config.read("jax_enable_x64"):
    raise InputError("dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment.")


def _from_folder(path: str | Path, dtype: str | None, mesh: jax.sharding.Mesh | None) -> Model:
  source = hf.Folder(path)
  cfg = _here(source.config, dtype or source.config.param_dtype)
  return _model(source, cfg, source.params(_wanted(cfg, mesh)))


def _model(source: hf.Folder | Source, cfg: ModelConfig, params: dict) -> Model:
  return Model(
    cfg, params, source.tokenizer, source.labels, source.family, source.end_ids, source.text_limit
  )


def _from_workdir(path: str, dtype: str | None, mesh: Any, part: str) -> Model:
  source = _workdir(path, dtype)
  wanted = {part: _wanted(source.config, mesh)}
  state = checkpoint.restore_params(path, wanted, cast=True, leave_out=TRAINED_BESIDE).state
  return _model(source, source.config, state[part])


def _workdir(path: str, dtype: str | None) -> Source:
  """What a workdir holds; its parameters are read when they are asked for."""
  workdir, step = checkpoint.resolve(path)
  folder = workdir / "checkpoints" / str(step)
  found = checkpoint.describe(folder)
  if "base" in found.meta:
    raise InputError(f"{path} is an adapter: load it with its base, and save what is merged.")
  config = found.meta["config"]
  stored = found.state["params"]["embed"]["table"].dtype.name
  cfg = _here(ModelConfig.from_dict(config["model"]), dtype or stored)
  labels = config.get("data", {}).get("labels")
  texts = tokenizer_path(str(folder))
  tokenizer = None if texts is None else Tokenizer.load(texts)
  shapes: Any = flatten_dict(_wanted(cfg, None))

  def leaf(path: tuple[str | int, ...]) -> np.ndarray:
    one = {"params": unflatten_dict({path: shapes[path]})}
    state = checkpoint.restore_params(folder, one, cast=True, leave_out=None).state
    return np.asarray(jax.tree.leaves(state)[0])

  labels = None if labels is None else tuple(labels)
  ends = tuple(config.get("end_ids", ()))
  limit = config.get("text_limit")
  return Source(cfg, leaf, tokenizer, labels, config.get("family"), ends, limit)


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
      Transformers reads; `peft`, the adapter alone as torch PEFT reads it.
    family: `model_type` of such a folder; None: what it came from, or the first that fits.

  Raises:
    InputError: for an unknown format, a folder that holds something, or a model of no family of
      Hugging Face's.
  """
  if is_adapted(m.params) and format in ("orbax", "hf"):
    raise InputError(
      f"the model has an adapter, and format={format!r} holds whole models: save m.merged(), or "
      "the adapter with format='peft'."
    )
  folder = _new(folder, format)
  if format == "peft":
    write.save(m, folder)
    return
  if format == "hf":
    leaves: Any = flatten_dict(m.params)
    kind = next(iter(leaves.values())).dtype.name
    cfg = dataclasses.replace(m.config, param_dtype=kind)
    leaf = lambda path: np.asarray(leaves[path])
    told = (m.tokenizer, m.labels, m.family, m.end_ids, m.text_limit)
    hf.save(Source(cfg, leaf, *told), folder, family=family)
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


def convert(
  path: str | Path, folder: str | Path, *, format: str, dtype: str | None = None,
  family: str | None = None,
) -> ModelConfig:  # fmt: skip
  """Writes what lies at a checkpoint PATH in another form; returns its config.

  Towards `hf` one parameter after the other is read and written, so that little memory is needed;
  towards `orbax` the model is held once.

  Args:
    path, dtype: as `load` takes them; None: the dtype that it is stored in.
    folder, format, family: as `save` takes them.

  Raises:
    InputError: as `load` and `save` do.
  """
  if format == "peft":
    raise InputError("format='peft' holds adapters, and whole models are converted.")
  if format == "orbax" or peft.is_adapter(path):
    m = load(path, dtype=dtype)
    m = m.merged() if is_adapted(m.params) else m
    save(m, folder, format=format, family=family)
    return m.config
  found = source(path, dtype=dtype)
  hf.save(found, _new(folder, format), family=family)
  return found.config


def _new(folder: str | Path, format: str) -> Path:
  """The folder, made if it is not there."""
  if format not in FORMATS:
    raise InputError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}.")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} holds something already: name a new or empty folder.")
  folder.mkdir(parents=True, exist_ok=True)
  return folder
