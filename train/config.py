"""Config: everything that decides a run, as typed dataclasses."""

import dataclasses
from typing import Any

from model.annotations import is_of
from model.config import ModelConfig
from model.errors import InputError, nearest
from model.peft.config import PeftConfig
from model.quant import Format
from train.config_objective import ObjectiveConfig
from train.config_optimizer import OptimizerConfig

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
  chat_template: str | None = None  # File in the place of the tokenizer's own; "none": no chats.
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


@dataclasses.dataclass(slots=True, kw_only=True)
class MeshConfig:
  """How many devices each mesh axis has; None on one axis: all that are left."""

  data: int | None = None  # Copies of the parameters, each with rows of its own.
  fsdp: int | None = 1  # Parameters and moments are split, and gathered layer by layer (ZeRO-3).
  tensor: int | None = 1  # Heads and MLPs are split.
  seq: int | None = 1  # Texts are split along their length (context parallelism).
  expert: int | None = 1  # Experts are split, and tokens travel to theirs.
  stage: int | None = 1  # Layers are split: a pipeline.
  slices: int | None = 1  # Data parallelism between TPU slices, over the data-center network.

  def __post_init__(self):
    sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    for name, size in sizes.items():
      if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(f"mesh.{name}={size!r} must be a whole number of at least 1, or None.")
    free = [name for name, size in sizes.items() if size is None]
    if len(free) > 1:
      raise InputError(f"mesh: only one axis can take the rest; {' and '.join(free)} are None.")


@dataclasses.dataclass(slots=True, kw_only=True)
class QuantizeConfig:
  """Quantization-aware training: the run learns what `model.load(workdir, quantize=format)` gives.

  Validation is always that of the quantized model, so that what is best stays comparable.
  """

  format: str | None = None  # As `model.load` takes it; None: an ordinary run.
  start_step: int = 0  # Steps that are taken without, first.

  def __post_init__(self):
    if self.format is not None:
      try:
        Format.parse(self.format)
      except InputError as error:
        raise InputError(str(error).replace("quantize=", "quantize.format=", 1)) from error
    if self.start_step < 0:
      raise InputError(f"quantize.start_step={self.start_step} must be at least 0.")
    if self.start_step and self.format is None:
      raise InputError(
        f"quantize.start_step={self.start_step} has no effect without quantize.format: name one."
      )


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
  barrier_seconds: float = 600.0  # How long processes wait for one that is missing, then all end.
  profile_steps: tuple[int, int] | None = None  # Trace the steps a <= step < b.
  wandb_project: str | None = None  # Also log to Weights & Biases.
  sample_prompt: str = ""  # What the sample after the last step begins with, or its masks are in.
  cache_dir: str = "~/.cache/triune"
  cache_gib: float = 50.0  # Oldest caches are removed beyond this size, in GiB.
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  peft: PeftConfig = dataclasses.field(default_factory=PeftConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)

  def __post_init__(self):
    if self.target_len is not None and self.target_len < 1:
      raise InputError(f"target_len={self.target_len} must be at least 1, or None.")
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
    if not 1 <= self.barrier_seconds <= 86_400:
      raise InputError(
        f"barrier_seconds={self.barrier_seconds} must be from 1 to 86400, a day: so long do "
        "processes wait for one another."
      )
    if self.wandb_project == "":
      raise InputError("wandb_project is empty: name a project, or leave it out.")
    if self.quantize.start_step >= self.steps:
      raise InputError(
        f"quantize.start_step={self.quantize.start_step} is not below steps={self.steps}: no step "
        "would learn to be quantized."
      )
    if self.quantize.format is not None and not self.peft.trains_all:
      raise InputError(
        f"quantize.format={self.quantize.format!r} learns all of a model for fewer bits, and peft."
        f"method={self.peft.method!r} trains a part of it: leave one of them out."
      )
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
    if not is_of(value, field.type):
      wanted = getattr(field.type, "__name__", str(field.type))
      raise InputError(f"{name}={value!r} is a {type(value).__name__}; {wanted} is needed.")
    if dataclasses.is_dataclass(value):
      inner[field.name] = checked(value, f"{name}.")
  return dataclasses.replace(config, **inner)
