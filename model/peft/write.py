"""An adapter as torch PEFT writes it."""

import json
from collections import Counter
from pathlib import Path as File
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from model import hf
from model.errors import InputError
from model.hf.engine import Layout
from model.hf.safetensors_files import write_file
from model.peft import tied, virtual_files
from model.peft.attach import KEY, is_adapted
from model.peft.bottleneck import check_none
from model.peft.create import dense
from model.peft.files import CONFIG, WEIGHTS
from model.peft.lora import magnitude
from model.peft.names import Path
from model.peft.tensors import PREFIX, Part, TheirModule, modules, tensor_of
from model.trained import Model

TASKS = {"language": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS",
         "span": "QUESTION_ANS", "embedding": "FEATURE_EXTRACTION"}  # fmt: skip


def save(m: Model, folder: File) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, and what was trained with them.

  Raises:
    InputError: if the model has no adapter, is of no family of Hugging Face's, or has an adapter
      where PEFT has no place for one.
  """
  if not is_adapted(m.params):
    raise InputError("the model has no adapter: format='peft' holds nothing else.")
  check_none(m.params, "torch PEFT has no method for")
  leaves: Any = flatten_dict(m.params)
  if virtual_files.has_virtual(m.params):
    _save_virtual(m, leaves, folder)
    return
  layout = hf.layout(m)
  known = modules(layout, m.config)
  found = {n: parts for n, module in known.items() if (parts := _parts(leaves, module))}
  _check_all_written(leaves, found, known)
  tensors, ranks, scales, reads = {}, {}, {}, set()
  for name, parts in found.items():
    arrays, scale = known[name].to_theirs(parts)
    table = known[name].piece.places[0].path[-1] == "table"
    tensors |= {f"{PREFIX}{name}.{_suffix(kind, table)}": a for kind, a in arrays.items()}
    if "A" in arrays:
      ranks[name], scales[name] = arrays["A"].shape[0], scale
    elif "inputs" in parts[0].arrays:
      reads.add(name)
  brought = _brought(m, leaves, layout)
  module = lambda name: name.rpartition(".")[0]
  saved = sorted({module(name) for name in brought if not name.endswith(".bias")})
  biases = [name for name in brought if module(name) not in saved]
  for name, array in brought.items():
    inside = name in biases and module(name) in found
    tensors[PREFIX + (f"{module(name)}.base_layer.bias" if inside else name)] = array
  values = _config(m, list(found), known, ranks, scales, reads, saved)
  if biases and "bias" not in values:
    raise InputError(f"PEFT's IA3 keeps no biases, and {biases[0]} was trained with it.")
  values |= {"bias": "all"} if biases else {}
  _write(folder, tensors, values)


def _save_virtual(m: Model, leaves: Any, folder: File) -> None:
  kind, table = virtual_files.table_of(leaves, m.config)
  whole, task = _brought(m, leaves, hf.layout(m)), _task(m)
  tensors = {virtual_files.BEFORE + name: array for name, array in whole.items()}
  values = virtual_files.described(kind, table, m.config, task) | {
    "base_model_name_or_path": None if m.adapted is None else m.adapted.base, "task_type": task,
    "inference_mode": True,
    "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
  }  # fmt: skip
  _write(folder, tensors | {virtual_files.TENSOR: table}, values)


def _brought(m: Model, leaves: Any, layout: Layout) -> dict[str, np.ndarray]:
  """Tensors of the base that were trained besides, by name; with a table that scores words too, the
  head that is the same.
  """
  whole = set() if m.adapted is None else {p for p in m.adapted.whole if KEY not in p}
  pieces = [piece for piece in layout.pieces if any(p.path in whole for p in piece.places)]
  out = {piece.theirs: tensor_of(piece, leaves) for piece in pieces}
  if (table := tied.scoring_table(m)) in whole:
    one = next(piece for piece in pieces if piece.places[0].path == table)
    out |= dict.fromkeys(tied.heads(m), out[one.theirs])
  return out


def _write(folder: File, tensors: dict[str, np.ndarray], values: dict[str, Any]) -> None:
  write_file(folder / WEIGHTS, {k: np.ascontiguousarray(a) for k, a in tensors.items()})
  (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _suffix(kind: str, table: bool) -> str:
  if kind in ("A", "B"):
    return f"lora_embedding_{kind}" if table else f"lora_{kind}.weight"
  return {"magnitude": "lora_magnitude_vector", "ia3": "ia3_l"}[kind]


def _parts(leaves: Any, module: TheirModule) -> list[Part] | None:
  """The part of an adapter at each place of a module; None: it has none."""
  parts = [_part(leaves, place) for place in module.places]
  if all(part is None for part in parts):
    return None
  like = next(part for part in parts if part is not None)
  pairs = zip(parts, module.places, strict=True)
  return [_nothing(leaves, place, like) if part is None else part for part, place in pairs]


def _part(leaves: Any, place: Any) -> Part | None:
  """A place's own, without ranks that do nothing; None: nothing is changed there."""
  owner = (*place.path[:-1], KEY)
  names = {path[-1] for path in leaves if path[:-1] == owner}
  if not names:
    return None
  of = lambda name: np.asarray(leaves[(*owner, name)])[place.index].astype(np.float32)
  if "a" not in names:
    name = names.pop()
    array = of(name)[tuple(slice(0, n) for n in _side(place, name, of(name).ndim))]
    return None if np.all(array == 1) and name == "outputs" else Part({name: array})
  a, b = of("a"), of("b")
  if "start_a" in names:
    a = np.concatenate((a, of("start_a")), axis=-1)
    b = np.concatenate((b, -of("start_b")), axis=0)
  reads = a.ndim - 1
  a = a[tuple(slice(0, n) for n in place.shape[:reads])]
  b = b[(slice(None), *(slice(0, n) for n in place.shape[reads:]))]
  works = np.any(a != 0, axis=tuple(range(reads))) | np.any(b.reshape(len(b), -1) != 0, axis=1)
  if not works.any():
    return None
  scale = np.asarray(leaves[(*owner, "scale")])
  arrays = {"a": a[..., works], "b": b[works]}
  if "magnitude" in names:
    arrays["magnitude"] = of("magnitude")[tuple(slice(0, n) for n in place.shape[reads:])]
  return Part(arrays, float(scale[place.index[: scale.ndim]]))


