"""Model FLOPs: what the mathematics of a training step needs, however it is computed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict

from model.config import ModelConfig
from model.heads import WORD_HEADS, abstract
from model.layers import ParamInfo, param_info
from model.peft.names import KEY, Path


def model_flops(
  cfg: ModelConfig, tokens: Mapping[str, float], pairs: Mapping[str, float],
  read: Mapping[str, float] | None = None, learned: Mapping[str, float] | None = None,
) -> float:  # fmt: skip
  """FLOPs of one forward and backward pass; the backward pass costs twice the forward, but for
  matrices that are not trained, whose own gradient nobody needs.

  Args:
    tokens: by stack the tokens that it reads and that are not padding, and by `head` the vectors
      that the head reads.
    pairs: query-key pairs that one layer computes, masked ones not counted (see `visible_pairs`):
      by `STACK.WINDOW` of `cfg.layers`, and by `cross` those of cross-attention.
    read: weights that each token is multiplied with, as `matmul_params`, which it is by default.
    learned: those of them that are trained; None: all.

  A multiplication and an addition count as two. Recomputed activations, the embedding lookup,
  norms and element-wise functions are not counted (PaLM, arXiv:2204.02311, appendix B).
  """
  terms = 1 + len(cfg.relative_terms)
  width = cfg.num_heads * (cfg.head_width * terms + cfg.value_width)
  read = matmul_params(cfg) if read is None else read
  learned = read if learned is None else learned
  products = sum(2 * (2 * read[part] + learned[part]) * tokens[part] for part in read)
  seen = 0.0
  for stack in cfg.stacks:
    for kind in cfg.layers(stack):
      seen += pairs[f"{stack}.{kind.window}"] + (pairs["cross"] if kind.cross else 0.0)
  return products + 3 * 2 * seen * width  # QK' and its like, and AV.


@functools.lru_cache
def matmul_params(cfg: ModelConfig) -> dict[str, float]:
  """Weights that each token is multiplied with, by the stack whose tokens they are, and `head`.

  All matrices, of experts the share that a token goes through; the embedding only where it is also
  the head. Keys and values of cross-attention belong to the encoder's tokens. Padding of the
  vocabulary is left out, and what is multiplied with vectors of positions, once a batch.
  """
  return counted_params(cfg, abstract(cfg))


def counted_params(
  cfg: ModelConfig, net: nnx.Module, part: Callable[[Path, Any], float] = lambda path, leaf: 1.0
) -> dict[str, float]:
  """`matmul_params` of an abstract network that may have adapters.

  Args:
    part: the share of a parameter that counts, by its path.
  """
  leaves: Any = flatten_dict(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
  infos: Any = flatten_dict(param_info(net))
  totals = dict.fromkeys((*cfg.stacks, "head"), 0.0)
  if cfg.tie_embeddings and cfg.head_kind in WORD_HEADS:
    table = ("decoder_embed" if cfg.decoder_embed else "embed", "table")
    totals["head"] += cfg.embed_width * cfg.real_vocab * part(table, leaves[table])
  for path, info in infos.items():
    if info.role != "matrix" or path[0] not in totals or _once(path):
      continue
    crossing = "cross_attn" in path and ("k_proj" in path or "v_proj" in path)
    uses = cfg.layer_uses(str(path[0])) if info.axes[0] == "layers" else 1
    count = info.count(leaves[path].shape, cfg.real_vocab) * _share(cfg, info) * uses
    totals["encoder" if crossing else path[0]] += count * part(path, leaves[path])
  return totals


def _once(path: Path) -> bool:
  """Whether a matrix is multiplied with vectors of positions or of virtual tokens, once a batch."""
  return "relative" in path or (path[0] != "head" and path[1] == KEY)


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
