"""What a family of models is: tables of its config.json and of its tensors, read both ways."""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, get_args, get_type_hints

import numpy as np

from model.annotations import is_of
from model.architecture import LABELLED, architecture
from model.config import ModelConfig
from model.errors import InputError, nearest
from model.hf.engine import Row
from model.hf.problems import read_labels, write_labels

REQUIRED: Any = object()


class Fields(Protocol):
  """Fields of config.json that belong together, and what they say of a ModelConfig."""

  @property
  def names(self) -> tuple[str, ...]:
    """Theirs."""
    ...

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    """Ours from a config.json."""
    ...

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    """Theirs."""
    ...


@dataclasses.dataclass(frozen=True)
class Field:
  """A field that has one of ours for it.

  Attributes:
    default: what Transformers assumes where config.json has none, or null; a function of its
      values where it hangs on them; REQUIRED: nothing.
    values: what theirs is called here; None: the same.
    minus: what ours is less than theirs, of numbers.
    older: another name of it.
  """

  theirs: str
  ours: str
  default: Any = REQUIRED
  values: Mapping[Any, Any] | None = None
  minus: int = 0
  older: str | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theirs,) if self.older is None else (self.theirs, self.older)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: values[name] for name in self.names if values.get(name) is not None}
    if any(one != next(iter(told.values())) for one in told.values()):
      raise InputError(f"config.json: {told} differ, and mean the same.")
    value: Any = next(iter(told.values()), None)
    if value is None:
      value = self.default(values) if callable(self.default) else self.default
    if value is REQUIRED:
      raise InputError(f"config.json has no {self.theirs}.")
    if self.values is None:
      return {self.ours: value - self.minus if self.minus else value}
    if value not in self.values:
      known = ", ".join(map(str, self.values))
      raise InputError(
        f"config.json: {self.theirs}={value!r} is not known, expected one of {known}."
      )
    return {self.ours: self.values[value]}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    value = getattr(cfg, self.ours)
    if self.minus and value is None:
      raise InputError(f"model.{self.ours} is not set: it has no {self.theirs}.")
    if self.values is None:
      return {self.theirs: value + self.minus if self.minus else value}
    theirs = next((t for t, o in self.values.items() if o == value), None)
    if theirs is None:
      raise InputError(f"model.{self.ours}={value!r} has no {self.theirs}.")
    return {self.theirs: theirs}


@dataclasses.dataclass(frozen=True)
class Same:
  """Several fields of theirs for one of ours that only training reads: the first one says it."""

  names: tuple[str, ...]
  ours: str
  default: Any

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {self.ours: values.get(self.names[0], self.default)}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return dict.fromkeys(self.names, getattr(cfg, self.ours))


@dataclasses.dataclass(frozen=True)
class Always:
  """A field of which one value is known here, which is also what is assumed without it."""

  theirs: str
  value: Any

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theirs,)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    value = values.get(self.theirs)
    if value is not None and value != self.value:
      raise InputError(
        f"config.json: {self.theirs}={value!r} is not supported, only {self.value!r}."
      )
    return {}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {self.theirs: self.value}


