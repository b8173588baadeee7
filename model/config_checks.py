"""What a ModelConfig refuses: each check names the value, what is expected and what to do."""

from model.config import (
  ACTIVATIONS,
  ATTENTION_KERNELS,
  CONTEXT_ATTENTION,
  DTYPES,
  EXPERT_KERNELS,
  HEADS,
  LAYER_WORDS,
  NORM_PLACEMENTS,
  NORMS,
  PARAM_DTYPES,
  POOLINGS,
  POSITIONS,
  PROBLEMS,
  QK_NORMS,
  REMAT,
  RESIDUALS,
  ROPE_SCALINGS,
  SHAPES,
  ModelConfig,
)
from model.config_checks_attention import (
  check_disentangled,
  check_latents,
  check_positions,
  check_ring,
  check_router,
)
from model.errors import InputError, nearest


def check(cfg: ModelConfig) -> None:
  """Raises an InputError for the first setting that is impossible, or that has no effect."""
  _check_choices(cfg)
  _check_sizes(cfg)
  check_positions(cfg)
  _check_layers(cfg)
  check_latents(cfg)
  check_disentangled(cfg)
  check_ring(cfg)
  check_router(cfg)
  _check_shape(cfg)
  _check_head(cfg)


def _check_choices(cfg: ModelConfig) -> None:
  choices: dict[str, tuple[str, ...]] = dict(
    shape=SHAPES, positions=POSITIONS, rope_scaling=ROPE_SCALINGS, norm=NORMS,
    norm_placement=NORM_PLACEMENTS, residual=RESIDUALS, qk_norm=QK_NORMS, activation=ACTIVATIONS,
    remat=REMAT, attention_kernel=ATTENTION_KERNELS, context_attention=CONTEXT_ATTENTION,
    expert_kernel=EXPERT_KERNELS, dtype=DTYPES, param_dtype=PARAM_DTYPES,
    router_scores=("softmax", "sigmoid"), head_activation=ACTIVATIONS,
    problem=PROBLEMS, conv_activation=ACTIVATIONS,
  )  # fmt: skip
  for name, allowed in (("head", HEADS), ("pooling", POOLINGS)):
    if getattr(cfg, name) is not None:
      choices[name] = allowed
  for name, allowed in choices.items():
    value = getattr(cfg, name)
    if value not in allowed:
      raise InputError(
        f"model.{name}={value!r} is not known: use one of {', '.join(allowed)}."
        f"{nearest(str(value), allowed)}"
      )


def _check_sizes(cfg: ModelConfig) -> None:
  optional = ("vocab_size", "num_kv_heads", "head_dim", "max_positions", "window", "d_expert",
              "rope_original_positions", "num_decoder_layers", "num_labels", "d_embed",
              "layer_sets", "decoder_window", "v_head_dim", "kv_latent_dim", "q_latent_dim",
              "rope_head_dim", "conv_width", "micro_batches")  # fmt: skip
  sizes = ("num_layers", "d_model", "d_ff", "num_heads", "vocab_multiple", "experts_per_token",
           "relative_buckets", "relative_max_distance", "router_groups", "router_groups_kept",
           "router_group_best", "stage_rounds")  # fmt: skip
  for name in (*sizes, *optional):
    value = getattr(cfg, name)
    if value is None and name in optional:
      continue
    if not isinstance(value, int) or value < 1:
      raise InputError(f"model.{name}={value!r} must be a whole number of at least 1.")
  for name in ("dropout", "attention_dropout", "mlp_dropout"):
    if not 0 <= getattr(cfg, name) < 1:
      raise InputError(f"model.{name}={getattr(cfg, name)} is a probability: use 0 <= p < 1.")
  positive = ("attention_softcap", "logit_softcap", "attention_scale", "norm_eps", "init_std",
              "init_embed_std", "rope_theta", "rope_local_theta", "rope_factor",
              "rope_attention_factor", "logit_scale", "rope_low_freq_factor",
              "embed_scale", "residual_scale", "gate_limit", "rope_high_freq_factor",
              "rope_beta_fast", "rope_beta_slow", "latent_norm_eps", "router_scale")  # fmt: skip
  for name in positive:
    value = getattr(cfg, name)
    if value is not None and not 0 < value < float("inf"):
      raise InputError(f"model.{name}={value} must be a positive number.")
  for name in ("num_experts", "shared_experts", "balance_loss", "router_z_loss", "token_types",
               "position_offset"):  # fmt: skip
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


