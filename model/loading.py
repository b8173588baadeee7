"""Models from any checkpoint PATH, and back to disk."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
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
from model.peft.attach import apart, attached, is_adapted, together
from model.peft.bottleneck import has_bottlenecks
from model.peft.named import named
from model.quant import Format
from model.quant_load import as_stored, by_layer, main_format, read_params
from model.quant_tree import quantized_leaves
from model.tokenizer import Tokenizer
from model.tokenizer_files import holds_tokenizer
from model.trained import TRAINED_BESIDE, Adapted, Model

__all__ = ["Model", "convert", "load", "save", "unused_folder"]

FORMATS = ("orbax", "hf", "peft")


def load(
  path: str | Path, *, dtype: str | None = "float32", mesh: jax.sharding.Mesh | None = None,
  quantize: str | None = None, adapter: str | Path | Mapping[str, str | Path] | None = None,
  base: str | Path | None = None, ema: bool = False,
) -> Model:  # fmt: skip
  """The model at a checkpoint PATH: a workdir (newest good step), a step in it, `WORKDIR@best`, or
  a Hugging Face folder, or a GGUF file. Of an adapter, a folder of PEFT's or the workdir of its
  run, the base with the adapter.

  Args:
    dtype: of parameters and computation; None: what they are stored in.
    mesh: where the parameters go, straight from disk; None: JAX's default device.
    quantize: the format of matrices in fewer bits, as `quant.Format` parses it: each is read and
      quantized for itself, so that the others are never held in float. `dtype` is then that of the
      other parameters, an adapter's with them, and of computation. None: as they are stored,
      quantized or not; of the base that an adapter at `path` names, as it was trained on.
    adapter: PATH of an adapter for the model; or several by name, {NAME: PATH, …}, of which each
      row of a batch may have its own: see `Model.using` and the setting `adapter` of
      `infer.generate`.
    base: PATH of the base of the adapter at `path`; None: the one that it names.
    ema: the moving average of the parameters instead of the parameters.

  Raises:
    InputError: if there is no such checkpoint, or it is damaged, holds no average, is quantized in
      another format than `quantize`, or is of a family of Hugging Face's that is not known here;
      for a format that is not known, or a group that does not divide.
  """
  _check_dtype(dtype)
  format = None if quantize is None else Format.parse(quantize)
  if adapter is not None or peft.is_adapter(path):
    how: Any = {"dtype": dtype, "mesh": mesh, "quantize": quantize}
    if isinstance(adapter, Mapping):
      return _with_several(path, adapter, base, ema=ema, **how)
    return _adapted(path, adapter, base, ema=ema, **how)
  if base is not None:
    raise InputError(f"base={str(base)!r}: {path} is no adapter, and needs none.")
  if hf.is_folder(path):
    if ema:
      raise InputError(f"ema=True: {path} is no workdir and holds no average.")
    return _from_folder(path, dtype, mesh, format)
  return _from_workdir(str(path), dtype, mesh, "ema" if ema else "params", format)


def _adapted(path: Any, adapter: Any, base: Any, *, ema: bool, **how: Any) -> Model:
  if adapter is None:
    how["quantize"] = how["quantize"] or peft.format_of(path)
    adapter, path = path, peft.base_of(path) if base is None else base
  else:
    _check_adapter(path, adapter, base)
  if peft.is_adapter(path):
    raise InputError(f"{path} is an adapter itself: name a base.")
  return peft.adapted(load(path, **how), adapter, str(path), ema=ema)


def _with_several(path: Any, paths: Mapping, base: Any, *, ema: bool, **how: Any) -> Model:
  """The base with adapters by name."""
  for one in paths.values():
    _check_adapter(path, one, base)
  if peft.is_adapter(path):
    raise InputError(f"{path} is an adapter itself: name a base.")
  m = load(path, **how)
  return named({n: peft.adapted(m, one, str(path), ema=ema) for n, one in paths.items()})


def _check_adapter(path: Any, adapter: Any, base: Any) -> None:
  if base is not None:
    raise InputError(
      f"base={str(base)!r} and adapter= were given: name the base as the checkpoint."
    )
  if not peft.is_adapter(adapter):
    raise InputError(
      f"adapter={str(adapter)!r} is no adapter: a PEFT folder or an adapter's workdir."
    )


def source(path: str | Path, *, dtype: str | None = None) -> Source:
  """What lies at a checkpoint PATH, of which parameters are read when they are asked for.

  Args:
    path, dtype: as `load` takes them.

  Raises:
    InputError: as `load` does.
  """
  _check_dtype(dtype)
  if not hf.is_folder(path):
    found, formats = _workdir(str(path), dtype)
    if _adapters(str(path)):
      raise InputError(
        f"{path} has bottleneck adapters, which nothing but the model that it holds can have: use "
        "the checkpoint of its base."
      )
    if formats:
      raise InputError(
        f"{path} is quantized ({main_format(formats.values())}), and training, or a folder of "
        "Hugging Face's, needs float matrices: use the checkpoint that it was made of."
      )
    return found
  found = hf.Folder(path)
  cfg = _here(found.config, dtype or _stored(found))
  shapes: Any = flatten_dict(_wanted(cfg, None))
  leaf = lambda path: found.leaf(path, shapes[path].dtype)
  told = (found.tokenizer, found.labels, found.family, found.end_ids, found.text_limit)
  return Source(cfg, leaf, *told)


def leaf_reader(path: str | Path) -> Callable[[tuple[str | int, ...], Any, int | None], np.ndarray]:
  """Reads parameters of a float checkpoint PATH in a dtype, whole or one layer of a stacked one,
  whatever mesh is in use.

  Raises:
    InputError: as `source` does.
  """
  if hf.is_folder(path):
    return hf.Folder(path).leaf
  leaf = source(path).leaf

  def alone(path: tuple[str | int, ...]) -> np.ndarray:
    with jax.set_mesh(sharding.make_mesh(devices=[_host()])):
      return leaf(path)

  return by_layer(alone)


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
    raise InputError(
      "dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment, or ask for "
      "another dtype."
    )


def _from_folder(
  path: str | Path, dtype: str | None, mesh: jax.sharding.Mesh | None, format: Format | None
) -> Model:
  source = hf.Folder(path)
  cfg = _here(source.config, dtype or _stored(source))
  if format is None:
    return _model(source, cfg, source.params(_wanted(cfg, mesh)))
  return _model(source, cfg, read_params(source.leaf, _wanted(cfg, mesh), _info(cfg), mesh, format))


def _stored(folder: hf.Folder) -> str:
  """The dtype that holds all tensors of a folder; where they differ, that is said."""
  kind = folder.config.param_dtype
  if len(folder.dtypes) > 1:
    kinds = " and ".join(map(str, folder.dtypes))
    logging.warning("the folder holds tensors in %s: all are taken as %s.", kinds, kind)
  return kind


def _model(source: hf.Folder | Source, cfg: ModelConfig, params: dict) -> Model:
  return Model(
    cfg, params, source.tokenizer, source.labels, source.family, source.end_ids, source.text_limit
  )


def _from_workdir(
  path: str, dtype: str | None, mesh: Any, part: str, format: Format | None
) -> Model:
  source, formats = _workdir(path, dtype if format is None else None, part)
  if formats and format is not None and format.name != (have := main_format(formats.values())):
    raise InputError(
      f"quantize={format.name!r}, and {path} is quantized already, in {have}: leave quantize out, "
      "or load the checkpoint that it was made of."
    )
  cfg = _here(source.config, dtype or source.config.param_dtype)
  own = apart(_wanted(cfg, mesh, _adapters(path, part)))[1]
  if format is not None and not formats:
    leaf = by_layer(source.leaf)
    params = read_params(leaf, _wanted(cfg, mesh), _info(cfg), mesh, format)
    if own:
      read = checkpoint.restore_params(path, {part: own}, cast=True, leave_out=None).state[part]
      params = together(params, read)
  else:
    base = as_stored(_wanted(cfg, mesh), _info(cfg), formats, mesh)
    wanted = {part: together(base, own)}
    params = checkpoint.restore_params(path, wanted, cast=True, leave_out=TRAINED_BESIDE).state[
      part
    ]
  m = _model(source, cfg, params)
  return dataclasses.replace(m, adapted=Adapted(None, False)) if own else m


def _adapters(path: str, part: str = "params") -> dict:
  """Shapes of the adapters that a workdir holds together with their base; {} for none."""
  workdir, step = checkpoint.resolve(path)
  return apart(checkpoint.describe(workdir / "checkpoints" / str(step)).state.get(part, {}))[1]


def _workdir(path: str, dtype: str | None, part: str = "params") -> tuple[Source, dict[str, str]]:
  """(what a workdir holds, whose parameters are read when they are asked for; the formats of those
  that are quantized).
  """
  workdir, step = checkpoint.resolve(path)
  folder = workdir / "checkpoints" / str(step)
  found = checkpoint.describe(folder)
  if "base" in found.meta:
    raise InputError(f"{path} is an adapter: load it with its base, and save what is merged.")
  config = found.meta["config"]
  formats = config.get("quantized", {})
  table = found.state.get(part, found.state["params"])["embed"]["table"]
  stored = config["model"]["param_dtype"] if formats else table.dtype.name
  cfg = _here(ModelConfig.from_dict(config["model"]), dtype or stored)
  labels = config.get("data", {}).get("labels")
  texts = tokenizer_path(str(folder))
  tokenizer = None if texts is None else Tokenizer.load(texts)
  shapes: Any = flatten_dict(_wanted(cfg, None))
  host = jax.sharding.SingleDeviceSharding(_host())

  def leaf(path: tuple[str | int, ...]) -> np.ndarray:
    like = jax.ShapeDtypeStruct(shapes[path].shape, shapes[path].dtype, sharding=host)
    one = {part: unflatten_dict({path: like})}
    state = checkpoint.restore_params(folder, one, cast=True, leave_out=None).state
    return np.asarray(jax.tree.leaves(state)[0])

  labels = None if labels is None else tuple(labels)
  ends = tuple(config.get("end_ids", ()))
  limit = config.get("text_limit")
  return Source(cfg, leaf, tokenizer, labels, config.get("family"), ends, limit), formats


def _here(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """A config as a loaded model has it: of one dtype, and with nothing that only training needs.

  Raises:
    InputError: for a dtype that this process cannot hold.
  """
  _check_dtype(dtype)
  return dataclasses.replace(
    cfg, dtype=dtype, param_dtype=dtype, remat="none", attention_kernel="auto"
  )


def _info(cfg: ModelConfig) -> dict:
  return param_info(abstract(cfg))


def _wanted(cfg: ModelConfig, mesh: jax.sharding.Mesh | None, adapters: dict | None = None) -> dict:
  """Shapes, dtypes and shardings of the parameters, and of adapters of the given shapes."""
  net = attached(abstract(cfg), adapters or {})
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: here, shapes)
  else:
    info = param_info(net)
    where = sharding.shardings(shapes, jax.tree.map(lambda i: i.axes, info), mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  return jax.tree.map(place, shapes, where)


def _host() -> Any:
  """Whose memory takes what is not to be on an accelerator, where JAX has been given it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


