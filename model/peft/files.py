"""Folders of torch PEFT: adapter_config.json and adapter_model.safetensors, read and written."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model import hf
from model.errors import InputError
from model.heads import abstract
from model.hf.engine import Layout
from model.hf.safetensors_files import open_file
from model.hf.torch_files import open_torch_file
from model.json_files import read_json
from model.layers import Embed, Linear, param_info
from model.peft import tied, virtual_files
from model.peft.attach import KEY, attached, is_adapted, owners, together
from model.peft.begun import check_init, with_start
from model.peft.create import dense
from model.peft.lora import magnitude, sides
from model.peft.names import Path
from model.peft.parts import LABEL_HEADS
from model.peft.tensors import Part, TheirModule, modules, sorted_out
from model.sharding import spec
from model.trained import Adapted, Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TORCH_WEIGHTS = "adapter_model.bin"
_KINDS = {"LORA", "IA3", *virtual_files.KINDS}
# Ends of the classes that PEFT's tasks with heads of their own train.
HEADS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
         "QUESTION_ANS": "ForQuestionAnswering"}  # fmt: skip
# What changes what is computed and is not known here, and the values that change nothing.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
  "bias": ("none", None, "all", "lora_only"), "target_parameters": (None, []),
  "use_bdlora": (None, False),
  "use_qalora": (None, False), "alora_invocation_tokens": (None, []), "arrow_config": (None,),
  "trainable_token_indices": (None, []), "layer_replication": (None, []),
  "lora_bias": (None, False), "kasa_config": (None,), "velora_config": (None,),
  "monteclora_config": (None,),
}  # fmt: skip


def is_folder(path: str | File) -> bool:
  """Whether `path` is a folder as PEFT writes it."""
  return (File(path).expanduser() / CONFIG).is_file()


def read_config(folder: str | File) -> dict[str, Any]:
  """adapter_config.json.

  Raises:
    InputError: if it cannot be read, is of a method that is not known, or sets what is not.
  """
  path = File(folder).expanduser() / CONFIG
  values = read_json(path)
  kind = values.get("peft_type") if isinstance(values, dict) else None
  if kind not in _KINDS:
    raise InputError(
      f"{path}: peft_type={kind!r} is not known, expected one of {', '.join(sorted(_KINDS))}."
    )
  for name, free in _UNKNOWN.items():
    if values.get(name) not in free:
      raise InputError(f"{path}: {name}={values[name]!r} is not supported, only {free[0]!r}.")
  check_init(values, path)
  return values


def base_of(folder: str | File) -> str:
  """The base that a PEFT folder names.

  Raises:
    InputError: if it names none that is here.
  """
  named = read_config(folder).get("base_model_name_or_path")
  for path in (File(str(named)).expanduser(), File(folder).expanduser() / str(named)):
    if named and path.exists():
      return str(path)
  raise InputError(
    f"{folder} is an adapter of {named!r}, which is no folder of this machine: name the base with "
    "base=."
  )


def with_adapter(m: Model, folder: str | File, *, base: str | None = None) -> Model:
  """A model with the adapter of a PEFT folder.

  Raises:
    InputError: if the adapter belongs to another model, matches no parameter, is damaged, or is of
      a kind that is not known.
  """
  if is_adapted(m.params):
    raise InputError(f"{folder}: the model has an adapter already; merge it first.")
  config = read_config(folder)
  if config["peft_type"] in virtual_files.KINDS:
    return _with_virtual(m, folder, config, base)
  parts, whole = sorted_out(_tensors(File(folder).expanduser()))
  if not parts:
    raise InputError(f"{folder} has no adapter: its tensors are {sorted(whole)[:3]}.")
  m, missing = _with_head(m, config, whole)
  m, whole = tied.as_told(m, config, parts, whole)
  layout = hf.layout(m)
  known, leaves = modules(layout, m.config), flatten_dict(m.params)
  found: dict[Path, dict[tuple[int, ...], Part]] = defaultdict(dict)
  for name, theirs in parts.items():
    module = _module(name, known, theirs, config, str(folder))
    scale = _scale(config, name, theirs)
    try:
      ours = module.to_ours(theirs, scale)
    except Exception as error:  # Of einops and reshape: the shapes are of another model.
      shapes = {k: list(v.shape) for k, v in theirs.items()}
      raise InputError(f"{folder}: {name} has {shapes}, which do not fit this model.") from error
    ours = with_start(ours, config, module, leaves, scale)
    for place, part in zip(module.places, ours, strict=True):
      found[place.path[:-1]][place.index] = part
  params = _placed(m, found)
  replaced, params = _replaced(m, layout, params, whole, missing, str(folder))
  rslora = bool(config.get("use_rslora"))
  return dataclasses.replace(m, params=params, adapted=Adapted(base, rslora, replaced))


def _with_virtual(m: Model, folder: str | File, config: dict, base: str | None) -> Model:
  table, whole = virtual_files.apart(_tensors(File(folder).expanduser()))
  if table is None:
    raise InputError(
      f"{folder} has no {virtual_files.TENSOR}: its tensors are {sorted(whole)[:3]}."
    )
  m, missing = _with_head(m, config, whole)
  m, whole = tied.as_told(m, config, (), whole)
  kind = jnp.dtype(m.config.param_dtype)
  made = virtual_files.parameters(table, config, m.config, str(folder))
  params = _beside(m, {path: array.astype(kind) for path, array in made.items()})
  replaced, params = _replaced(m, hf.layout(m), params, whole, missing, str(folder))
  return dataclasses.replace(m, params=params, adapted=Adapted(base, False, replaced))


def _tensors(folder: File) -> dict[str, np.ndarray]:
  if (folder / WEIGHTS).is_file():
    return open_file(folder / WEIGHTS)
  if (folder / _TORCH_WEIGHTS).is_file():
    return open_torch_file(folder / _TORCH_WEIGHTS)
  raise InputError(f"{folder} has neither {WEIGHTS} nor {_TORCH_WEIGHTS}.")


def _module(
  name: str, known: Mapping[str, TheirModule], theirs: dict[str, np.ndarray], config: dict,
  folder: str,
) -> TheirModule:  # fmt: skip
  """The module of that name, which may lack or have a prefix of the body."""
  fitting = [n for n in known if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
  if name in known:
    return known[name]
  if len(fitting) == 1:
    return known[fitting[0]]
  raise InputError(
    f"{folder} adapts {name}, which this model does not have: is it of another base "
    f"({config.get('base_model_name_or_path')})? Its modules are as {', '.join(list(known)[:3])}."
  )


def _scale(config: dict[str, Any], name: str, theirs: dict[str, np.ndarray]) -> float:
  """What the file multiplies the update of a module by.

  Raises:
    InputError: if its rank is not that of its tensors.
  """
  if "A" not in theirs:
    return 1.0
  rank = _pattern(config.get("rank_pattern"), name, config.get("r"))
  alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
  own = theirs["A"].shape[0]
  if rank != own or not isinstance(alpha, int | float):
    raise InputError(
      f"{CONFIG} gives {name} rank {rank} and alpha {alpha}, and its tensors have rank {own}."
    )
  return alpha / own**0.5 if config.get("use_rslora") else alpha / own


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
  matching = (v for p, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({p})", name))
  return next(matching, default)


def _with_head(
  m: Model, config: dict[str, Any], whole: Mapping[str, np.ndarray]
) -> tuple[Model, set[Path]]:
  """The model with the head that a task of PEFT's trains, where the base has another, and what of
  its parameters has no values yet.
  """
  end = HEADS.get(str(config.get("task_type")))
  if end is None or m.config.head_kind in LABEL_HEADS:
    return m, set()
  family = hf.FAMILIES[hf.family_of(m)]
  name = next((name for name in family.classes if name.endswith(end)), None)
  if name is None:
    raise InputError(f"{family.model_type} has no class for task_type={config['task_type']!r}.")
  settings = dict(family.classes[name].settings)
  told = [row.theirs for row in family.classes[name].rows if row.ours == "head.proj.w"]
  labels = next((whole[one].shape[0] for one in told if one in whole), None)
  plain = dict(head_dense=False, head_norm=False, logit_bias=False, head_bias=True,
               num_labels=None if settings["head"] == "span" else labels)  # fmt: skip
  if settings["head"] == "sequence" and labels == 1:
    plain["problem"] = "regression"
  cfg = dataclasses.replace(m.config, **{**plain, **settings})
  wanted: Any = flatten_dict(nnx.to_pure_dict(nnx.state(abstract(cfg), nnx.Param)))
  leaves: Any = flatten_dict(m.params)
  kind = m.config.param_dtype
  kept = {p for p, like in wanted.items() if p in leaves and leaves[p].shape == like.shape}
  empty = {p: jnp.zeros(like.shape, kind) for p, like in wanted.items() if p not in kept}
  params = unflatten_dict({p: leaves[p] for p in kept} | empty)
  return dataclasses.replace(m, config=cfg, params=params), set(empty)


def _placed(m: Model, found: Mapping[Path, dict[tuple[int, ...], Part]]) -> dict:
  """The parameters with an adapter of each owner, from the parts at its layers and experts."""
  leaves: Any = flatten_dict(m.params)
  own = {path: owner for path, owner in owners(abstract(m.config)) if path in found}
  made = {}
  for path, owner in own.items():
    _check_dora(path, owner, found[path].values())
    weight = leaves[(*path, "table" if isinstance(owner, Embed) else "w")]
    for name, array in stacked(owner, weight, found[path], m.config.param_dtype).items():
      made[(*path, KEY, name)] = array
  return _beside(m, made)


def _check_dora(path: Path, owner: Any, parts: Iterable[Part]) -> None:
  if not isinstance(owner, Linear) and any("magnitude" in part.arrays for part in parts):
    raise InputError(
      f"use_dora=True is supported for matrices of layers and heads, and the adapter has it for "
      f"{'.'.join(map(str, path))}: train without it, or leave that module out."
    )


def _beside(m: Model, made: dict[Path, np.ndarray]) -> dict:
  """The parameters with those of adapters, which lie where the model's do."""
  leaves: Any = flatten_dict(m.params)
  params = together(m.params, unflatten_dict(made))
  axes: Any = flatten_dict(param_info(attached(abstract(m.config), params)))
  sample = _sample(leaves)
  place = lambda path, array: jax.device_put(array, _where(sample, axes[path].axes, array.shape))
  return together(m.params, unflatten_dict({p: place(p, a) for p, a in made.items()}))


