"""Models to disk, and from one form of checkpoint to another."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from model import checkpoint, hf
from model.config import ModelConfig
from model.errors import InputError
from model.hf.source import Source
from model.loading import load, source
from model.peft import load as peft
from model.peft import write
from model.peft.attach import is_adapted
from model.peft.bottleneck import has_bottlenecks
from model.quant_load import main_format
from model.quant_tree import quantized_leaves
from model.trained import Model

FORMATS = ("orbax", "hf", "peft")


def save(m: Model, folder: str | Path, *, format: str = "orbax", family: str | None = None) -> None:
  """Writes a model.

  Args:
    folder: a new or empty folder.
    format: `orbax`, a workdir with config.json, tokenizer/ and checkpoints/0, and the only one that
      holds bottleneck adapters, with their base; `hf`, a folder that Transformers reads, which has
      no quantized matrices: written in float again, it would pass for the model that they were made
      of; `peft`, the adapter alone as torch PEFT reads it, whatever its base is kept in.
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
  folder = _new_folder(folder, format)
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
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  if m.tokenizer is not None:
    m.tokenizer.save(folder / "tokenizer")
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(0, {"params": m.params}, {"config": config}, blocking=True)
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
  hf.save(found, _new_folder(folder, format), family=family)
  return found.config


def _new_folder(folder: str | Path, format: str) -> Path:
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
