"""ModelConfig: one flat typed dataclass for every model, whatever its shape."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from model.errors import InputError, nearest
from model.sharding import platform

SHAPES = ("decoder", "encoder", "encoder_decoder")
POSITIONS = ("learned", "sinusoidal", "rotary", "t5_bias", "alibi", "disentangled", "none")
ROPE_SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3", "longrope")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "output")
RESIDUALS = ("serial", "parallel", "parallel_two_norms")
QK_NORMS = ("none", "head", "each", "full")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "silu", "tanh")
HEADS = ("language", "masked_lm", "replaced_token", "sequence", "token", "span", "embedding")
PROBLEMS = ("single_label", "multi_label", "regression")
POOLINGS = ("first", "last", "mean")
REMAT = ("none", "full", "dots", "attention", "offload")
CONTEXT_ATTENTION = ("gather", "ring")
ATTENTION_KERNELS = ("auto", "xla", "cudnn", "splash")
EXPERT_KERNELS = ("ragged", "dense")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
PARAM_DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYER_WORDS = ("global", "local", "experts", "nope", "unnormed", "conv")


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What one layer is.

  `window` counts the tokens a query sees, itself included where attention is causal (None: all).
  `cross` layers also attend to what an encoder has read. `normed` is False where attention takes
  the residual stream as it is, though others norm it before (the first layer of ModernBERT). `conv`
  adds a convolution of what the layer reads to what it gives (the first layer of DeBERTa-v2).
  """

  window: int | None
  experts: bool
  rotary: bool
  causal: bool
  cross: bool
  normed: bool
  conv: bool


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A transformer. Sizes count elements, lengths count tokens.

  A word of `layer_pattern` describes one layer: `global` or `local` (windowed) attention, then
  `+experts` for a mixture of experts in place of the MLP, `+nope` for no rotary positions,
  `+unnormed` for no norm before attention and `+conv` for a convolution beside the layer. The
  pattern repeats after `layer_prefix` until all layers are named, in the encoder and in the decoder
  alike, unless that has a `decoder_pattern`.
  """

  # Size.
  shape: str = "decoder"
  vocab_size: int | None = None  # None: as many as the tokenizer has.
  vocab_multiple: int = 128  # Rows of the table are padded to a multiple; never predicted.
  num_layers: int = 12  # Of the encoder, where there are two stacks.
  num_decoder_layers: int | None = None  # Encoder–decoders; None: num_layers.
  d_model: int = 768
  d_embed: int | None = None  # Of tables; a projection follows. None: d_model, and none does.
  d_ff: int = 3072
  num_heads: int = 12
  num_kv_heads: int | None = None  # None: num_heads (MHA); 1 is MQA; a divisor is GQA.
  head_dim: int | None = None  # None: d_model / num_heads.
  v_head_dim: int | None = None  # Of values; None: as queries and keys.
  max_positions: int | None = 1024  # The longest sequence; None: no limit.
  layer_prefix: tuple[str, ...] = ()
  layer_pattern: tuple[str, ...] = ("global",)
  decoder_pattern: tuple[str, ...] = ()  # Encoder–decoders: of the decoder; (): as the encoder.
  layer_sets: int | None = None  # Sets of parameters, each of as many layers in a row (ALBERT: 1).

  # Positions.
  positions: str = "rotary"
  position_offset: int = 0  # Learned rows or sinusoids before position 0 (BART, RoBERTa: 2).
  sinusoid_inclusive: bool = False  # Frequencies reach 1/10,000 (tensor2tensor, fairseq).
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None  # Base of local layers, unscaled; None: as the others.
  rope_fraction: float = 1.0  # Share of the head width that rotates.
  rope_interleaved: bool = False  # Pairs (0,1),(2,3)… (GPT-J) instead of halves (NeoX, Llama).
  rope_scaling: str = "none"
  rope_factor: float = 1.0
  rope_original_positions: int | None = None  # Length before scaling; linear needs none.
  rope_low_freq_factor: float = 1.0  # Llama-3.
  rope_high_freq_factor: float = 4.0  # Llama-3.
  rope_beta_fast: float = 32.0  # YaRN.
  rope_beta_slow: float = 1.0  # YaRN.
  rope_truncate: bool = True  # YaRN: its ramp begins and ends at whole dimensions.
  rope_short_factors: tuple[float, ...] | None = None  # LongRoPE, up to the original length.
  rope_long_factors: tuple[float, ...] | None = None  # LongRoPE, of longer texts: see positions.py.
  rope_attention_factor: float | None = None  # YaRN, LongRoPE; None: from rope_factor.
  alibi_scaled: bool = False  # ALiBi is scaled as the scores are (Falcon).
  alibi_rounded: bool = False  # Its terms are rounded to bfloat16 (Falcon).
  relative_buckets: int = 32  # T5, DeBERTa.
  relative_max_distance: int = 128  # T5, DeBERTa; half the buckets: each distance has one.
  relative_bias: bool = False  # T5's bias beside learned positions (MPNet).
  relative_bias_per_layer: bool = False  # Each layer has a table, not each stack (umT5).
  relative_scores: tuple[str, ...] = ("c2p", "p2c")  # What disentangled attention adds.
  relative_own_proj: bool = False  # Its positions have projections of their own in each layer.
  relative_norm: bool = False  # Of its vectors of positions.

  # Attention.
  window: int | None = None  # Tokens that a local layer sees, the query's own included.
  decoder_window: int | None = None  # The same of an encoder–decoder's decoder; None: window.
  attention_scale: float | None = None  # None: (head_dim · terms of a score) ** -0.5.
  attention_softcap: float | None = None
  attention_sinks: bool = False
  qk_norm: str = "none"  # Of a head, with one scale for all or (each) its own and no bias; of all.
  attention_bias: bool = False  # On q, k, v.
  attention_out_bias: bool = False
  residual: str = "serial"
  conv_width: int | None = None  # Tokens that a convolution beside a layer sees, an odd number.
  conv_activation: str = "tanh"

  # Latent attention (DeepSeek). Biases are then of what makes latents.
  kv_latent_dim: int | None = None  # What keys and values are made of; None: no such attention.
  q_latent_dim: int | None = None  # What queries are made of; None: of the residual stream.
  rope_head_dim: int | None = None  # The last elements of a head, which turn and keys share.
  latent_norm_eps: float = 1e-6

  # Norms and embeddings.
  norm: str = "rms"
  norm_placement: str = "pre"
  norm_eps: float = 1e-5
  norm_offset: bool = False  # The scale is stored as its difference from 1 (Gemma).
  norm_bias: bool = True  # Of layer norms.
  token_types: int = 0  # Rows of the table of token types; 0: none (BERT: 2).
  embed_norm: bool = False
  final_norm: bool = True
  decoder_embed: bool = False  # Encoder–decoders: the decoder has a table of tokens of its own.
  tie_embeddings: bool = True  # The head scores against the table of the last stack.
  scale_embeddings: bool = False  # By √d_model.
  embed_scale: float | None = None  # Multiplies embeddings of tokens; None: nothing (Granite).
  residual_scale: float | None = None  # Multiplies what attention and MLP add (Granite).
  logit_scale: float | None = None  # Multiplies what the head reads; None: nothing (tied T5: 1/√D).
  logit_softcap: float | None = None
  logit_bias: bool = False
  decoder_start_id: int | None = None  # Encoder–decoders: what the decoder reads first.
  prefix_attention: bool = False  # Decoders: prompts are read in both directions (prefix LM, UL2).

  # MLP and experts.
  activation: str = "silu"
  gated: bool = True
  mlp_bias: bool = False
  gate_limit: float | None = None  # Clamps gates above, what they multiply on both sides (GPT-OSS).
  gate_offset: float = 0.0  # Added to what gates multiply (GPT-OSS: 1).
  num_experts: int = 0
  experts_per_token: int = 2
  shared_experts: int = 0  # Experts that every token uses, as one MLP of that many widths.
  shared_gate: bool = False  # Shared experts count as much as a sigmoid of the token (Qwen2-MoE).
  d_expert: int | None = None  # Width of an expert; None: d_ff.
  router_bias: bool = False  # Of its logits (GPT-OSS).
  router_scores: str = "softmax"
  router_renormalize: bool = True  # The chosen experts' weights sum to 1.
  router_scale: float = 1.0  # Multiplies these weights.
  router_choice_bias: bool = False  # Only the choice sees it (DeepSeek-V3); not trained.
  router_groups: int = 1  # Of experts; a token's come from the best `router_groups_kept` of them.
  router_groups_kept: int = 1
  router_group_best: int = 1  # So many best scores of a group sum to the group's.
  balance_loss: float = 0.01
  router_z_loss: float = 0.001

  # Head.
  head: str | None = None  # None: masked_lm on an encoder, language on the others.
  head_dense: bool = False  # A dense layer with activation (BERT's transform, BERT's pooler).
  head_activation: str = "gelu"  # Of that layer.
  head_norm: bool = False  # A norm behind that layer.
  head_dense_bias: bool = True  # Of that layer.
  head_bias: bool = True  # Of the projection to labels.
  pair_head: bool = False  # Also tells whether two texts follow each other (BERT, ALBERT).
  num_labels: int | None = None  # None: as many as the data has.
  problem: str = "single_label"  # What a sequence head tells: one label, several, or a number.
  pooling: str | None = None  # What stands for a text: its first or last hidden state, their mean.
  normalize: bool = False  # Embeddings of texts have length 1.

  # Initialization and regularization.
  init_std: float = 0.02
  init_embed_std: float | None = None  # Of tables of tokens, positions, types; None: init_std.
  init_residual_scale: bool = True  # Output projections by 1/√(2·layers) (GPT-2).
  dropout: float = 0.0
  attention_dropout: float = 0.0  # Of attention's probabilities.
  mlp_dropout: float = 0.0  # Of what an MLP's activation gives (T5, BART).

  # Execution: these change how the same function is computed.
  dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU.
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"
  context_attention: str = "gather"  # Where mesh.seq splits texts: each device gets all keys, or
  # (ring) they go from one to the next, which needs less memory and knows less.
  expert_kernel: str = "ragged"
  micro_batches: int | None = None  # Of a pipeline (mesh.stage); None: up to four a stage.
  stage_rounds: int = 1  # Runs of layers that each stage holds; more make its bubble smaller.

  def __post_init__(self):
    from model.config_checks import check  # It needs the names above.

    check(self)

  @property
  def stacks(self) -> tuple[str, ...]:
    """The stacks of layers that a model of this shape has, in the order in which they run."""
    return ("encoder", "decoder") if self.shape == "encoder_decoder" else (self.shape,)

  @property
  def head_kind(self) -> str:
    """What sits on the last stack, the default resolved."""
    default = "masked_lm" if self.shape == "encoder" else "language"
    return default if self.head is None else self.head

  @property
  def text_stack(self) -> str:
    """Whose hidden states stand for texts: an encoder embeds them, the last stack labels them."""
    return self.stacks[0 if self.head_kind == "embedding" else -1]

  def pooling_of(self, stack: str) -> str:
    """How a stack's hidden states stand for a text: a decoder has read it at the end only."""
    return self.pooling or ("last" if stack == "decoder" else "first")

  @property
  def embed_width(self) -> int:
    """Width of the tables of tokens, positions and types, the default resolved."""
    return self.d_model if self.d_embed is None else self.d_embed

  @property
  def bucketed(self) -> bool:
    """Whether T5's relative bias is added to the scores."""
    return self.relative_bias or self.positions == "t5_bias"

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads, the default resolved."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """Width of one head, the default resolved."""
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def relative_terms(self) -> tuple[str, ...]:
    """What relative positions add to a score as products of vectors (`relative_scores`)."""
    return self.relative_scores if self.positions == "disentangled" else ()

  @property
  def score_scale(self) -> float:
    """What scores are multiplied by, the default resolved."""
    terms = 1 + len(self.relative_terms)
    return (
      (self.head_width * terms) ** -0.5 if self.attention_scale is None else self.attention_scale
    )

  @property
  def value_width(self) -> int:
    """Width of one head's values, the default resolved."""
    return self.head_width if self.v_head_dim is None else self.v_head_dim

  @property
  def rotated_width(self) -> int:
    """Elements of a head that rotary positions turn."""
    part = int(self.head_width * self.rope_fraction)
    return part if self.rope_head_dim is None else self.rope_head_dim

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
    """Dtype of activations and matrix products on the devices in use."""
    auto = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(auto if self.dtype == "auto" else self.dtype)

  @property
  def outputs(self) -> int:
    """Labels that the head tells apart; 1 for a number, 2 for the ends of a span.

    Raises:
      InputError: while `num_labels` is needed and is None.
    """
    fixed = {"span": 2, "replaced_token": 1}.get(self.head_kind)
    if fixed is not None or self.problem == "regression":
      return fixed or 1
    if self.num_labels is None:
      raise InputError("model.num_labels is not set and no data has set it: give a number.")
    return self.num_labels

  def depth(self, stack: str) -> int:
    """Number of layers of a stack."""
    decoder = stack == "decoder" and self.shape == "encoder_decoder"
    if decoder and self.num_decoder_layers is not None:
      return self.num_decoder_layers
    return self.num_layers

  def layer_uses(self, stack: str) -> int:
    """How many layers in a row have the same parameters."""
    return 1 if self.layer_sets is None else self.depth(stack) // self.layer_sets

  def layers(self, stack: str) -> tuple[LayerKind, ...]:
    """The kind of each layer of a stack, first to last."""
    prefix, pattern = self._words(stack)
    words = list(prefix)
    while len(words) < self.depth(stack):
      words.extend(pattern)
    return tuple(_layer_kind(self, stack, w) for w in words[: self.depth(stack)])

  def groups(self, stack: str) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """Runs of equal repeats: `(pattern, repeats)` for the prefix, the repeats and the remainder."""
    kinds, (prefix, pattern) = self.layers(stack), self._words(stack)
    start, size = min(len(prefix), len(kinds)), len(pattern)
    repeats = max(0, (len(kinds) - start) // size)
    middle = start + repeats * size
    parts = ((kinds[:start], 1), (kinds[start : start + size], repeats), (kinds[middle:], 1))
    return tuple((pattern, n) for pattern, n in parts if pattern and n)

  def _words(self, stack: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = stack == "decoder" and self.decoder_pattern
    return ((), self.decoder_pattern) if own else (self.layer_prefix, self.layer_pattern)

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


def _layer_kind(cfg: ModelConfig, stack: str, word: str) -> LayerKind:
  parts = word.split("+")
  window = cfg.window if stack == "encoder" else cfg.decoder_window or cfg.window
  return LayerKind(
    window=window if "local" in parts else None,
    experts="experts" in parts,
    rotary=cfg.positions == "rotary" and "nope" not in parts,
    causal=stack == "decoder",
    cross=stack == "decoder" and cfg.shape == "encoder_decoder",
    normed="unnormed" not in parts,
    conv="conv" in parts,
  )
