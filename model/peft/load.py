"""Models with adapters: from a folder of PEFT's or the workdir of an adapter's run, and a base."""

import dataclasses
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model import checkpoint, hf, sharding
from model.architecture import EXECUTION_FIELDS
from model.config import ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.peft import files
from model.peft.attach import apart, attached, together
from model.peft.base import check_same, pinned
from model.peft.config import PeftConfig, from_dict
from model.peft.create import adapter_maker
from model.peft.names import Path
from model.peft.parts import Parts, parts_of
from model.peft.written import written_out
from model.quant import Quantized
from model.tokenizer import Tokenizer
from model.trained import TRAINED_BESIDE, Adapted, Model


def is_adapter(path: str | File) -> bool:
  """Whether a PATH is a folder of PEFT's, or a workdir or step of an adapter's run."""
  if files.is_folder(path):
    return True
  if hf.is_folder(path):
    return False
  try:
    return "base" in checkpoint.describe(str(path)).meta
  except InputError:
    return False


def base_of(path: str | File) -> str:
  """The PATH of the base that an adapter names.

  Raises:
    InputError: if it is not there.
  """
  if files.is_folder(path):
    return files.base_of(path)
  named = checkpoint.describe(str(path)).meta["base"]["path"]
  if not File(named).exists():
    raise InputError(
      f"{path} is an adapter of {named}, which is not there: name it with base= (of commands "
      f"--checkpoint=BASE --adapter={path})."
    )
  return named


def format_of(path: str | File) -> str | None:
  """The format that an adapter's base was kept in while it was trained; None: in float, or it does
  not say.
  """
  if files.is_folder(path):
    return None
  return checkpoint.describe(str(path)).meta["config"]["peft"].get("base_format")


def adapted(m: Model, path: str | File, base: str, *, ema: bool) -> Model:
  """`m`, which was loaded from `base`, with the adapter at `path`.

  Args:
    ema: the moving average of what was trained.

  Raises:
    InputError: if the adapter does not belong to it.
  """
  if not files.is_folder(path):
    return _of_run(m, str(path), base, "ema" if ema else "params")
  if ema:
    raise InputError(f"ema=True: {path} is no workdir and holds no average.")
  return files.with_adapter(m, path, base=pinned(base))


def _of_run(m: Model, path: str, base: str, part: str) -> Model:
  """The base with what a run has trained."""
  workdir, step = checkpoint.resolve(path)
  folder = workdir / "checkpoints" / str(step)
  meta = checkpoint.describe(folder).meta
  if "base" not in meta:
    raise InputError(f"adapter={path!r} is the run of a whole model: load it as the checkpoint.")
  base = pinned(base)
  check_same(base, meta["base"], path)
  saved, peft = ModelConfig.from_dict(meta["config"]["model"]), from_dict(meta["config"]["peft"])
  cfg = dataclasses.replace(saved, **{name: getattr(m.config, name) for name in EXECUTION_FIELDS})
  net, parts = _described(_of_model(peft), cfg)
  shapes: Any = flatten_dict(nnx.to_pure_dict(nnx.state(abstract(cfg), nnx.Param)))
  leaves: Any = flatten_dict(m.params)
  there = {path: leaves[path] for path in shapes if path in leaves and parts.rows[path] is not None}
  _check_base(shapes, there, parts, path)
  there |= _in_float(there, parts, net, base, m)
  rest = parts.split(unflatten_dict(there))[1]
  wanted = _wanted(net, parts, m)
  own = {part: wanted[0], "frozen": wanted[1]}
  read = checkpoint.restore_params(folder, own, cast=True, leave_out=TRAINED_BESIDE).state
  params = written_out(parts.join(read[part], together(rest, read["frozen"])), cfg)
  labels = meta["config"].get("data", {}).get("labels")
  texts = File(str(workdir)) / "tokenizer"
  whole = tuple(path for path, rows in parts.rows.items() if rows != () and path in shapes)
  return dataclasses.replace(
    m, config=cfg, params=params, labels=m.labels if labels is None else tuple(labels),
    tokenizer=Tokenizer.load(texts) if texts.is_dir() else m.tokenizer,
    adapted=Adapted(base, peft.rslora, whole, meta["base"]["hash"]),
  )  # fmt: skip


