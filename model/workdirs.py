"""Models from workdirs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from model import checkpoint, forms
from model.config import ModelConfig
from model.errors import InputError
from model.hf.source import Source
from model.peft.attach import apart, together
from model.quant import Format
from model.quant_load import as_stored, by_layer, main_format, read_params
from model.tokenizer import Tokenizer
from model.trained import TRAINED_BESIDE, Adapted, Model


def read(
  path: str, dtype: str | None, mesh: jax.sharding.Mesh | None, part: str, format: Format | None
) -> Model:
  """The model in a workdir.

  Args:
    path, dtype, mesh: as `model.load` takes them.
    part: of the state, whose parameters are taken: `params`, or `ema`, their moving average.
    format: to quantize matrices to; None: as they are stored.

  Raises:
    InputError: as `model.load` does.
  """
  source, formats, adapters = described(path, dtype if format is None else None, part)
  if formats and format is not None and format.name != (have := main_format(formats.values())):
    raise InputError(
      f"quantize={format.name!r}, and {path} is quantized already, in {have}: leave quantize out, "
      "or load the checkpoint that it was made of."
    )
  cfg = forms.config_here(source.config, dtype or source.config.param_dtype)
  own = apart(forms.wanted(cfg, mesh, adapters))[1]
  if format is not None and not formats:
    leaf = by_layer(source.leaf)
    params = read_params(leaf, forms.wanted(cfg, mesh), forms.info(cfg), mesh, format)
    if own:
      read = checkpoint.restore_params(path, {part: own}, cast=True, leave_out=None).state[part]
      params = together(params, read)
  else:
    base = as_stored(forms.wanted(cfg, mesh), forms.info(cfg), formats, mesh)
    wanted = {part: together(base, own)}
    params = checkpoint.restore_params(path, wanted, cast=True, leave_out=TRAINED_BESIDE).state[
      part
    ]
  m = forms.model_of(source, cfg, params)
  return dataclasses.replace(m, adapted=Adapted(None, False)) if own else m


def described(
  path: str, dtype: str | None, part: str = "params"
) -> tuple[Source, dict[str, str], dict]:
  """(what a workdir holds, whose parameters are read when they are asked for; the formats of those
  that are quantized; shapes of the adapters that lie beside them, {} for none).

  Raises:
    InputError: if there is none, or it holds an adapter alone.
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
  cfg = forms.config_here(ModelConfig.from_dict(config["model"]), dtype or stored)
  labels = config.get("data", {}).get("labels")
  texts = Path(workdir) / "tokenizer"
  tokenizer = Tokenizer.load(texts) if texts.is_dir() else None
  shapes: Any = flatten_dict(forms.wanted(cfg, None))
  host = jax.sharding.SingleDeviceSharding(forms.host_device())

  def leaf(path: tuple[str | int, ...]) -> np.ndarray:
    like = jax.ShapeDtypeStruct(shapes[path].shape, shapes[path].dtype, sharding=host)
    one = {part: unflatten_dict({path: like})}
    state = checkpoint.restore_params(folder, one, cast=True, leave_out=None).state
    return np.asarray(jax.tree.leaves(state)[0])

  labels = None if labels is None else tuple(labels)
  ends = tuple(config.get("end_ids", ()))
  limit = config.get("text_limit")
  source = Source(cfg, leaf, tokenizer, labels, config.get("family"), ends, limit)
  return source, formats, apart(found.state.get(part, {}))[1]