def _check_layers(cfg: ModelConfig) -> None:
  if not cfg.layer_pattern:
    raise InputError("model.layer_pattern is empty: name at least one layer, for example 'global'.")
  if len(cfg.layer_prefix) > cfg.num_layers:
    raise InputError(f"model.layer_prefix names more than num_layers={cfg.num_layers} layers.")
  for name in ("decoder_pattern", "decoder_window", "decoder_embed"):
    if getattr(cfg, name) and cfg.shape != "encoder_decoder":
      raise InputError(f"model.{name} has no effect on model.shape={cfg.shape!r}: leave it out.")
  if cfg.decoder_window is not None and not any(kind.window for kind in cfg.layers("decoder")):
    raise InputError(
      f"model.decoder_window={cfg.decoder_window} has no effect: the decoder has no local layer."
    )
  shared = (*cfg.layer_prefix, *cfg.layer_pattern)
  every = (*shared, *cfg.decoder_pattern)
  for word in every:
    parts = word.split("+")
    unknown = [p for p in parts if p not in LAYER_WORDS]
    if unknown or ("global" in parts) == ("local" in parts):
      near = nearest(unknown[0], LAYER_WORDS) if unknown else ""
      raise InputError(
        f"model.layer_pattern: {word!r} must be 'global' or 'local', then '+experts', '+nope', "
        f"'+unnormed' and '+conv' where wanted.{near}"
      )
    own = cfg.decoder_window if word in cfg.decoder_pattern else None
    if "local" in parts and cfg.window is None and (own is None or word in shared):
      raise InputError("model.layer_pattern has local layers: set model.window, in tokens.")
    if "experts" in parts and not cfg.num_experts:
      raise InputError("model.layer_pattern has expert layers: set model.num_experts.")
  if cfg.layer_sets is not None:
    if max(len(shared), len(cfg.decoder_pattern)) > 1:
      raise InputError(
        f"model.layer_sets={cfg.layer_sets} needs layers of one kind: leave model.layer_prefix out "
        "and name one word in model.layer_pattern."
      )
    odd = [n for n in map(cfg.depth, cfg.stacks) if n % cfg.layer_sets]
    if odd:
      raise InputError(
        f"model.layer_sets={cfg.layer_sets} does not divide {odd[0]} layers: each set of "
        "parameters must serve as many."
      )
  convolved = "conv" in "+".join(every).split("+")
  if cfg.conv_width is None and (convolved or cfg.conv_activation != "tanh"):
    raise InputError("model.layer_pattern's '+conv' and conv_activation need model.conv_width.")
  if cfg.conv_width is not None and (cfg.conv_width % 2 == 0 or cfg.shape != "encoder"):
    raise InputError(
      f"model.conv_width={cfg.conv_width} must be odd, on model.shape='encoder' and not on "
      f"{cfg.shape!r}: it looks as far ahead as back."
    )
  windowed = shared if cfg.decoder_window else every
  for name, word, words in (("window", "local", windowed), ("num_experts", "experts", every),
                            ("conv_width", "conv", every)):  # fmt: skip
    if getattr(cfg, name) and word not in "+".join(words).split("+"):
      raise InputError(
        f"model.{name}={getattr(cfg, name)} has no effect: no word of model.layer_pattern has "
        f"{word!r}."
      )
  if cfg.num_experts and cfg.mlp_dropout:
    raise InputError(f"model.mlp_dropout={cfg.mlp_dropout} has no effect on experts: use dropout.")
  if not cfg.gated and (cfg.gate_offset or cfg.gate_limit is not None):
    raise InputError("model.gate_limit and gate_offset have no effect without model.gated.")
  if cfg.shared_gate and not cfg.shared_experts:
    raise InputError("model.shared_gate has no effect without model.shared_experts.")
  if cfg.num_experts and cfg.experts_per_token > cfg.num_experts:
    raise InputError(
      f"model.experts_per_token={cfg.experts_per_token} exceeds num_experts={cfg.num_experts}."
    )


def _check_shape(cfg: ModelConfig) -> None:
  if cfg.shape != "encoder_decoder" and cfg.num_decoder_layers is not None:
    raise InputError(
      f"model.num_decoder_layers={cfg.num_decoder_layers} has no effect on model.shape="
      f"{cfg.shape!r}: set model.num_layers."
    )
  if cfg.shape == "encoder_decoder" and cfg.residual != "serial":
    raise InputError(
      f"model.residual={cfg.residual!r} has no place for cross-attention: encoder_decoder needs "
      "'serial'."
    )
  if cfg.prefix_attention and cfg.shape != "decoder":
    raise InputError(f"model.prefix_attention has no effect on model.shape={cfg.shape!r}.")


def _check_head(cfg: ModelConfig) -> None:
  kind, given = cfg.head_kind, cfg.head is not None  # Else what is learned decides the head.
  fitting = {"language": ("decoder", "encoder_decoder"), "masked_lm": ("encoder",),
             "replaced_token": ("encoder",)}  # fmt: skip
  if cfg.shape not in fitting.get(kind, SHAPES):
    raise InputError(
      f"model.head={kind!r} sits on {' or '.join(fitting[kind])}, and model.shape={cfg.shape!r}: "
      f"choose a head for this shape, or leave it out."
    )
  if cfg.pair_head and kind != "masked_lm":
    raise InputError(f"model.pair_head stands beside a masked_lm head, not beside {kind!r}.")
  if given and cfg.problem != "single_label" and kind != "sequence":
    raise InputError(f"model.problem={cfg.problem!r} has no effect on model.head={kind!r}.")
  if given and kind not in ("sequence", "token") and cfg.num_labels is not None:
    raise InputError(f"model.num_labels={cfg.num_labels} has no effect on model.head={kind!r}.")
  if cfg.pooling == "first" and cfg.text_stack == "decoder" and (given or cfg.shape == "decoder"):
    raise InputError(
      "model.pooling='first' stands for a text where it begins, and a decoder has not read it by "
      "then: use 'last' or 'mean'."
    )
  if cfg.problem == "regression" and cfg.num_labels not in (None, 1):
    raise InputError(f"model.num_labels={cfg.num_labels}: a regression tells one number.")
  if kind == "sequence" and cfg.problem == "single_label" and cfg.num_labels == 1:
    raise InputError(
      "model.num_labels=1: one label alone is true of every text. Use model.problem='regression' "
      "for a number, 'multi_label' for a label that may be missing, or more labels."
    )
  unread = cfg.head_norm or cfg.head_activation != "gelu" or not cfg.head_dense_bias
  if not cfg.head_dense and unread:
    raise InputError(
      "model.head_norm, head_activation and head_dense_bias have no effect without head_dense."
    )
  if cfg.d_embed is not None and kind in ("language", "masked_lm") and not cfg.head_dense:
    raise InputError(
      f"model.head={kind!r} scores tokens with tables of width model.d_embed={cfg.d_embed}: set "
      "model.head_dense, whose layer leads there."
    )
