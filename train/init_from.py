"""Where a run begins from: model, tokenizer and parameters of another one (`init_from`)."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model import checkpoint, hf, loading
from model.architecture import EXECUTION_FIELDS, HEAD_FIELDS, architecture
from model.config import ModelConfig
from model.errors import InputError
from model.heads import abstract as network
from model.hf.source import Source
from model.layers import param_info
from model.quant import Quantized
from model.tokenizer import Tokenizer
from train.config import Config, DataConfig
from train.data.pipeline import Data
from train.packed_base import read_packed
from train.resolve import SHAPES
from train.workdir import read_config

# What is left of a network without its heads.
BODY = ("embed", "decoder_embed", "encoder", "decoder")
_DEFAULT = ModelConfig()
_BODY_FIELDS = tuple(
  f.name for f in dataclasses.fields(ModelConfig) if f.name not in (*EXECUTION_FIELDS, *HEAD_FIELDS)
)


def with_its_tokenizer(config: Config, workdir: Path | None) -> Config:
  """The config with the tokenizer of `init_from`, where `data.tokenizer` was left at its default.

  A workdir whose run began so goes on with what it began with; None: there is no workdir.
  """
  default = DataConfig.__dataclass_fields__["tokenizer"].default
  if config.init_from is None or config.data.tokenizer != default:
    return config
  saved = None if workdir is None else read_config(workdir)
  if saved is not None and saved["init_from"] == config.init_from:
    chosen = saved["data"]["tokenizer"]
  else:
    own = loading.tokenizer_path(config.init_from)
    chosen = default if own is None else str(own.resolve())
  if chosen != default:
    _say(f"tokenizer: {chosen}, that of init_from")
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=chosen))


def with_its_model(config: Config, workdir: Path | None) -> Config:
  """The config with the model of `init_from`, where no field of `model` says what its body is.

  Fields of its execution, and of a head that the objective needs and the checkpoint has not, are
  those of the config. A workdir whose run began so goes on with what it began with.
  """
  given = config.model
  if config.init_from is None or any(_given(given, name) for name in _BODY_FIELDS):
    return config
  saved = None if workdir is None else read_config(workdir)
  if saved is not None and saved["init_from"] == config.init_from:
    found = ModelConfig.from_dict(saved["model"])
  else:
    found = loading.source(config.init_from).config
  fitting = SHAPES[config.objective.name].get(found.shape)
  kept = EXECUTION_FIELDS if found.head_kind == fitting else (*EXECUTION_FIELDS, *HEAD_FIELDS)
  own = {name: getattr(given, name) for name in kept}
  own |= {name: getattr(given, name) for name in HEAD_FIELDS if _given(given, name)}
  _say(f"model: that of {config.init_from}")
  return dataclasses.replace(config, model=dataclasses.replace(found, **own))


def _given(cfg: ModelConfig, name: str) -> bool:
  """Whether a field is not at its default."""
  return getattr(cfg, name) != getattr(_DEFAULT, name)


def initial_params(config: Config, fresh: dict, abstract: dict, data: Data) -> dict:
  """The parameters that a run with `init_from` begins with.

  A head that is another one than the checkpoint's, or tells other labels, stays as it is in
  `fresh`, and that is said.

  Args:
    fresh: initialized parameters.
    abstract: their shapes and shardings.

  Raises:
    InputError: if the checkpoint has another body or vocabulary.
  """
  path = config.init_from or ""
  found = loading.source(path, dtype=config.model.param_dtype)
  check_init(path, found, config, data.tokenizer)
  differs = _head_differs(found, config)
  if differs:
    _say(f"head: fresh ({'; '.join(differs)})")
  return {**fresh, **_read(path, found, abstract, whole=not differs)}


def _read(path: str, found: Source, abstract: dict, *, whole: bool) -> dict:
  """Parameters where they belong: of the body, or with `whole` all that the checkpoint has."""
  folder = hf.is_folder(path)
  net = network(found.config)
  there = nnx.state(net, nnx.Param).keys()
  parts = there if folder else checkpoint.describe(path).state["params"].keys()
  kept = set(BODY) & abstract.keys() | (abstract.keys() & parts if whole else set())
  wanted = {name: part for name, part in abstract.items() if name in kept}
  likes: Any = flatten_dict(wanted)
  packed = {leaf: like for leaf, like in likes.items() if isinstance(like, Quantized)}
  plain = {leaf: like for leaf, like in likes.items() if leaf not in packed}
  if folder:
    place = lambda leaf, like: jax.device_put(found.leaf(leaf).astype(like.dtype), like.sharding)
    read: Any = {leaf: place(leaf, like) for leaf, like in plain.items()}
  else:
    others = None if packed else tuple(name for name in parts if name not in kept)
    some = {"params": unflatten_dict(plain)}
    state = checkpoint.restore_params(path, some, cast=True, leave_out=others).state
    read = flatten_dict(state["params"])
  return unflatten_dict(read | read_packed(path, packed, param_info(net)))


def check_init(path: str, found: Source, config: Config, tokenizer: Tokenizer) -> None:
  """Raises an InputError if a checkpoint's body is another one, or reads another vocabulary."""
  own = found.tokenizer
  if own is not None and own.fingerprint != tokenizer.fingerprint:
    raise InputError(
      f"init_from={path!r} was trained with another tokenizer than data.tokenizer="
      f"{config.data.tokenizer!r}: its ids mean other text. Set data.tokenizer="
      f"{str(loading.tokenizer_path(path))!r}."
    )
  free = (*HEAD_FIELDS, "prefix_attention")
  saved, ours = (
    {k: v for k, v in architecture(cfg).items() if k not in free}
    | {"vocab_multiple": cfg.vocab_multiple}
    for cfg in (found.config, config.model)
  )
  checkpoint.check_config({"model": saved}, {"model": ours})


def _head_differs(found: Source, config: Config) -> list[str]:
  """In words, what of the head is not as in the checkpoint."""
  saved, ours = architecture(found.config), architecture(config.model)
  differs = [
    f"model.{name}: checkpoint {saved[name]!r}, config {ours[name]!r}"
    for name in HEAD_FIELDS
    if saved[name] != ours[name]
  ]
  labels = config.data.labels
  if labels is not None and found.labels is not None and found.labels != tuple(labels):
    differs.append("other labels")
  return differs


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)
