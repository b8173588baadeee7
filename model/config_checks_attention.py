"""What ModelConfig refuses of positions, kinds of attention and routers."""

from model.config import ModelConfig
from model.errors import InputError


def check_positions(cfg: ModelConfig) -> None:
  if cfg.positions in ("learned",) and cfg.max_positions is None:
    raise InputError("model.positions='learned' needs model.max_positions: the table's length.")
  if cfg.positions not in ("learned", "sinusoidal") and cfg.position_offset:
    raise InputError(
      f"model.position_offset={cfg.position_offset} has no effect on model.positions="
      f"{cfg.positions!r}: only learned and sinusoidal positions are counted from somewhere."
    )
  for name, kind in (("sinusoid_inclusive", "sinusoidal"), ("relative_bias_per_layer", "t5_bias")):
    if getattr(cfg, name) and cfg.positions != kind:
      raise InputError(
        f"model.{name} has no effect on model.positions={cfg.positions!r}: it needs {kind!r}."
      )
  if cfg.sinusoid_inclusive and (cfg.d_model % 2 or cfg.d_model < 4):
    raise InputError(
      f"model.d_model={cfg.d_model} must be even and at least 4 with model.sinusoid_inclusive."
    )
  for name in ("alibi_scaled", "alibi_rounded"):
    if getattr(cfg, name) and cfg.positions != "alibi":
      raise InputError(f"model.{name} has no effect on model.positions={cfg.positions!r}.")
  if cfg.alibi_rounded and (cfg.shape != "decoder" or cfg.prefix_attention):
    raise InputError(
      "model.alibi_rounded counts from keys to later queries: use model.shape='decoder' without "
      "prefix_attention."
    )
  if cfg.relative_bias and cfg.positions != "learned":
    raise InputError(
      "model.relative_bias stands beside learned positions, and model.positions="
      f"{cfg.positions!r}: for T5's bias alone use model.positions='t5_bias'."
    )
  if cfg.positions == "rotary":
    rotated = cfg.rotated_width
    if not 0 < cfg.rope_fraction <= 1 or rotated < 2 or rotated % 2:
      raise InputError(
        f"model.rope_fraction={cfg.rope_fraction} of head_dim={cfg.head_width} rotates {rotated} "
        "elements: it must be an even number of at least 2 and at most the head width."
      )
  scaled = cfg.rope_scaling != "none"
  if scaled and cfg.rope_factor < 1:
    raise InputError(f"model.rope_factor={cfg.rope_factor} must be at least 1.")
  if cfg.rope_scaling not in ("none", "linear") and cfg.rope_original_positions is None:
    raise InputError(
      f"model.rope_scaling={cfg.rope_scaling!r} needs model.rope_original_positions: the length "
      "that the model was trained on before scaling."
    )
  if not scaled and cfg.rope_factor != 1.0:
    raise InputError("model.rope_factor has no effect without model.rope_scaling: set one.")
  if cfg.rope_scaling != "yarn" and not cfg.rope_truncate:
    raise InputError("model.rope_truncate=False has no effect without model.rope_scaling='yarn'.")
  if cfg.rope_scaling == "longrope" and cfg.rope_original_positions == 1 and cfg.rope_factor != 1:
    raise InputError("model.rope_original_positions=1 is too short for model.rope_factor: set 2.")
  for name in ("rope_short_factors", "rope_long_factors"):
    _check_long_factors(cfg, name)


def _check_long_factors(cfg: ModelConfig, name: str) -> None:
  factors, pairs = getattr(cfg, name), cfg.rotated_width // 2
  if cfg.rope_scaling != "longrope":
    if factors is not None:
      raise InputError(f"model.{name} has no effect without model.rope_scaling='longrope'.")
  elif factors is None or len(factors) != pairs or not all(0 < f < float("inf") for f in factors):
    raise InputError(
      f"model.{name}={factors} must be {pairs} positive numbers: one for each pair that turns."
    )


