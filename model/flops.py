"""Model FLOPs: what the mathematics of a training step needs, however it is computed."""

import functools

import jax
from flax import nnx

from model.config import ModelConfig
from model.heads import abstract
from model.layers import ParamInfo, param_info


def model_flops(cfg: ModelConfig, tokens: float, pairs: dict[str, float]) -> float:
  """FLOPs of one forward and backward pass; the backward pass costs twice the forward.

  Args:
    tokens: tokens that are not padding.
    pairs: for each window of `cfg.layers()` (by `str(window)`), the query-key pairs that one layer
      with it can see: see `visible_pairs`. Masked pairs are not counted.

  A multiplication and an addition count as two. Recomputed activations, the embedding lookup,
  norms and element-wise functions are not counted (PaLM, arXiv:2204.02311, appendix B).
  """
  width = cfg.num_heads * cfg.head_width
  attention = sum(4 * pairs[str(kind.window)] * width for kind in cfg.layers())  # QK' and AV.
  return 3 * (2 * matmul_params(cfg) * tokens + attention)


@functools.lru_cache
def matmul_params(cfg: ModelConfig) -> float:
  """Weights that each token is multiplied with.

  All matrices, of experts the share that a token goes through; the embedding only where it is also
  the head. Padding of the vocabulary is left out.
  """
  net = abstract(cfg)
  shapes = jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
  infos = jax.tree.leaves(param_info(net), is_leaf=lambda i: isinstance(i, ParamInfo))
  vocab = cfg.real_vocab
  total = cfg.d_model * vocab if cfg.tie_embeddings else 0
  for shape, info in zip((s.shape for s in shapes), infos, strict=True):
    if info.role == "matrix":
      total += info.count(shape, vocab) * _share(cfg, info)
  return total


def _share(cfg: ModelConfig, info: ParamInfo) -> float:
  """The part of a matrix that one token uses: experts have `expert` in front of their inputs."""
  axes = info.axes[info.axes[0] == "layers" :]
  return cfg.experts_per_token / cfg.num_experts if axes[0] == "expert" else 1.0


def visible_pairs(length: int, window: int | None) -> int:
  """Query-key pairs of a causal document of `length` tokens: position p sees min(p + 1, window)."""
  near = length if window is None else min(length, window)
  return near * (near + 1) // 2 + (length - near) * near
