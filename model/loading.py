"""Models from any checkpoint PATH, and back to disk."""

import json
from pathlib import Path

import jax
from flax import nnx

from model import checkpoint, sharding
from model.config import PARAM_DTYPES, ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.tokenizer import Tokenizer
from model.trained import Model

__all__ = ["Model", "load", "save"]

FORMATS = ("orbax",)
TRAINED_BESIDE = ("generator",)  # Parameters that a checkpoint may hold and no model has.


def load(
  path: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None,
  ema: bool = False,
) -> Model:  # fmt: skip
  """The model at a checkpoint PATH: a workdir (newest good step), a step in it, `WORKDIR@best`.

  Args:
    dtype: of parameters and computation.
    mesh: where the parameters go, straight from disk; None: JAX's default device.
    ema: the moving average of the parameters instead of the parameters.

  Raises:
    InputError: if there is no such checkpoint, or it is damaged, or holds no average.
  """
  if dtype not in PARAM_DTYPES:
    raise InputError(f"dtype={dtype!r} is not known: use one of {', '.join(PARAM_DTYPES)}.")
  if dtype == "float64" and not jax.config.read("jax_enable_x64"):
    raise InputError("dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment.")
  found = checkpoint.describe(str(path))
  workdir = checkpoint.resolve(str(path))[0]
  here = dict(dtype=dtype, param_dtype=dtype, remat="none", attention_kernel="auto")
  cfg = ModelConfig.from_dict({**found.meta["config"]["model"], **here})
  params = _restore(str(path), cfg, mesh, "ema" if ema else "params")
  labels = found.meta["config"].get("data", {}).get("labels")
  tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
  return Model(cfg, params, tokenizer, None if labels is None else tuple(labels))


def _restore(path: str, cfg: ModelConfig, mesh: jax.sharding.Mesh | None, part: str) -> dict:
  net = abstract(cfg)
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if mesh is None:
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  else:
    info = param_info(net)
    where = sharding.shardings(shapes, jax.tree.map(lambda i: i.axes, info), mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  wanted = jax.tree.map(place, shapes, where)
  restored = checkpoint.restore_params(path, {part: wanted}, cast=True, leave_out=TRAINED_BESIDE)
  return restored.state[part]


def save(m: Model, folder: str | Path, *, format: str = "orbax") -> None:
  """Writes a model.

  Args:
    folder: a new or empty folder.
    format: `orbax`, a workdir with config.json, tokenizer/ and checkpoints/0.

  Raises:
    InputError: for an unknown format, or a folder that holds something.
  """
  if format not in FORMATS:
    raise InputError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}.")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} holds something already: name a new or empty folder.")
  folder.mkdir(parents=True, exist_ok=True)
  labels = None if m.labels is None else list(m.labels)
  meta = {"config": {"model": m.config.to_dict(), "data": {"labels": labels}}}
  (folder / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")
  if m.tokenizer is not None:
    m.tokenizer.save(folder / "tokenizer")
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(0, {"params": m.params}, meta, blocking=True)
  checkpoints.close()
