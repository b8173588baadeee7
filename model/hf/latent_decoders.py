"""Decoders with latent attention: DeepSeek-V2 and V3."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import BIASES, DOWN, LLAMA_ROWS, UP, kv_heads, llama
from model.hf.engine import Row, linear, under
from model.hf.family import Always, Class, Family, Field, Fields
from model.hf.rotary_fields import Rotary, scaling

LATENT_ROWS = (
  *(row for row in LLAMA_ROWS if "q_norm" not in row.theirs and "k_norm" not in row.theirs),
  *under(
    "model.layers.{i}.self_attn", "decoder.layers.attn",
    *linear("q_a_proj", "q_proj.down_proj", "r d -> d r", "r -> r"),
    Row("q_a_layernorm.weight", "q_proj.norm.scale", "r -> r"),
    Row("q_b_proj.weight", "q_proj.up_proj.w", "(n h) r -> r n h"),
    *linear("kv_a_proj_with_mqa", "kv_proj.down_proj", "r d -> d r", "r -> r"),
    Row("kv_a_layernorm.weight", "kv_proj.norm.scale", "r -> r"),
    Row("kv_b_proj.weight", "kv_proj.up_proj.w", "(n h) r -> r n h"),
  ),
  *under(
    "model.layers.{i}.mlp", "decoder.layers.mlp",
    Row("gate.weight", "router.w", "e d -> d e"),
    Row("gate.e_score_correction_bias", "router.bias", "e -> e"),
    Row("experts.{e}.gate_proj.weight", "gate_proj.w", UP),
    Row("experts.{e}.up_proj.weight", "up_proj.w", UP),
    Row("experts.{e}.down_proj.weight", "down_proj.w", DOWN),
    *linear("shared_experts.gate_proj", "shared.gate_proj", UP, "f -> f"),
    *linear("shared_experts.up_proj", "shared.up_proj", UP, "f -> f"),
    *linear("shared_experts.down_proj", "shared.down_proj", DOWN, "d -> d"),
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LatentHeads:
  """A head's width from its part that stays and its part that turns."""

  names = ("qk_nope_head_dim", "qk_rope_head_dim")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    still, turning = values.get(self.names[0], 128), values.get(self.names[1], 64)
    return {"head_dim": still + turning, "rope_head_dim": turning}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    turning = cfg.rotated_width
    return {self.names[0]: cfg.head_width - turning, self.names[1]: turning}


@dataclasses.dataclass(frozen=True)
class LatentRotary:
  """Rotary positions whose YaRN also scales scores, by `mscale_all_dim`."""

  names = Rotary().names

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = scaling(values)
    yarn = "yarn" in (given.get("rope_type"), given.get("type"))
    one, whole = (given.pop(n, None) if yarn else None for n in ("mscale", "mscale_all_dim"))
    ours = Rotary().read({**values, "rope_scaling": given})
    if yarn and whole:
      power = _mscale(ours["rope_factor"], whole)
      ours["attention_scale"] = LatentHeads().read(values)["head_dim"] ** -0.5 * power * power
      if one:
        ours.setdefault("rope_attention_factor", _mscale(ours["rope_factor"], one) / power)
    return ours

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    theirs = Rotary().write(cfg)
    if cfg.attention_scale is None:
      return theirs
    if cfg.rope_scaling != "yarn" or cfg.rope_factor == 1.0:
      raise InputError(f"model.attention_scale={cfg.attention_scale} needs YaRN here.")
    power = math.sqrt(cfg.attention_scale) * cfg.head_width**0.25
    theirs["rope_scaling"]["mscale_all_dim"] = round((power - 1) / _mscale_step(cfg.rope_factor), 6)
    return theirs


def _mscale_step(factor: float) -> float:
  return 0.1 * math.log(factor)


def _mscale(factor: float, mscale: float) -> float:
  return 1.0 if factor <= 1 else _mscale_step(factor) * mscale + 1.0


