"""PeftConfig: what of a model is trained when the rest of it stays as it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from model.errors import InputError, nearest
from model.quant_formats import Format

METHODS = ("full", "bitfit", "lora", "dora", "ia3")
ADAPTERS = ("lora", "dora", "ia3")  # Methods that add parameters to a model.
LOW_RANK = ("lora", "dora")
INITS = ("default", "gaussian", "pissa", "orthogonal")
DTYPES = ("float32", "bfloat16", "float64")

# Which methods read a field; those that are not here are read by all.
_READERS = {
  **dict.fromkeys(("rank", "dropout", "rslora", "init", "ranks", "alpha", "alphas"), LOW_RANK),
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
  arXiv:2402.09353); ia3 (Liu et al., arXiv:2205.05638).
  """

  method: str = "full"
  # Where; (): full, all; bitfit, all biases; lora and dora, every matrix of attention, MLPs and
  # experts; ia3, keys, values and what MLPs read last.
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
  # al., arXiv:2404.02948); orthogonal: A and B of orthogonal rows.
  init: str = "default"
  learning_rate_ratio: float | None = None  # Of B's to A's (LoRA+, Hayou et al., arXiv:2402.12354).
  dtype: str = "float32"  # Of an adapter's parameters.
  # The frozen matrices in fewer bits: int8, int4 or nf4 (:GROUP), fp8 (QLoRA, Dettmers et al.,
  # arXiv:2305.14314); None: as they are.
  base_format: str | None = None

  def __post_init__(self):
    for name, allowed in (("method", METHODS), ("init", INITS), ("dtype", DTYPES)):
      value = getattr(self, name)
      if value not in allowed:
        raise InputError(
          f"peft.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(str(value), allowed)}"
        )
    if self.rank < 1:
      raise InputError(f"peft.rank={self.rank} must be at least 1.")
    if self.alpha is not None and not 0 < self.alpha < float("inf"):
      raise InputError(f"peft.alpha={self.alpha} must be a positive number, or None.")
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
