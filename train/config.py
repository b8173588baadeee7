"""Config: everything that decides a run, as typed dataclasses."""

import dataclasses
import types
import typing
from typing import Any

from model.config import ModelConfig
from model.errors import InputError, nearest
from train.denoisers import parse_denoisers

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")
DOCUMENTS = ("file", "paragraph", "line")


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """Where the text comes from and how it becomes rows."""

  source: str = "python_stdlib"
  validation_source: str | None = None  # None: the last part of the corpus.
  validation_target: str | None = None  # As `target`, of the validation source; None: the same.
  validation_fraction: float = 0.05  # Share of the corpus' tokens, where no source is given.
  tokenizer: str = "bpe:4096"
  packing: bool = True
  documents: str = "file"  # What one document of a text file is: the file, a paragraph, a line.
  text: str = "text"  # Column or feature that holds the text (span QA: the question).
  text_pair: str | None = None  # Column of the second text of a pair (span QA: what is read).
  target: str | None = None  # Column, or parallel text file, that holds what is to be written.
  negative: str | None = None  # Column of a text that is unlike `text` (contrastive).
  label: str | None = None  # Column of the label, number or answer.
  labels: tuple[str, ...] | None = None  # Their order; None: the training values, sorted.
  max_texts: int | None = None  # Pieces that a row holds at most, of objectives on whole texts.
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
    if self.max_texts is not None and self.max_texts < 1:
      raise InputError(f"data.max_texts={self.max_texts} must be at least 1, or None.")
    if self.labels is not None and len(set(self.labels)) != len(self.labels):
      raise InputError(f"data.labels={self.labels} names a label twice.")


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


# UL2 (arXiv:2205.05131, table 1): kind, mean length of a span (S: of all text), share of noise.
UL2_DENOISERS = ("R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25")
# What each objective reads besides the fields that all read, and its values where the config has
# None.
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {
  "causal_lm": {},
  "prefix_lm": {},
  "masked_lm": dict(
    mask_rate=0.15, mask_unit="token", max_ngram=3, mask_share=0.8, random_share=0.1, pairs="none",
  ),
  "replaced_token": dict(
    mask_rate=0.15, mask_unit="token", max_ngram=3, mask_share=0.85, random_share=0.0,
    generator_share=0.25, replaced_weight=50.0,
  ),
  "span_corruption": dict(mask_rate=0.15, mean_span=3.0),
  "denoising": dict(mask_rate=0.3, mean_span=3.0, permute_sentences=True),
  "ul2": dict(denoisers=UL2_DENOISERS),
  "seq2seq": {},
  "classification": {},
  "tagging": {},
  "span_qa": dict(stride=128),
  "contrastive": dict(temperature=0.05),
}  # fmt: skip
OBJECTIVES = tuple(OBJECTIVE_SETTINGS)
MASK_UNITS = ("token", "word", "ngram")
PAIRS = ("none", "next_sentence", "sentence_order")


@dataclasses.dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
  """What is learned.

  Every objective reads `z_loss` and `label_smoothing` where its targets are tokens or labels; of
  the others each has its own values (None; see OBJECTIVE_SETTINGS), and one that the chosen
  objective does not read is refused.
  """

  name: str = "causal_lm"
  z_loss: float = 0.0  # Weight of log² of the softmax normalizer (PaLM uses 1e-4).
  label_smoothing: float = 0.0
  mask_rate: float | None = None  # Share of the tokens that are masked, replaced or left out.
  mask_unit: str | None = None  # What is masked together: a token, a word, an n-gram of words.
  max_ngram: int | None = None  # Words of the longest n-gram.
  mask_share: float | None = None  # Of the chosen tokens: those that the mask stands for.
  random_share: float | None = None  # Of the chosen tokens: those that a random one stands for.
  pairs: str | None = None  # Two texts a piece: does the second follow, or are they in order?
  generator_share: float | None = None  # Width of the generator, of the discriminator's (ELECTRA).
  replaced_weight: float | None = None  # Of the discriminator's loss beside the generator's.
  mean_span: float | None = None  # Mean length of a span, in tokens.
  permute_sentences: bool | None = None  # BART: sentences in random order.
  denoisers: tuple[str, ...] | None = None  # UL2: KIND:MEAN_SPAN:RATE, S:RATE.
  stride: int | None = None  # Tokens that two windows on one text share.
  temperature: float | None = None  # Divides similarities of embeddings.

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
    self._check_effects()
    self._check_values()

  def resolved(self) -> "ObjectiveConfig":
    """This, with the objective's own values in the place of None."""
    own = OBJECTIVE_SETTINGS[self.name]
    return dataclasses.replace(self, **{k: v for k, v in own.items() if getattr(self, k) is None})

  @property
  def paired(self) -> bool:
    """Whether two texts make a piece."""
    return (self.pairs or OBJECTIVE_SETTINGS[self.name].get("pairs", "none")) != "none"

  def _check_effects(self):
    everything = {name for settings in OBJECTIVE_SETTINGS.values() for name in settings}
    for name in sorted(everything - OBJECTIVE_SETTINGS[self.name].keys()):
      if getattr(self, name) is not None:
        readers = [k for k, v in OBJECTIVE_SETTINGS.items() if name in v]
        raise InputError(
          f"objective.{name}={getattr(self, name)!r} has no effect on {self.name}: remove it, or "
          f"use {', '.join(readers)}."
        )

  def _check_values(self):
    for name, allowed in (("mask_unit", MASK_UNITS), ("pairs", PAIRS)):
      value = getattr(self, name)
      if value is not None and value not in allowed:
        raise InputError(
          f"objective.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(value, allowed)}"
        )
    if self.mask_rate is not None and not 0 < self.mask_rate < 1:
      raise InputError(f"objective.mask_rate={self.mask_rate} must lie between 0 and 1.")
    shares = self.mask_share or 0.0, self.random_share or 0.0
    if min(shares) < 0 or sum(shares) > 1:
      raise InputError(
        f"objective.mask_share={shares[0]} and random_share={shares[1]} are shares of the chosen "
        "tokens: each is at least 0 and together they are at most 1."
      )
    if self.generator_share is not None and not 0 < self.generator_share <= 1:
      raise InputError(f"objective.generator_share={self.generator_share}: use 0 < s <= 1.")
    for name in ("mean_span", "max_ngram", "stride"):
      value = getattr(self, name)
      if value is not None and not 1 <= value < float("inf"):
        raise InputError(f"objective.{name}={value} must be at least 1.")
    if self.denoisers is not None:
      parse_denoisers(self.denoisers)
    for name in ("temperature", "replaced_weight"):
      value = getattr(self, name)
      if value is not None and not 0 < value < float("inf"):
        raise InputError(f"objective.{name}={value} must be a positive number.")


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
  seq_len: int = 256  # Tokens per sequence; of an encoder–decoder those that the encoder reads.
  target_len: int | None = None  # Tokens per sequence that an encoder–decoder's decoder reads.
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
  sample_prompt: str = ""  # What the sample after the last step begins with, or its masks are in.
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
  if origin is tuple and not isinstance(value, tuple):
    return False
  if origin is tuple:
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    return len(value) == len(kinds) and all(map(_is_of, value, kinds))
  if kind in (int, float):
    return isinstance(value, int | kind) and not isinstance(value, bool)
  return isinstance(value, kind)