def _of_model(peft: PeftConfig) -> PeftConfig:
  """The config without patterns for what is trained beside a model."""
  kept = lambda patterns: tuple(p for p in patterns if p.split(".")[0] not in TRAINED_BESIDE)
  fields = ("targets", "freeze", "also", "ranks", "alphas")
  own = {n: kept(value) for n in fields if (value := getattr(peft, n)) is not None}
  return dataclasses.replace(peft, **own)


def _described(peft: PeftConfig, cfg: ModelConfig) -> tuple[nnx.Module, Parts]:
  """The network of a run with its adapters, abstract, and what of it was trained."""
  net = abstract(cfg)
  plain = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if peft.adds:
    make = adapter_maker(peft, cfg, net)
    net = attached(net, jax.eval_shape(make, plain, jax.random.key(0)))
  return net, parts_of(peft, cfg, net)


def _check_base(shapes: dict, there: dict, parts: Parts, path: str) -> None:
  wrong = [
    p for p, like in shapes.items()
    if parts.rows[p] is not None and (p not in there or there[p].shape != like.shape)
  ]  # fmt: skip
  if wrong:
    name = ".".join(map(str, wrong[0]))
    raise InputError(
      f"the base has no {name} as the adapter in {path} needs it: is it the right one?"
    )


def _in_float(there: dict, parts: Parts, net: nnx.Module, base: str, m: Model) -> dict[Path, Any]:
  """Quantized matrices of the base of which some layers were trained, as training keeps them."""
  from model.loading import leaf_reader  # It loads adapters.

  cut = [p for p, weight in there.items() if parts.rows[p] and isinstance(weight, Quantized)]
  if not cut:
    return {}
  axes: Any = flatten_dict(param_info(net))
  leaf, place = leaf_reader(base), _placer(m)
  made = {}
  for path in cut:
    like = place(there[path].shape, m.config.param_dtype, axes[path].axes)
    made[path] = jax.device_put(leaf(path, like.dtype, None), like.sharding)
  return made


def _wanted(net: nnx.Module, parts: Parts, m: Model) -> tuple[dict, dict]:
  """Shapes and places of (what was trained, what an adapter has besides)."""
  infos, place = param_info(net), _placer(m)

  def like(path: Path, leaf: Any, axes: tuple) -> jax.ShapeDtypeStruct:
    return place(leaf.shape, "float32" if path[-1] == "scale" else m.config.param_dtype, axes)

  tree = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  shapes = jax.eval_shape(parts.split, tree)
  out = []
  for trees in zip(shapes, parts.kinds(infos), strict=True):
    leaves: Any = flatten_dict(trees[0])
    kinds: Any = flatten_dict(trees[1])
    out.append(unflatten_dict({p: like(p, leaves[p], kinds[p].axes) for p in leaves}))
  return out[0], apart(out[1])[1]


def _placer(m: Model) -> Callable[[tuple[int, ...], str, tuple], jax.ShapeDtypeStruct]:
  """(shape, dtype, axes) -> what is to lie beside the parameters of a model."""
  sample: Any = next(a for a in jax.tree.leaves(m.params) if isinstance(a, jax.Array)).sharding

  def place(shape: tuple[int, ...], dtype: str, axes: tuple) -> jax.ShapeDtypeStruct:
    where = sample
    if isinstance(sample, jax.sharding.NamedSharding):
      mesh: Any = sample.mesh
      where = jax.sharding.NamedSharding(mesh, sharding.spec(axes, shape, mesh))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

  return place