def _sample(leaves: dict[Path, Any]) -> jax.Array:
  """A parameter that lies where the others do."""
  return next(leaf for leaf in leaves.values() if isinstance(leaf, jax.Array))


def _where(sample: jax.Array, axes: tuple, shape: tuple[int, ...]) -> Any:
  """Where an array of these axes goes, beside one that is somewhere."""
  there: Any = sample.sharding
  if not isinstance(there, jax.sharding.NamedSharding):
    return there
  mesh: Any = there.mesh
  return jax.sharding.NamedSharding(mesh, spec(axes, shape, mesh))


def stacked(
  owner: Any, weight: Any, parts: dict[tuple[int, ...], Part], dtype: str
) -> dict[str, np.ndarray]:
  """An adapter's parameters from its parts by layer and expert, those without one being nothing.

  Lower ranks are filled up with zeros, which is exact.
  """
  experts, inputs, outputs = map(len, sides(owner))
  shape = tuple(weight.shape)
  lead = len(shape) - inputs - outputs
  kind = jnp.dtype(dtype)
  first = next(iter(parts.values()))
  sizes = {"inputs": shape[lead : lead + inputs], "outputs": shape[lead + inputs :]}
  if "a" not in first.arrays:
    name = next(iter(first.arrays))
    return {name: _filled(np.ones((*shape[:lead], *sizes[name]), kind), name, parts)}
  rank = max(part.rank for part in parts.values())
  low = {"a": (*sizes["inputs"], rank), "b": (rank, *sizes["outputs"])}
  out = {
    name: _filled(np.zeros((*shape[:lead], *low[name[-1]]), kind), name, parts)
    for name in ("a", "b", "start_a", "start_b") if name in first.arrays
  }  # fmt: skip
  out["scale"] = np.ones(shape[: lead - experts], np.float32)
  for index, part in parts.items():
    out["scale"][index[: lead - experts]] = part.scale
  if any(
    out["scale"][index[: lead - experts]] != np.float32(p.scale) for index, p in parts.items()
  ):
    raise InputError("experts of a layer have different alphas: one for all of them is needed.")
  if "magnitude" in first.arrays:
    norms = magnitude(dense(weight), lead, inputs)
    out["magnitude"] = _filled(np.array(norms).astype(kind), "magnitude", parts)
  return out