def save(m: Model, folder: str | Path, *, format: str = "orbax", family: str | None = None) -> None:
  """Writes a model.

  Args:
    folder: a new or empty folder.
    format: `orbax`, a workdir with config.json, tokenizer/ and checkpoints/0, and the only one that
      holds bottleneck adapters, with their base; `hf`, a folder that
      Transformers reads, which has no quantized matrices: written in float again, it would pass for
      the model that they were made of; `peft`, the adapter alone as torch PEFT reads it, whatever
      its base is kept in.
    family: `model_type` of such a folder; None: what it came from, or the first that fits.

  Raises:
    InputError: for an unknown format, a folder that holds something, or a model that is quantized
      or of no family of Hugging Face's, where it goes there.
  """
  if m.adapters:
    raise InputError(
      f"the model has several adapters ({', '.join(m.adapters)}): load it with one of them, and "
      "save that."
    )
  if has_bottlenecks(m.params):
    if format == "hf":
      raise InputError(
        "the model has bottleneck adapters, which folders of Hugging Face's have no place for: use "
        "format='orbax'."
      )
  elif is_adapted(m.params) and format in ("orbax", "hf"):
    raise InputError(
      f"the model has an adapter, and format={format!r} holds whole models: save m.merged() of a "
      "float base, or the adapter with format='peft'."
    )
  kept = {".".join(map(str, k)): w.format.name for k, w in quantized_leaves(m.params).items()}
  if kept and format == "hf":
    raise InputError(
      f"format='hf': this model is quantized ({main_format(kept.values())}), and a folder of "
      "Hugging Face's holds float matrices: save the model that it was made of, or use "
      "format='orbax'."
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
  config |= {"quantized": kept} if kept else {}
  meta = {"config": config}
  (folder / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")
  if m.tokenizer is not None:
    m.tokenizer.save(folder / "tokenizer")
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(0, {"params": m.params}, meta, blocking=True)
  checkpoints.close()


def convert(
  path: str | Path, folder: str | Path, *, format: str, dtype: str | None = None,
  family: str | None = None, adapter: str | Path | None = None, quantize: str | None = None,
) -> ModelConfig:  # fmt: skip
  """Writes what lies at a checkpoint PATH in another form; returns its config.

  Towards `hf` one parameter after the other is read and written, so that little memory is needed;
  towards `orbax` the model is held once. An adapter is merged.

  Args:
    path, dtype, adapter, quantize: as `load` takes them; dtype None: what it is stored in.
    folder, format, family: as `save` takes them.

  Raises:
    InputError: as `load` and `save` do.
  """
  if format == "peft":
    raise InputError("format='peft' holds adapters, and whole models are converted.")
  if quantize is not None and format == "hf":
    raise InputError(f"quantize={quantize!r}: folders of Hugging Face's hold float matrices.")
  if format == "orbax" or adapter is not None or peft.is_adapter(path):
    m = load(path, dtype=dtype, adapter=adapter, quantize=quantize)
    m = m.merged() if is_adapted(m.params) and not has_bottlenecks(m.params) else m
    save(m, folder, format=format, family=family)
    return m.config
  found = source(path, dtype=dtype)
  hf.save(found, _new(folder, format), family=family)
  return found.config


def _new(folder: str | Path, format: str) -> Path:
  """The folder, made if it is not there."""
  if format not in FORMATS:
    raise InputError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}.")
  folder = unused_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def unused_folder(path: str | Path) -> Path:
  """The path of a folder that is to be written, with the home folder in place of a tilde.

  Raises:
    InputError: if something is there that is no empty folder.
  """
  folder = Path(path).expanduser()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} holds something already: name a new or empty folder.")
  return folder
