"""ModelConfig: one flat typed dataclass for every model, whatever its shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.errors import InputError, nearest

SHAPES = ("decoder",)
POSITIONS = ("learned", "sinusoidal", "rotary", "t5_bias", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "output")
RESIDUALS = ("serial", "parallel", "parallel_two_norms")
QK_NORMS = ("none", "head", "full")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "silu")
REMAT = ("none", "full", "dots", "attention", "offload")
ATTENTION_KERNELS = ("auto", "xla", "cudnn", "splash")
EXPERT_KERNELS = ("ragged", "dense")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
PARAM_DTYPES = ("float32", "bfloat16", "float64")
LAYER_WORDS = ("global", "local", "experts", "nope")


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What one layer is. `window` counts the tokens a query sees, itself included (None: all)."""

  window: int | None
  experts: bool
  rotary: bool


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A transformer. Sizes count elements, lengths count tokens.

  A word of `layer_pattern` describes one layer: `global` or `local` (windowed) attention, then
  `+experts` for a mixture of experts in place of the MLP and `+nope` for no rotary positions. The
  pattern repeats after `layer_prefix` until `num_layers` layers are named.
  """

  # Size.
  shape: str = "decoder"
  vocab_size: int | None = None  # None: as many as the tokenizer has.
  vocab_multiple: int = 128  # Rows of the table are padded to a multiple; never predicted.
  num_layers: int = 12
  d_model: int = 768
  d_ff: int = 3072
  num_heads: int = 12
  num_kv_heads: int | None = None  # None: num_heads (MHA); 1 is MQA; a divisor is GQA.
  head_dim: int | None = None  # None: d_model / num_heads.
  max_positions: int | None = 1024  # The longest sequence; None: no limit.
  layer_prefix: tuple[str, ...] = ()
  layer_pattern: tuple[str, ...] = ("global",)

  # Positions.
  positions: str = "rotary"
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None  # Base of local layers, unscaled; None: as the others.
  rope_fraction: float = 1.0  # Share of the head width that rotates.
  rope_interleaved: bool = False  # Pairs (0,1),(2,3)… (GPT-J) instead of halves (NeoX, Llama).
  rope_scaling: str = "none"
  rope_factor: float = 1.0
  rope_original_positions: int | None = None  # Length before scaling (dynamic, YaRN, Llama-3).
  rope_low_freq_factor: float = 1.0  # Llama-3.
  rope_high_freq_factor: float = 4.0  # Llama-3.
  rope_beta_fast: float = 32.0  # YaRN.
  rope_beta_slow: float = 1.0  # YaRN.
  rope_attention_factor: float | None = None  # YaRN; None: 0.1 ln(rope_factor) + 1.
  relative_buckets: int = 32  # T5.
  relative_max_distance: int = 128  # T5.

  # Attention.
  window: int | None = None  # Tokens that a local layer sees, the query's own included.
  attention_scale: float | None = None  # None: head_dim ** -0.5.
  attention_softcap: float | None = None
  attention_sinks: bool = False
  qk_norm: str = "none"
  attention_bias: bool = False  # On q, k, v.
  attention_out_bias: bool = False
  residual: str = "serial"

  # Norms and embeddings.
  norm: str = "rms"
  norm_placement: str = "pre"
  norm_eps: float = 1e-5
  norm_offset: bool = False  # The scale is stored as its difference from 1 (Gemma).
  norm_bias: bool = True  # Of layer norms.
  embed_norm: bool = False
  final_norm: bool = True
  tie_embeddings: bool = True
  scale_embeddings: bool = False  # By √d_model.
  logit_softcap: float | None = None
  logit_bias: bool = False

  # MLP and experts.
  activation: str = "silu"
  gated: bool = True
  mlp_bias: bool = False
  num_experts: int = 0
  experts_per_token: int = 2
  shared_experts: int = 0  # Experts that every token uses, as one MLP of that many widths.
  d_expert: int | None = None  # Width of an expert; None: d_ff.
  router_scores: str = "softmax"
  router_renormalize: bool = True  # The chosen experts' weights sum to 1.
  balance_loss: float = 0.01
  router_z_loss: float = 0.001

  # Initialization and regularization.
  init_std: float = 0.02
  init_residual_scale: bool = True  # Output projections by 1/√(2·layers) (GPT-2).
  dropout: float = 0.0
  attention_dropout: float = 0.0

  # Execution: these change how the same function is computed.
  dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU.
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"
  expert_kernel: str = "ragged"

  def __post_init__(self):
    _check_choices(self)
    _check_sizes(self)
    _check_positions(self)
    _check_layers(self)

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads, the default resolved."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """Width of one head, the default resolved."""
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def expert_width(self) -> int:
    """Width of one expert, the default resolved."""
    return self.d_ff if self.d_expert is None else self.d_expert

  @property
  def real_vocab(self) -> int:
    """`vocab_size`, which must be known by now.

    Raises:
      InputError: while it is None.
    """
    if self.vocab_size is None:
      raise InputError("model.vocab_size is not set and no tokenizer has set it: give a number.")
    return self.vocab_size

  @property
  def padded_vocab(self) -> int:
    """Rows of the embedding table: `real_vocab` rounded up to `vocab_multiple`."""
    return -(-self.real_vocab // self.vocab_multiple) * self.vocab_multiple

  @property
  def compute_dtype(self) -> jnp.dtype:
    """Dtype of activations and matrix products on this machine."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if self.dtype == "auto" else self.dtype)

  def layers(self) -> tuple[LayerKind, ...]:
    """The kind of each layer, first to last."""
    words = list(self.layer_prefix)
    while len(words) < self.num_layers:
      words.extend(self.layer_pattern)
    return tuple(_layer_kind(self, w) for w in words[: self.num_layers])

  def groups(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """Runs of equal repeats: `(pattern, repeats)` for the prefix, the repeats and the remainder."""
    kinds = self.layers()
    start, size = len(self.layer_prefix), len(self.layer_pattern)
    repeats = max(0, (self.num_layers - start) // size)
    middle = start + repeats * size
    parts = ((kinds[:start], 1), (kinds[start : start + size], repeats), (kinds[middle:], 1))
    return tuple((pattern, n) for pattern, n in parts if pattern and n)

  def num_params(self) -> int:
    """Parameters that `model.load` of such a checkpoint holds, without vocabulary padding."""
    from model.heads import count_params  # The modules are the one declaration of parameters.

    return count_params(self)

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
    """The inverse of `to_dict`.

    Raises:
      InputError: for an unknown field, with the nearest names.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
      if name not in known:
        raise InputError(f"model config: unknown field {name!r}.{nearest(name, known)}")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**plain)


EXECUTION_FIELDS = ("dtype", "scan_layers", "remat", "attention_kernel", "expert_kernel",
                    "dropout", "attention_dropout", "balance_loss", "router_z_loss",
                    "init_std", "init_residual_scale", "param_dtype")  # fmt: skip


def architecture(cfg: ModelConfig) -> dict[str, Any]:
  """The fields that decide what the parameters mean: two checkpoints that differ here differ."""
  return {k: v for k, v in cfg.to_dict().items() if k not in EXECUTION_FIELDS}


def _layer_kind(cfg: ModelConfig, word: str) -> LayerKind:
  parts = word.split("+")
  local = "local" in parts
  return LayerKind(
    window=cfg.window if local else None,
    experts="experts" in parts,
    rotary=cfg.positions == "rotary" and "nope" not in parts,
  )


def _check_choices(cfg: ModelConfig) -> None:
  choices = dict(
    shape=SHAPES, positions=POSITIONS, rope_scaling=ROPE_SCALINGS, norm=NORMS,
    norm_placement=NORM_PLACEMENTS, residual=RESIDUALS, qk_norm=QK_NORMS, activation=ACTIVATIONS,
    remat=REMAT, attention_kernel=ATTENTION_KERNELS, expert_kernel=EXPERT_KERNELS, dtype=DTYPES,
    param_dtype=PARAM_DTYPES, router_scores=("softmax", "sigmoid"),
  )  # fmt: skip
  for name, allowed in choices.items():
    value = getattr(cfg, name)
    if value not in allowed:
      raise InputError(
        f"model.{name}={value!r} is not known: use one of {', '.join(allowed)}."
        f"{nearest(str(value), allowed)}"
      )


def _check_sizes(cfg: ModelConfig) -> None:
  optional = ("vocab_size", "num_kv_heads", "head_dim", "max_positions", "window", "d_expert",
              "rope_original_positions")  # fmt: skip
  sizes = ("num_layers", "d_model", "d_ff", "num_heads", "vocab_multiple", "experts_per_token",
           "relative_buckets", "relative_max_distance")  # fmt: skip
  for name in (*sizes, *optional):
    value = getattr(cfg, name)
    if value is None and name in optional:
      continue
    if not isinstance(value, int) or value < 1:
      raise InputError(f"model.{name}={value!r} must be a whole number of at least 1.")
  for name in ("dropout", "attention_dropout"):
    if not 0 <= getattr(cfg, name) < 1:
      raise InputError(f"model.{name}={getattr(cfg, name)} is a probability: use 0 <= p < 1.")
  positive = ("attention_softcap", "logit_softcap", "attention_scale", "norm_eps", "init_std",
              "rope_theta", "rope_local_theta", "rope_factor", "rope_attention_factor",
              "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast",
              "rope_beta_slow")  # fmt: skip
  for name in positive:
    value = getattr(cfg, name)
    if value is not None and not 0 < value < float("inf"):
      raise InputError(f"model.{name}={value} must be a positive number.")
  for name in ("num_experts", "shared_experts", "balance_loss", "router_z_loss"):
    if not 0 <= getattr(cfg, name) < float("inf"):
      raise InputError(f"model.{name}={getattr(cfg, name)} must be at least 0.")
  if cfg.head_dim is None and cfg.d_model % cfg.num_heads:
    raise InputError(
      f"model.d_model={cfg.d_model} is not a multiple of num_heads={cfg.num_heads}: "
      "change one of them or set model.head_dim."
    )
  if cfg.num_heads % cfg.kv_heads:
    raise InputError(
      f"model.num_heads={cfg.num_heads} is not a multiple of num_kv_heads={cfg.kv_heads}: every "
      "key/value head must serve the same number of query heads. Use num_kv_heads=num_heads "
      "(MHA), 1 (MQA) or a divisor (GQA)."
    )


def _check_positions(cfg: ModelConfig) -> None:
  if cfg.positions in ("learned",) and cfg.max_positions is None:
    raise InputError("model.positions='learned' needs model.max_positions: the table's length.")
  if cfg.positions == "rotary":
    rotated = int(cfg.head_width * cfg.rope_fraction)
    if not 0 < cfg.rope_fraction <= 1 or rotated < 2 or rotated % 2:
      raise InputError(
        f"model.rope_fraction={cfg.rope_fraction} of head_dim={cfg.head_width} rotates {rotated} "
        "elements: it must be an even number of at least 2 and at most the head width."
      )
  scaled = cfg.rope_scaling != "none"
  if scaled and cfg.rope_factor < 1:
    raise InputError(f"model.rope_factor={cfg.rope_factor} must be at least 1.")
  if cfg.rope_scaling in ("dynamic", "yarn", "llama3") and cfg.rope_original_positions is None:
    raise InputError(
      f"model.rope_scaling={cfg.rope_scaling!r} needs model.rope_original_positions: the length "
      "that the model was trained on before scaling."
    )
  if not scaled and cfg.rope_factor != 1.0:
    raise InputError("model.rope_factor has no effect without model.rope_scaling: set one.")


def _check_layers(cfg: ModelConfig) -> None:
  if not cfg.layer_pattern:
    raise InputError("model.layer_pattern is empty: name at least one layer, for example 'global'.")
  if len(cfg.layer_prefix) > cfg.num_layers:
    raise InputError(f"model.layer_prefix names more than num_layers={cfg.num_layers} layers.")
  for word in (*cfg.layer_prefix, *cfg.layer_pattern):
    parts = word.split("+")
    unknown = [p for p in parts if p not in LAYER_WORDS]
    if unknown or ("global" in parts) == ("local" in parts):
      raise InputError(
        f"model.layer_pattern: {word!r} must be 'global' or 'local', then '+experts' and '+nope' "
        f"where wanted.{nearest(unknown[0], LAYER_WORDS) if unknown else ''}"
      )
    if "local" in parts and cfg.window is None:
      raise InputError("model.layer_pattern has local layers: set model.window, in tokens.")
    if "experts" in parts and not cfg.num_experts:
      raise InputError("model.layer_pattern has expert layers: set model.num_experts.")
  words = "+".join((*cfg.layer_prefix, *cfg.layer_pattern)).split("+")
  for name, word in (("window", "local"), ("num_experts", "experts")):
    if getattr(cfg, name) and word not in words:
      raise InputError(
        f"model.{name}={getattr(cfg, name)} has no effect: no word of model.layer_pattern has "
        f"{word!r}."
      )
  if cfg.num_experts and cfg.experts_per_token > cfg.num_experts:
    raise InputError(
      f"model.experts_per_token={cfg.experts_per_token} exceeds num_experts={cfg.num_experts}."
    )
