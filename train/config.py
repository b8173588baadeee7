"""Config: everything that decides a run, as typed dataclasses."""

import dataclasses
import types
import typing
from typing import Any

from model.config import ModelConfig
from model.errors import InputError, nearest

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")
OBJECTIVES = ("causal_lm",)
DOCUMENTS = ("file", "paragraph", "line")


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """Where the text comes from and how it becomes rows."""

  source: str = "python_stdlib"
  validation_source: str | None = None  # None: the last part of the corpus.
  validation_fraction: float = 0.05  # Share of the corpus' tokens, where no source is given.
  tokenizer: str = "bpe:4096"
  packing: bool = True
  documents: str = "file"  # What one document of a text file is: the file, a paragraph, a line.
  text: str = "text"  # Column or feature that holds the text.
  data_dir: str | None = None  # Where TFDS data sets lie; None: TFDS's own default.
  truncate: bool = False  # Cut documents at seq_len instead of splitting them; counted.
  workers: int = 2  # Threads that build rows ahead of the step.

  def __post_init__(self):
    if self.documents not in DOCUMENTS:
      raise InputError(
        f"data.documents={self.documents!r} is not known: use one of {', '.join(DOCUMENTS)}."
        f"{nearest(self.documents, DOCUMENTS)}"
      )
    if not 0 <= self.validation_fraction < 1:
      raise InputError(
        f"data.validation_fraction={self.validation_fraction} must be at least 0 and below 1."
      )
    if self.workers < 1:
      raise InputError(f"data.workers={self.workers} must be at least 1.")


# What each optimizer reads of b1, b2 and eps, and its values where the config has None.
OPTIMIZER_MOMENTS = {
  "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
  "adafactor": {"eps": 1e-30},
  "lion": {"b1": 0.9, "b2": 0.99},
  "muon": {"b1": 0.95, "b2": 0.95, "eps": 1e-8},
  "sgd": {"b1": 0.9},
}


