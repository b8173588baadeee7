"""PeftConfig: what of a model is trained when the rest of it stays as it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from model.config import ACTIVATIONS
from model.errors import InputError, nearest
from model.quant_formats import Format

METHODS = (
  "full", "bitfit", "lora", "dora", "ia3", "houlsby", "pfeiffer", "parallel", "prompt", "prefix",
  "ptuning",
)  # fmt: skip
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel")
VIRTUAL = ("prompt", "prefix", "ptuning")  # What is added stands before each text.
# Methods that add parameters to a model.
ADAPTERS = ("lora", "dora", "ia3", *BOTTLENECKS, *VIRTUAL)
LOW_RANK = ("lora", "dora")
INITS = ("default", "gaussian", "pissa", "orthogonal", "vocabulary", "text", "zero")
ENCODERS = ("mlp", "lstm")
# What virtual tokens may begin as.
_BEGINNINGS = {"prompt": ("default", "vocabulary", "text"), "prefix": ("default", "zero")}
DTYPES = ("float32", "bfloat16", "float64")

# Which methods read a field; those that are not here are read by all.
_READERS = {
  **dict.fromkeys(("rank", "rslora", "ranks", "alpha", "alphas"), LOW_RANK),
  **dict.fromkeys(("bottleneck", "activation", "scale"), BOTTLENECKS),
  "dropout": (*LOW_RANK, *BOTTLENECKS),
  "init": (*LOW_RANK, "prompt", "prefix"), "virtual_tokens": VIRTUAL, "projection": ("prefix",),
  **dict.fromkeys(("init_text", "init_tokens"), ("prompt",)),
  **dict.fromkeys(("encoder", "encoder_layers"), ("ptuning",)),
  "encoder_width": ("prefix", "ptuning"),
  "targets": ("full", "bitfit", "lora", "dora", "ia3", *BOTTLENECKS),
  "learning_rate_ratio": LOW_RANK, "dtype": ADAPTERS, "base_format": ADAPTERS,
  "freeze": ("full",),
  "also": ("bitfit", *ADAPTERS),
}  # fmt: skip


@dataclasses.dataclass(slots=True, kw_only=True)
class PeftConfig:
  """What is trained. Anything but all of the model needs `init_from`: the base.

  Patterns name modules or parameters by their dotted paths, with the number of a layer in its stack
  (`decoder.layers.3.attn.q_proj`): all of a path, its end, its beginning or whole words inside it;
  `*` stands for anything. One that matches nothing is an error.

  Methods: full, everything, or with `targets` or `freeze` a part of it; bitfit, biases (Ben Zaken
  et al., arXiv:2106.10199); lora (Hu et al., arXiv:2106.09685); dora (Liu et al.,
  arXiv:2402.09353); ia3 (Liu et al., arXiv:2205.05638); bottleneck adapters: houlsby, behind
  attention and MLPs (Houlsby et al., arXiv:1902.00751), pfeiffer, behind MLPs (Pfeiffer et al.,
  arXiv:2005.00247), parallel, beside MLPs (He et al., arXiv:2110.04366); prompt, vectors that the
  first layer reads before each text (Lester et al., arXiv:2104.08691); ptuning, the same as a
  network writes them, which is left out of what is saved (Liu et al., arXiv:2103.10385); prefix,
  keys and values in each layer before each text (Li & Liang, arXiv:2101.00190), which with labels
  to tell is P-tuning v2 (Liu et al., arXiv:2110.07602).
  """

  method: str = "full"
  # Where; (): full, all; bitfit, all biases; lora and dora, every matrix of attention, MLPs and
  # experts; ia3, keys, values and what MLPs read last. Of bottlenecks, parts of layers: attn,
  # cross_attn, mlp; (): as the method has it.
  targets: tuple[str, ...] = ()
  freeze: tuple[str, ...] = ()  # full: what stays as it is, also where it is a target.
  also: tuple[str, ...] | None = None  # Trained besides; None: a head that tells labels.
  rank: int = 8
  ranks: tuple[str, ...] = ()  # "pattern=rank": other ranks; the last that matches holds.
  alpha: float | None = None  # An update is scaled by alpha / rank; None: alpha is the rank.
  alphas: tuple[str, ...] = ()  # "pattern=alpha".
  rslora: bool = False  # Scaled by alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732).
  dropout: float = 0.0  # Of what an adapter reads, in training.
  # default: A uniform, B 0; gaussian: A normal, B 0; pissa: the largest singular values (Meng et
  # al., arXiv:2404.02948); orthogonal: A and B of orthogonal rows. Of virtual tokens default:
  # normal; vocabulary: vectors of tokens drawn evenly; text: those of `init_text`; zero: zeros.
  init: str = "default"
  learning_rate_ratio: float | None = None  # Of B's to A's (LoRA+, Hayou et al., arXiv:2402.12354).
  bottleneck: int | None = None  # Width of bottlenecks; None: a sixteenth of the model's.
  activation: str = "relu"  # Inside bottlenecks; as model.activation.
  # Of what bottlenecks add; None: 1, and 4 of parallel ones.
  scale: float | None = None
  dtype: str = "float32"  # Of an adapter's parameters.
  virtual_tokens: int = 20  # Before each text.
  init_text: str | None = None  # Repeated, or cut, to as many tokens.
  init_tokens: tuple[int, ...] = ()  # What the tokenizer makes of `init_text`, or in its place.
  projection: bool = False  # prefix: written by a network of two layers, left out of what is saved.
  encoder: str = "mlp"  # ptuning: mlp, three layers; lstm, in both directions, and two layers.
  encoder_width: int | None = None  # Of these networks; None: that of what they write.
  encoder_layers: int = 2  # Of the lstm.
  # The frozen matrices in fewer bits: int8, int4 or nf4 (:GROUP), fp8 (QLoRA, Dettmers et al.,
  # arXiv:2305.14314); None: as they are.
  base_format: str | None = None

  def __post_init__(self):
    allowed_names = (
      ("method", METHODS), ("init", INITS), ("dtype", DTYPES), ("encoder", ENCODERS),
      ("activation", ACTIVATIONS),
    )  # fmt: skip
    for name, allowed in allowed_names:
      value = getattr(self, name)
      if value not in allowed:
        raise InputError(
          f"peft.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(str(value), allowed)}"
        )
    if self.rank < 1:
      raise InputError(f"peft.rank={self.rank} must be at least 1.")
    if self.bottleneck is not None and self.bottleneck < 1:
      raise InputError(f"peft.bottleneck={self.bottleneck} must be at least 1, or None.")
    for name in ("alpha", "scale"):
      value = getattr(self, name)
      if value is not None and not 0 < value < float("inf"):
        raise InputError(f"peft.{name}={value} must be a positive number, or None.")
    if not 0 <= self.dropout < 1:
      raise InputError(f"peft.dropout={self.dropout} must be at least 0 and below 1.")
    ratio = self.learning_rate_ratio
    if ratio is not None and not 0 < ratio < float("inf"):
      raise InputError(f"peft.learning_rate_ratio={ratio} must be a positive number, or None.")
    for name in ("targets", "freeze", "also"):
      if any(not pattern for pattern in getattr(self, name) or ()):
        raise InputError(f"peft.{name} has an empty pattern: name modules, or leave it out.")
    for name in ("ranks", "alphas"):
      self.numbers(name)
    self._check_effects()
    self._check_virtual()
    if self.base_format is not None:
      _check_format(self.base_format)

  def _check_effects(self):
    default: Any = type(self).__dataclass_fields__
    for name, methods in _READERS.items():
      if self.method not in methods and getattr(self, name) != default[name].default:
        raise InputError(
          f"peft.{name}={getattr(self, name)!r} has no effect on peft.method={self.method!r}: "
          f"remove it, or use {', '.join(methods)}."
        )

  def _check_virtual(self):
    for name in ("virtual_tokens", "encoder_width", "encoder_layers"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise InputError(f"peft.{name}={value} must be at least 1.")
    allowed = _BEGINNINGS.get(self.method, ("default",) if self.method in VIRTUAL else INITS[:4])
    if self.init not in allowed:
      raise InputError(
        f"peft.init={self.init!r} is not known to peft.method={self.method!r}: use one of "
        f"{', '.join(allowed)}."
      )
    told = self.init_text is not None or bool(self.init_tokens)
    if told != (self.init == "text"):
      raise InputError(
        "peft.init='text' needs peft.init_text, a text that the prompt begins as."
        if not told else f"peft.init_text has no effect on peft.init={self.init!r}: use 'text'."
      )  # fmt: skip
    if self.encoder_width is not None and self.method == "prefix" and not self.projection:
      raise InputError(
        f"peft.encoder_width={self.encoder_width} has no effect without peft.projection: remove it."
      )
    if self.encoder_layers != 2 and self.encoder != "lstm":
      raise InputError(
        f"peft.encoder_layers={self.encoder_layers} has no effect on an encoder of three layers: "
        "remove it, or use peft.encoder='lstm'."
      )

  @property
  def before_texts(self) -> int:
    """Virtual tokens that rows hold before each text: those of prompts."""
    return self.virtual_tokens if self.method in ("prompt", "ptuning") else 0

  @property
  def trains_all(self) -> bool:
    """Whether nothing is frozen."""
    return self.method == "full" and not self.targets and not self.freeze

  @property
  def adds(self) -> bool:
    """Whether the method adds parameters."""
    return self.method in ADAPTERS

  def numbers(self, name: str) -> tuple[tuple[str, float], ...]:
    """(pattern, number) of `ranks` or `alphas`, in order."""
    given = {"ranks": self.ranks, "alphas": self.alphas}[name]
    return tuple(_number(name, one) for one in given)


def _check_format(name: str) -> None:
  try:
    format = Format.parse(name)
  except InputError as error:
    raise InputError(str(error).replace("quantize=", "peft.base_format=", 1)) from error
  if format.dynamic:
    raise InputError(
      f"peft.base_format={name!r} rounds activations, which lets no gradient through: use "
      f"{format.kind!r}."
    )


def _number(name: str, text: str) -> tuple[str, float]:
  pattern, equals, value = text.rpartition("=")
  try:
    number = float(value)
  except ValueError:
    number = 0.0
  whole = name != "ranks" or number == int(number) if number < float("inf") else False
  if not (equals and pattern and number > 0 and whole):
    kind = "rank" if name == "ranks" else "alpha"
    raise InputError(
      f"peft.{name} has {text!r}: 'pattern={kind}' with a positive {kind} is needed."
    )
  return pattern, number


def from_dict(values: dict[str, Any]) -> PeftConfig:
  """A config as it is stored with a run."""
  made: dict[str, Any] = {k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
          for k, v in values.items()}  # fmt: skip
  return PeftConfig(**made)
