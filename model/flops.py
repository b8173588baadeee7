"""Model FLOPs: what the mathematics of a training step needs, however it is computed."""

import functools
from collections.abc import Mapping

import jax
from flax import nnx

from model.config import ModelConfig
from model.heads import WORD_HEADS, abstract
from model.layers import ParamInfo, param_info


def model_flops(cfg: ModelConfig, tokens: Mapping[str, float], pairs: Mapping[str, float]) -> float:
  """FLOPs of one forward and backward pass; the backward pass costs twice the forward.

  Args:
    tokens: by stack the tokens that it reads and that are not padding, and by `head` the vectors
      that the head reads.
    pairs: query-key pairs that one layer computes, masked ones not counted (see `visible_pairs`):
      by `STACK.WINDOW` of `cfg.layers`, and by `cross` those of cross-attention.

  A multiplication and an addition count as two. Recomputed activations, the embedding lookup,
  norms and element-wise functions are not counted (PaLM, arXiv:2204.02311, appendix B).
  """
  terms = 1 + len(cfg.relative_terms)
  width = cfg.num_heads * (cfg.head_width * terms + cfg.value_width)
  weights = matmul_params(cfg)
  products = sum(2 * weights[part] * tokens[part] for part in weights)
  seen = 0.0
  for stack in cfg.stacks:
    for kind in cfg.layers(stack):
      seen += pairs[f"{stack}.{kind.window}"] + (pairs["cross"] if kind.cross else 0.0)
  return 3 * (products + 2 * seen * width)  # QK' and its like, and AV.


@functools.lru_cache
def matmul_params(cfg: ModelConfig) -> dict[str, float]:
  """Weights that each token is multiplied with, by the stack whose tokens they are, and `head`.

  All matrices, of experts the share that a token goes through; the embedding only where it is also
  the head. Keys and values of cross-attention belong to the encoder's tokens. Padding of the
  vocabulary is left out, and what is multiplied with vectors of positions, once a batch.
  """
  net = abstract(cfg)
  flat = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(net, nnx.Param)))[0]
  infos = jax.tree.leaves(param_info(net), is_leaf=lambda i: isinstance(i, ParamInfo))
  totals = dict.fromkeys((*cfg.stacks, "head"), 0.0)
  if cfg.tie_embeddings and cfg.head_kind in WORD_HEADS:
    totals["head"] += cfg.embed_width * cfg.real_vocab
  for (path, leaf), info in zip(flat, infos, strict=True):
    names = [str(part.key) for part in path]
    if info.role == "matrix" and names[0] in totals and "relative" not in names:
      fed = "encoder" if "cross_attn" in names and names[-2] in ("k_proj", "v_proj") else names[0]
      uses = cfg.layer_uses(names[0]) if info.axes[0] == "layers" else 1
      totals[fed] += info.count(leaf.shape, cfg.real_vocab) * _share(cfg, info) * uses
  return totals


def _share(cfg: ModelConfig, info: ParamInfo) -> float:
  """The part of a matrix that one token uses: experts have `expert` in front of their inputs."""
  axes = info.axes[info.axes[0] == "layers" :]
  return cfg.experts_per_token / cfg.num_experts if axes[0] == "expert" else 1.0


def visible_pairs(length: int, window: int | None, *, causal: bool) -> int:
  """Query-key pairs of a document of `length` tokens that a layer with this window computes.

  Causal: position p sees min(p + 1, window) keys; otherwise all that are at most window // 2 away.
  """
  if causal:
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near
  reach = length if window is None else min(length, window // 2 + 1)  # Own place included.
  one_side = reach * (reach + 1) // 2 + (length - reach) * reach
  return 2 * one_side - length
