"""What the parameters of a model that is read are to be: dtype, shapes and places."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from model import hf, sharding
from model.config import PARAM_DTYPES, ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.hf.source import Source
from model.layers import param_info
from model.peft.attach import attached
from model.trained import Model


def check_dtype(dtype: str | None) -> None:
  """Refuses a `dtype` that is not known, or that this process cannot hold.

  Raises:
    InputError: then.
  """
  if dtype is not None and dtype not in PARAM_DTYPES:
    raise InputError(f"dtype={dtype!r} is not known: use one of {', '.join(PARAM_DTYPES)}.")
  if dtype == "float64" and not jax.config.read("jax_enable_x64"):
    raise InputError(
      "dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment, or ask for "
      "another dtype."
    )


def config_here(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """A config as a loaded model has it: of one dtype, and with nothing that only training needs.

  Raises:
    InputError: for a dtype that this process cannot hold.
  """
  check_dtype(dtype)
  return dataclasses.replace(
    cfg, dtype=dtype, param_dtype=dtype, remat="none", attention_kernel="auto"
  )


def info(cfg: ModelConfig) -> dict:
  """`layers.param_info` of the parameters of such a model."""
  return param_info(abstract(cfg))


def wanted(cfg: ModelConfig, mesh: jax.sharding.Mesh | None, adapters: dict | None = None) -> dict:
  """Shapes, dtypes and shardings of the parameters, and of adapters of the given shapes.

  Args:
    mesh: where they go; None: JAX's default device.
  """
  net = attached(abstract(cfg), adapters or {})
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: here, shapes)
  else:
    axes = jax.tree.map(lambda i: i.axes, param_info(net))
    where = sharding.shardings(shapes, axes, mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  return jax.tree.map(place, shapes, where)


def host_device() -> Any:
  """Whose memory takes what is not to be on an accelerator, where JAX has been given it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


def model_of(source: hf.Folder | Source, cfg: ModelConfig, params: dict) -> Model:
  """The model that a source tells of, with its parameters."""
  return Model(
    cfg, params, source.tokenizer, source.labels, source.family, source.end_ids, source.text_limit
  )