@dataclasses.dataclass(slots=True, kw_only=True)
class OptimizerConfig:
  """How parameters change. Lengths count optimizer updates.

  Every optimizer reads all fields but `b1`, `b2` and `eps`: of these each has its own values (None;
  see OPTIMIZER_MOMENTS), and one that the chosen optimizer does not read is refused. So are
  `final_fraction` and `decay_steps` where the schedule does not read them.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3  # Peak. Adafactor's is relative to the rms of each matrix.
  schedule: str = "cosine"
  warmup_steps: int = 100
  decay_steps: int | None = None  # wsd: length of the decay; None: a tenth of the run.
  final_fraction: float = 0.1  # cosine, linear, wsd: the share of the peak where the run ends.
  weight_decay: float = 0.1  # Times the learning rate; on matrices and embeddings only.
  b1: float | None = None  # Momentum of adamw, lion, sgd and of muon's matrices.
  b2: float | None = None  # Second moment of adamw and of muon's AdamW; memory of lion.
  eps: float | None = None  # Keeps adamw, muon and (on squares) adafactor from dividing by 0.
  clip_norm: float | None = 1.0  # Largest global norm of a gradient; None: no clipping.
  # Skip an update whose gradient norm exceeds this many times its running mean; None: never.
  skip_spikes: float | None = None

  def __post_init__(self):
    for name, allowed in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
      value = getattr(self, name)
      if value not in allowed:
        raise InputError(
          f"optimizer.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(value, allowed)}"
        )
    self._check_numbers()
    self._check_effects()

  def moments(self) -> dict[str, float]:
    """Those of b1, b2 and eps that the optimizer reads, its own values where they are None."""
    own = OPTIMIZER_MOMENTS[self.name]
    return {k: v if getattr(self, k) is None else getattr(self, k) for k, v in own.items()}

  def _check_numbers(self):
    for name in ("learning_rate", "eps", "clip_norm", "skip_spikes"):
      value = getattr(self, name)
      optional = name != "learning_rate"
      if not (optional and value is None) and not 0 < value < float("inf"):
        none = ", or None" if optional else ""
        raise InputError(f"optimizer.{name}={value} must be a positive number{none}.")
    for name in ("b1", "b2"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < 1:
        raise InputError(f"optimizer.{name}={value} must be at least 0 and below 1, or None.")
    if self.warmup_steps < 0:
      raise InputError(f"optimizer.warmup_steps={self.warmup_steps} must be at least 0.")
    if self.decay_steps is not None and self.decay_steps < 1:
      raise InputError(f"optimizer.decay_steps={self.decay_steps} must be at least 1, or None.")
    if not 0 <= self.final_fraction <= 1:
      raise InputError(f"optimizer.final_fraction={self.final_fraction} must lie between 0 and 1.")
    if not 0 <= self.weight_decay < float("inf"):
      raise InputError(f"optimizer.weight_decay={self.weight_decay} must be at least 0.")
    if self.skip_spikes is not None and self.skip_spikes <= 1:
      raise InputError(
        f"optimizer.skip_spikes={self.skip_spikes} must be above 1, or ordinary updates are "
        "skipped: 4 or more is usual."
      )

  def _check_effects(self):
    for name in ("b1", "b2", "eps"):
      if getattr(self, name) is not None and name not in OPTIMIZER_MOMENTS[self.name]:
        readers = [k for k, v in OPTIMIZER_MOMENTS.items() if name in v]
        raise InputError(
          f"optimizer.{name}={getattr(self, name)} has no effect on {self.name}: remove it, or use "
          f"{', '.join(readers)}."
        )
    if self.decay_steps is not None and self.schedule != "wsd":
      raise InputError("optimizer.decay_steps has an effect only with optimizer.schedule='wsd'.")
    default = type(self).__dataclass_fields__["final_fraction"].default
    if self.schedule in ("constant", "inverse_sqrt") and self.final_fraction != default:
      raise InputError(
        f"optimizer.final_fraction={self.final_fraction} has no effect on "
        f"optimizer.schedule={self.schedule!r}: remove it, or use cosine, linear or wsd."
      )


@dataclasses.dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
  """What is learned."""

  name: str = "causal_lm"
  z_loss: float = 0.0  # Weight of log² of the softmax normalizer (PaLM uses 1e-4).
  label_smoothing: float = 0.0

  def __post_init__(self):
    if self.name not in OBJECTIVES:
      raise InputError(
        f"objective.name={self.name!r} is not known: use one of {', '.join(OBJECTIVES)}."
        f"{nearest(self.name, OBJECTIVES)}"
      )
    if not 0 <= self.label_smoothing < 1:
      raise InputError(f"objective.label_smoothing={self.label_smoothing}: use 0 <= s < 1.")
    if not 0 <= self.z_loss < float("inf"):
      raise InputError(f"objective.z_loss={self.z_loss} must be at least 0.")


@dataclasses.dataclass(slots=True, kw_only=True)
class MeshConfig:
  """How many devices each mesh axis has; None on one axis: all that are left."""

  data: int | None = None
  fsdp: int | None = 1
  tensor: int | None = 1

  def __post_init__(self):
    sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
    for name, size in sizes.items():
      if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(f"mesh.{name}={size!r} must be a whole number of at least 1, or None.")
    free = [name for name, size in sizes.items() if size is None]
    if len(free) > 1:
      raise InputError(f"mesh: only one axis can take the rest; {' and '.join(free)} are None.")


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
  """One run. Intervals and lengths count optimizer steps."""

  steps: int = 1000
  seed: int = 0
  batch_size: int = 32  # Sequences per step, over all devices and accumulated parts.
  seq_len: int = 256  # Tokens per sequence.
  accumulation: int = 1  # Parts that a batch is computed in, one after the other.
  log_every: int = 1
  eval_every: int = 100
  eval_batches: int | None = None  # None: the whole validation set.
  checkpoint_every: int = 500
  keep_checkpoints: int = 2  # Newest ones; the best by validation loss is kept besides.
  init_from: str | None = None  # Any checkpoint PATH to take parameters from.
  ema_decay: float | None = None  # Also keep a moving average of the parameters.
  max_bad_steps: int = 20  # Non-finite steps in a row that end the run.
  profile_steps: tuple[int, int] | None = None  # Trace the steps a <= step < b.
  wandb_project: str | None = None  # Also log to Weights & Biases.
  sample_prompt: str = ""  # What the sample after the last step begins with.
  cache_dir: str = "~/.cache/triune"
  cache_gib: float = 50.0  # Oldest caches are removed beyond this size, in GiB.
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def __post_init__(self):
    for name in ("steps", "batch_size", "seq_len", "accumulation", "log_every", "eval_every",
                 "checkpoint_every", "keep_checkpoints", "max_bad_steps"):  # fmt: skip
      if getattr(self, name) < 1:
        raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
    if self.batch_size % self.accumulation:
      raise InputError(
        f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}: "
        "each part must hold the same number of sequences."
      )
    limit = self.model.max_positions
    if limit is not None and self.seq_len > limit:
      raise InputError(
        f"seq_len={self.seq_len} is longer than model.max_positions={limit}: shorten the "
        "sequences or give the model more positions."
      )
    if self.ema_decay is not None and not 0 < self.ema_decay < 1:
      raise InputError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be None.")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed={self.seed} must be a whole number from 0 to 2**32 - 1.")
    if self.eval_batches is not None and self.eval_batches < 1:
      raise InputError(f"eval_batches={self.eval_batches} must be at least 1, or None for all.")
    traced = self.profile_steps
    if traced is not None and (len(traced) != 2 or not 0 <= traced[0] < traced[1]):
      raise InputError(f"profile_steps={traced} must be (first, end), first < end.")
    if self.wandb_project == "":
      raise InputError("wandb_project is empty: name a project, or leave it out.")
    if not self.cache_gib > 0:
      raise InputError(f"cache_gib={self.cache_gib} must be positive.")


def checked(config: Any, prefix: str = "") -> Any:
  """Rebuilds a config tree so that each __post_init__ sees the command line.

  Raises:
    InputError: for a value that is not of its field's type, or that a check refuses.
  """
  inner = {}
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    if not _is_of(value, field.type):
      wanted = getattr(field.type, "__name__", str(field.type))
      raise InputError(f"{name}={value!r} is a {type(value).__name__}; {wanted} is needed.")
    if dataclasses.is_dataclass(value):
      inner[field.name] = checked(value, f"{name}.")
  return dataclasses.replace(config, **inner)


def _is_of(value: Any, kind: Any) -> bool:
  """Whether a value is of an annotated type. A whole number is a float too, a bool is no number."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(_is_of(value, k) for k in args)
  if origin is tuple:
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
  if kind in (int, float):
    return isinstance(value, int | kind) and not isinstance(value, bool)
  return isinstance(value, kind)