def _filled(out: np.ndarray, name: str, parts: dict[tuple[int, ...], Part]) -> np.ndarray:
  for index, part in parts.items():
    array = part.arrays[name]
    out[(*index, *(slice(0, n) for n in array.shape))] = array
  return out


def _replaced(
  m: Model, layout: Layout, params: dict, whole: Mapping[str, np.ndarray], missing: set[Path],
  folder: str,
) -> tuple[tuple[Path, ...], dict]:  # fmt: skip
  """(paths of parameters that the adapter brings whole, the parameters with them: in float, also
  where the base's are quantized).
  """
  leaves: Any = flatten_dict(params)
  pieces = {piece.theirs: piece for piece in layout.pieces}
  found, same = {}, {}
  for name, array in whole.items():
    piece = pieces.get(name)
    if piece is None or piece.shape != tuple(array.shape):
      shape = None if piece is None else list(piece.shape)
      raise InputError(
        f"{folder} has {name} {list(array.shape)}, and this model has {shape or 'none such'}."
      )
    for which, place in enumerate(piece.places):
      if place.path not in found:
        found[place.path] = np.array(dense(leaves[place.path]).astype(m.config.param_dtype))
      part = found[place.path][(*place.index, *(slice(0, n) for n in place.shape))]
      new = piece.to_ours(np.asarray(array), which).astype(part.dtype)
      same[place.path] = same.get(place.path, True) and np.array_equal(part, new)
      part[...] = new
  if missing - found.keys():
    name = ".".join(map(str, next(iter(missing - found.keys()))))
    raise InputError(f"{folder} trains a head, and has no {name}.")
  changed = {p: a for p, a in found.items() if not same[p] or p in missing}
  axes: Any = flatten_dict(param_info(abstract(m.config)))
  sample = _sample(leaves)
  put = lambda path, array: jax.device_put(array, _where(sample, axes[path].axes, array.shape))
  return tuple(changed), unflatten_dict(leaves | {p: put(p, a) for p, a in changed.items()})
