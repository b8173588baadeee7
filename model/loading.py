"""Models from any checkpoint PATH."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from model import checkpoint, forms, hf, sharding, workdirs
from model.errors import InputError
from model.hf.source import Source
from model.peft import load as peft
from model.peft.named import named
from model.quant import Format
from model.quant_load import by_layer, main_format, read_params
from model.tokenizer_files import holds_tokenizer
from model.trained import Model


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
  forms.check_dtype(dtype)
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
  return workdirs.read(str(path), dtype, mesh, "ema" if ema else "params", format)


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
  forms.check_dtype(dtype)
  if not hf.is_folder(path):
    found, formats, adapters = workdirs.described(str(path), dtype)
    if adapters:
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
  cfg = forms.config_here(found.config, dtype or _stored(found))
  shapes: Any = flatten_dict(forms.wanted(cfg, None))
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
    with jax.set_mesh(sharding.make_mesh(devices=[forms.host_device()])):
      return leaf(path)

  return by_layer(alone)


def tokenizer_path(path: str | Path) -> Path | None:
  """Where the tokenizer of a checkpoint PATH lies: a folder, or a GGUF file; None: it has none."""
  if hf.is_folder(path):
    own = Path(path).expanduser()
    return own if own.is_file() or holds_tokenizer(own) else None
  folder = Path(checkpoint.resolve(path)[0]) / "tokenizer"
  return folder if folder.is_dir() else None


def _from_folder(
  path: str | Path, dtype: str | None, mesh: jax.sharding.Mesh | None, format: Format | None
) -> Model:
  source = hf.Folder(path)
  cfg = forms.config_here(source.config, dtype or _stored(source))
  if format is None:
    return forms.model_of(source, cfg, source.params(forms.wanted(cfg, mesh)))
  params = read_params(source.leaf, forms.wanted(cfg, mesh), forms.info(cfg), mesh, format)
  return forms.model_of(source, cfg, params)


def _stored(folder: hf.Folder) -> str:
  """The dtype that holds all tensors of a folder; where they differ, that is said."""
  kind = folder.config.param_dtype
  if len(folder.dtypes) > 1:
    kinds = " and ".join(map(str, folder.dtypes))
    logging.warning("the folder holds tensors in %s: all are taken as %s.", kinds, kind)
  return kind