@dataclasses.dataclass(frozen=True)
class ExpertLayers:
  """The first layers are dense, all others have experts."""

  default: int
  names = ("first_k_dense_replace",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    dense = min(values.get(self.names[0], self.default), values["num_hidden_layers"])
    return {"layer_prefix": ("global",) * dense, "layer_pattern": ("global+experts",)}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    kinds = cfg.layers("decoder")
    return {self.names[0]: next((i for i, k in enumerate(kinds) if k.experts), len(kinds))}


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups of experts.

  Attributes:
    default: their number, and how many stay, where config.json has none.
    best: how many scores of a group count.
    greedy: the method that chooses without groups; None: there is none.
  """

  default: tuple[int, int]
  best: int
  greedy: str | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return ("n_group", "topk_group", *(("topk_method",) if self.greedy else ()))

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    method = values.get("topk_method", self.greedy)
    if self.greedy and method not in (self.greedy, f"group_limited_{self.greedy}"):
      raise InputError(f"config.json: topk_method={method!r} is not supported.")
    groups, kept = (
      values.get(n, d) or 1 for n, d in zip(self.names[:2], self.default, strict=True)
    )
    if groups == 1 or (self.greedy and method == self.greedy):
      groups = kept = 1
    best = self.best if groups > 1 else 1
    return {"router_groups": groups, "router_groups_kept": kept, "router_group_best": best}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {"n_group": cfg.router_groups, "topk_group": cfg.router_groups_kept}
    if self.greedy:
      grouped = "group_limited_" if cfg.router_groups > 1 else ""
      theirs["topk_method"] = f"{grouped}{self.greedy}"
    return theirs


def deepseek(version: int, *fields: Fields, without: tuple[str, ...] = (), **settings) -> Family:
  """A version of DeepSeek; classes that Transformers lacks for it are left out."""
  family = llama(
    f"deepseek_v{version}", f"DeepseekV{version}", kv_heads(None), *BIASES, LatentHeads(),
    LatentRotary(), Field("kv_lora_rank", "kv_latent_dim", 512),
    # A null there says that queries come of no latent, and is not the same as nothing.
    Field("q_lora_rank", "q_latent_dim", lambda v: v.get("q_lora_rank", 1536)),
    Field("v_head_dim", "v_head_dim", 128),
    Field("moe_intermediate_size", "d_expert", {2: 1407, 3: 2048}[version]),
    Field("aux_loss_alpha", "balance_loss", 0.001), Always("moe_layer_freq", 1), *fields,
    rows=LATENT_ROWS,
    unread=("head_dim", "qk_head_dim", "output_router_logits", "ep_size", "seq_aux",
            "pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers"),
    router_scores="softmax" if version == 2 else "sigmoid", **settings,
  )  # fmt: skip
  classes: dict[str, Class] = {n: c for n, c in family.classes.items() if n not in without}
  # V3's published folder holds a 62nd layer, which guesses a token more and is not run.
  surplus = rf"{family.surplus}|model\.layers\.61\..*"
  return dataclasses.replace(family, classes=classes, surplus=surplus)


FAMILIES = (
  deepseek(
    2, Field("num_experts_per_tok", "experts_per_token"),
    Field("n_routed_experts", "num_experts", 64), Field("n_shared_experts", "shared_experts", 2),
    Field("routed_scaling_factor", "router_scale", 1.0), ExpertLayers(0),
    Groups((1, 1), 1, "greedy"), Always("scoring_func", "softmax"),
    Always("norm_topk_prob", False), Always("mlp_bias", False), rope_interleaved=True,
    router_renormalize=False, without=("DeepseekV2ForTokenClassification",),
  ),
  deepseek(
    3, Field("num_experts_per_tok", "experts_per_token", 8),
    Field("n_routed_experts", "num_experts", 256), Field("n_shared_experts", "shared_experts", 1),
    Field("routed_scaling_factor", "router_scale", 2.5), ExpertLayers(3), Groups((8, 4), 2),
    Field("norm_topk_prob", "router_renormalize", True), Always("scoring_func", "sigmoid"),
    Always("topk_method", "noaux_tc"), Field("rope_interleave", "rope_interleaved", True),
    router_choice_bias=True,
  ),
)  # fmt: skip