@dataclasses.dataclass(frozen=True)
class Class:
  """A class of Transformers' for a family: its head.

  Attributes:
    settings: of ModelConfig, of this class.
    rows: of the head.
    base: whether its tensors are named without the family's prefix.
    prefix: of the body's tensors; None: the family's.
    surplus: pattern of tensors that published checkpoints of it hold and it does not use.
    told: settings that the tensors tell, whatever config.json says; of tensors by name.
    zeros: tensors of zeros, and their shapes, where no parameter is in their place.
  """

  settings: Mapping[str, Any]
  rows: tuple[Row, ...] = ()
  base: bool = False
  surplus: str = r"(?!)"
  prefix: str | None = None
  told: Mapping[str, Callable[[Mapping[str, np.ndarray]], Any]] = dataclasses.field(
    default_factory=dict
  )
  zeros: Mapping[str, Callable[[ModelConfig], tuple[int, ...]]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of models.

  Attributes:
    model_type: of config.json.
    settings: of ModelConfig, of all its models.
    fields: of config.json.
    rows: tensors of the body.
    classes: by their names; the first one where config.json names none.
    prefix: of the body's tensors in models with a head.
    unread: fields of config.json that change nothing that is computed.
    surplus: pattern of tensors with which nothing is computed.
    repeated: tensors that repeat the table of tokens; the last one only where it is tied.
    twins: tensors that say the same as another one where tables are tied, and where they are not
      alone are computed with.
    renamed: older names of parts of tensors, and what they are called now.
    stacked: ends of names of tensors that hold all experts, and those of each expert's that lie in
      them one after the other.
    pad: id of padding to write where there is no tokenizer that says it.
  """

  model_type: str
  settings: Mapping[str, Any]
  fields: tuple[Fields, ...]
  rows: tuple[Row, ...]
  classes: Mapping[str, Class]
  prefix: str
  unread: tuple[str, ...] = ()
  surplus: str = r"(?!)"
  repeated: tuple[str, ...] = ()
  twins: Mapping[str, str] = dataclasses.field(default_factory=dict)
  renamed: tuple[tuple[str, str], ...] = ()
  stacked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  pad: int | None = None

  def read(self, values: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """(name of the class, config) that a config.json describes.

    Raises:
      InputError: for a class or a field that is not known here, or that lacks.
    """
    known = {name for fields in self.fields for name in fields.names}
    known |= {*COMMON, *self.unread, *(name for fields in EVERYWHERE for name in fields.names)}
    for name in values:
      if name not in known:
        raise InputError(
          f"config.json of a {self.model_type}: field {name!r} is not known here and may change "
          f"what is computed.{nearest(name, known)}"
        )
    named = values.get("architectures") or [next(iter(self.classes))]
    if not isinstance(named, list):
      raise InputError(f"config.json: architectures={named!r} must be a list of names of classes.")
    if named[0] not in list(self.classes):
      raise InputError(
        f"config.json: class {named[0]!r} of {self.model_type} is not known, expected one of "
        f"{', '.join(self.classes)}."
      )
    ours = {"vocab_multiple": 128, **self.settings}
    told: dict[str, Any] = {}
    counts = lambda fields: getattr(fields, "ours", None) in _COUNTS
    for fields in sorted((*self.fields, *EVERYWHERE), key=counts, reverse=True):
      for name, value in _read(fields, values).items():
        if told.setdefault(name, value) != value:
          raise InputError(
            f"config.json: {fields.names[0]} makes model.{name} {value!r}, and another field makes "
            f"it {told[name]!r}: that they differ is not supported."
          )
    ours |= told
    settings = self.classes[named[0]].settings
    ours |= read_labels(settings["head"], values)
    return named[0], ModelConfig(**{**ours, **settings})

  def write(self, cfg: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(name of the class, config.json) of a config, which `read` makes the same again.

    Raises:
      InputError: if the config is not one of this family, with the fields that differ.
    """
    own = self.settings["shape"]
    if all(cfg.shape != one.settings.get("shape", own) for one in self.classes.values()):
      raise InputError(f"this model is no {self.model_type}: it has model.shape={cfg.shape!r}.")
    cfg = dataclasses.replace(cfg, num_kv_heads=cfg.kv_heads)
    if cfg.shape == "encoder_decoder":
      cfg = dataclasses.replace(cfg, num_decoder_layers=cfg.depth("decoder"))
    body: dict[str, Any] = {"model_type": self.model_type}
    for fields in self.fields:
      body |= fields.write(cfg)
    if cfg.head_kind in LABELLED:
      body |= write_labels(cfg)
    ours, differing = architecture(cfg), {}
    for name in self.classes:
      values = {"architectures": [name], **body}
      theirs, told = architecture(self.read(values)[1]), self.classes[name].told
      differing[name] = [k for k in ours if ours[k] != theirs[k] and k not in told]
      if not differing[name]:
        return name, values
    name = min(differing, key=lambda name: len(differing[name]))
    told = ", ".join(f"model.{k}={getattr(cfg, k)!r}" for k in differing[name])
    raise InputError(f"this model is no {self.model_type}: {name} has no {told}.")

  def table(self, name: str) -> tuple[Row, ...]:
    """Rows of a class, under the names that its tensors have in a checkpoint."""
    rename = lambda row: dataclasses.replace(row, theirs=self._named(name, row.theirs))
    return (*map(rename, self.rows), *self.classes[name].rows)

  def repeats(self, name: str, cfg: ModelConfig) -> set[str]:
    """Tensors of a class that repeat the table of tokens."""
    tied = self.repeated if cfg.tie_embeddings else self.repeated[:-1]
    return {self._named(name, tensor) for tensor in tied}

  def body_prefix(self, name: str) -> str:
    """What names of the body's tensors begin with in a class."""
    one = self.classes[name]
    return "" if one.base else self.prefix if one.prefix is None else one.prefix

  def _named(self, name: str, tensor: str) -> str:
    """What a class calls a tensor of the body."""
    if not tensor.startswith(self.prefix):
      return tensor
    return self.body_prefix(name) + tensor.removeprefix(self.prefix)

  def computes_nothing(self, name: str, tensor: str) -> bool:
    """Whether a class does not compute with a tensor of that name."""
    patterns = self.surplus, self.classes[name].surplus
    return any(re.fullmatch(pattern, tensor) for pattern in patterns)


EVERYWHERE = (Always("is_decoder", False), Always("add_cross_attention", False))
# Fields that change nothing that is computed by a forward pass: what generation, training or a
# library does with the model. Token ids are the tokenizer's.
COMMON = (
  "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
  "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
  "mask_token_id", "unk_token_id", "initializer_range", "id2label", "label2id", "num_labels",
  "problem_type", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
  "gradient_checkpointing", "task_specific_params", "finetuning_task", "tokenizer_class", "prefix",
  "language", "name", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
  "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "length_penalty",
  "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id", "is_encoder_decoder",
  "cross_attention_hidden_size", "pruned_heads",
  "chunk_size_feed_forward", "use_bfloat16", "auto_map",
)  # fmt: skip


# What others count to, and the least of each: these are read first, and are no more than _MOST.
_COUNTS = {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 1, "num_experts": 0}
_MOST = 10_000
_HINTS = get_type_hints(ModelConfig)
# What reading a field raises where it holds something else than it should.
_UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StopIteration)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _read(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
  """What fields say of a ModelConfig.

  Raises:
    InputError: where one of them holds what cannot be meant, as text for a number.
  """
  said = ", ".join(f"{n}={reprlib.repr(values[n])}" for n in fields.names if n in values)
  said = f"config.json: {said or ' and '.join(fields.names)}"
  try:
    ours = fields.read(values)
  except InputError:
    raise
  except _UNREADABLE as error:
    why = f"{error} is missing" if isinstance(error, KeyError) else str(error) or "nothing fits"
    raise InputError(f"{said} cannot be read: {why}.") from None
  for name, value in ours.items():
    kind = _HINTS[name]
    if not is_of(value, kind):
      wanted = next((_KINDS[k] for k in (kind, *get_args(kind)) if k in _KINDS), "a list")
      raise InputError(f"{said} makes model.{name} {reprlib.repr(value)}, expected {wanted}.")
    if name in _COUNTS and value is not None and not _COUNTS[name] <= value <= _MOST:
      known = f"{_COUNTS[name]} to {_MOST:,}"
      raise InputError(f"{said} makes model.{name} {value}, expected {known}.")
  return ours