def _side(place: Any, name: str, many: int) -> tuple[int, ...]:
  """The sizes of a place's inputs or outputs, of which there are so many."""
  return place.shape[:many] if name == "inputs" else place.shape[-many:]


def _nothing(leaves: Any, place: Any, like: Part) -> Part:
  """What changes nothing, at a place beside one that is changed."""
  if "a" not in like.arrays:
    name = next(iter(like.arrays))
    return Part({name: np.ones(_side(place, name, like.arrays[name].ndim), np.float32)})
  reads = like.arrays["a"].ndim - 1
  arrays = {"a": like.arrays["a"],
            "b": np.zeros((like.rank, *place.shape[reads:]), np.float32)}  # fmt: skip
  if "magnitude" in like.arrays:
    norms = np.asarray(magnitude(dense(leaves[place.path])[place.index], 0, reads))
    arrays["magnitude"] = norms[tuple(slice(0, n) for n in place.shape[reads:])]
  return Part(arrays, like.scale)


def _check_all_written(leaves: Any, found: dict, known: dict[str, TheirModule]) -> None:
  written = {p.path[:-1] for name in found for p in known[name].places}
  for path in {path[: path.index(KEY)] for path in leaves if KEY in path}:
    if path not in written and any(np.any(np.asarray(a)) for a in _of(leaves, path)):
      name = ".".join(map(str, path))
      raise InputError(f"{name} has an adapter, and PEFT has no module of its own for it.")


def _of(leaves: Any, owner: Path) -> list[Any]:
  return [leaf for path, leaf in leaves.items() if path[: len(owner)] == owner and path[-1] == "b"]


def _config(
  m: Model, names: list[str], known: dict[str, TheirModule], ranks: dict[str, int],
  scales: dict[str, float], reads: set[str], saved: list[str],
) -> dict[str, Any]:  # fmt: skip
  told = m.adapted
  values: dict[str, Any] = {
    "base_model_name_or_path": None if told is None else told.base,
    "task_type": _task(m), "inference_mode": True, "modules_to_save": saved or None,
    "target_modules": names, "fan_in_fan_out": any(_input_first(known[name]) for name in names),
  }  # fmt: skip
  if not ranks:
    feedforward = [name for name in names if name in reads]
    return values | {"peft_type": "IA3", "feedforward_modules": feedforward}
  rslora = told is not None and told.rslora
  alphas = {n: scales[n] * (r**0.5 if rslora else r) for n, r in ranks.items()}
  alphas = {n: round(a) if abs(a - round(a)) < 1e-5 * abs(a) else a for n, a in alphas.items()}
  rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
  leaves: Any = flatten_dict(m.params)
  return values | {
    "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "lora_dropout": 0.0,
    "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
    "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    "use_rslora": rslora, "use_dora": any(path[-1] == "magnitude" for path in leaves),
    "init_lora_weights": True,
    **({"ensure_weight_tying": True} if told and tied.scoring_table(m) in told.whole else {}),
  }  # fmt: skip


def _task(m: Model) -> str | None:
  task = TASKS.get(m.config.head_kind)
  writes = m.config.shape == "encoder_decoder" and task == "CAUSAL_LM"
  return "SEQ_2_SEQ_LM" if writes else task


def _input_first(module: TheirModule) -> bool:
  """Whether theirs is stored with inputs first (GPT-2's Conv1D)."""
  left = module.piece.pattern.split(" -> ")[0]
  table = module.places[0].path[-1] == "table"
  return not table and not left.lstrip("(").startswith(module.left.strip("()"))