def check_latents(cfg: ModelConfig) -> None:
  if cfg.kv_latent_dim is None:
    for name, plain in (("q_latent_dim", None), ("rope_head_dim", None), ("latent_norm_eps", 1e-6)):
      if getattr(cfg, name) != plain:
        raise InputError(
          f"model.{name}={getattr(cfg, name)} has no effect without model.kv_latent_dim: set that."
        )
    return
  if cfg.rope_head_dim is None or not 0 < cfg.rope_head_dim < cfg.head_width:
    raise InputError(
      f"model.rope_head_dim={cfg.rope_head_dim} must be a part of head_dim={cfg.head_width}: with "
      "model.kv_latent_dim so many elements turn, and the others come from the latent."
    )
  unfit = _unfit(
    cfg,
      ("positions", cfg.positions == "rotary"), ("rope_fraction", cfg.rope_fraction == 1.0),
      ("qk_norm", cfg.qk_norm == "none"), ("shape", cfg.shape != "encoder_decoder"),
      ("num_kv_heads", cfg.kv_heads == cfg.num_heads),
      ("rope_scaling", cfg.rope_scaling != "longrope"),
  )  # fmt: skip
  if unfit is not None:
    raise InputError(
      f"model.{unfit} does not go with model.kv_latent_dim: latent attention is self-attention "
      "with rotary positions that turn once, norms of its own, and as many keys as queries."
    )


def check_disentangled(cfg: ModelConfig) -> None:
  if cfg.positions != "disentangled":
    plain = dict(relative_scores=("c2p", "p2c"), relative_own_proj=False, relative_norm=False)
    told = [name for name, value in plain.items() if getattr(cfg, name) != value]
    if told:
      raise InputError(
        f"model.{told[0]}={getattr(cfg, told[0])} has no effect on model.positions="
        f"{cfg.positions!r}: only on 'disentangled'."
      )
    return
  if cfg.relative_scores not in (("c2p",), ("p2c",), ("c2p", "p2c")):
    raise InputError(
      f"model.relative_scores={cfg.relative_scores} must be ('c2p',), ('p2c',) or ('c2p', 'p2c')."
    )
  if cfg.relative_buckets % 4 or 2 * cfg.relative_max_distance < cfg.relative_buckets:
    raise InputError(
      f"model.relative_buckets={cfg.relative_buckets} must be a multiple of 4, and at most twice "
      f"relative_max_distance={cfg.relative_max_distance}."
    )
  unfit = _unfit(
    cfg,
      ("shape", cfg.shape == "encoder"), ("num_kv_heads", cfg.kv_heads == cfg.num_heads),
      ("qk_norm", cfg.qk_norm == "none"), ("attention_softcap", cfg.attention_softcap is None),
  )  # fmt: skip
  if unfit is not None:
    raise InputError(
      f"model.{unfit} does not go with model.positions='disentangled': that is of encoders with "
      "as many keys as queries, no norms of them and no cap on scores."
    )


def check_ring(cfg: ModelConfig) -> None:
  if cfg.context_attention != "ring":
    return
  unfit = _unfit(
    cfg,
      ("positions", cfg.positions not in ("t5_bias", "alibi", "disentangled")),
      ("relative_bias", not cfg.relative_bias), ("attention_dropout", not cfg.attention_dropout),
      ("prefix_attention", not cfg.prefix_attention),
      ("attention_kernel", cfg.attention_kernel in ("auto", "xla")),
  )  # fmt: skip
  if unfit is not None:
    raise InputError(
      f"model.{unfit} does not go with model.context_attention='ring', which knows no biases on "
      "scores, no dropout of probabilities, no bidirectional prefixes and no other kernel: use "
      "model.context_attention='gather'."
    )


def _unfit(cfg: ModelConfig, *fields: tuple[str, bool]) -> str | None:
  """`name=value` of the first field that does not fit."""
  return next((f"{name}={getattr(cfg, name)!r}" for name, fits in fields if not fits), None)


def check_router(cfg: ModelConfig) -> None:
  plain = dict(router_scale=1.0, router_bias=False, router_choice_bias=False, router_groups=1)
  told = [name for name, value in plain.items() if getattr(cfg, name) != value]
  if told and not cfg.num_experts:
    raise InputError(f"model.{told[0]} has no effect without experts: set model.num_experts.")
  groups, kept, best = cfg.router_groups, cfg.router_groups_kept, cfg.router_group_best
  if groups == 1 and (kept, best) != (1, 1):
    raise InputError(
      "model.router_groups_kept and router_group_best have no effect without router_groups."
    )
  size = cfg.num_experts // groups
  if groups > 1 and (cfg.num_experts % groups or best > size):
    raise InputError(
      f"model.num_experts={cfg.num_experts} must be a multiple of router_groups={groups}, with at "
      f"least router_group_best={best} in each."
    )
  if groups > 1 and not cfg.experts_per_token / size <= kept <= groups:
    raise InputError(
      f"model.router_groups_kept={kept} of {groups} groups of {size} experts must have "
      f"experts_per_token={cfg.experts_per_token} among them."
    )
