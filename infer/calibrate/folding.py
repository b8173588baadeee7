"""Where a layer's parameters can take scales of channels from each other, so that what the layer
computes stays the same: what is divided in one place is multiplied in the next.

Sources: AWQ, arXiv:2306.00978, section 3.2; SmoothQuant, arXiv:2211.10438, section 4.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.config import LayerKind, ModelConfig

Path = tuple[str, ...]
Params = dict[Path, Array]  # Of one layer, flat.

_EXPERT_MATRICES = [("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")]


@dataclasses.dataclass(frozen=True)
class Site:
  """Scales, and what they go through.

  Attributes:
    name: for reports.
    readers: matrices whose inputs are multiplied, without their last name `w`.
    others: parameters that read the same and are never rounded, such as a router.
    channel: which scale each input of the readers (flat) has.
    divided: what comes before -> the same with its outputs divided by the scales.
    expert: whose matrices alone are meant; None: those of all.
  """

  name: str
  readers: tuple[Path, ...]
  channel: Int[np.ndarray, "I"]
  divided: Callable[[Params, Float[Array, "c"]], Params]
  others: tuple[Path, ...] = ()
  expert: int | None = None

  @property
  def scales(self) -> int:
    """How many scales there are."""
    return int(self.channel.max()) + 1

  def folded(self, params: Params, scales: Float[Array, "c"]) -> Params:
    """A layer that computes the same, whose readers read inputs divided by `scales`."""
    out = dict(params) | self.divided(params, scales)
    each = scales[self.channel]
    for path in (*((*p, "w") for p in self.readers), *self.others):
      out[path] = _multiplied(out[path], each, path, self.expert)
    return out


def sites(cfg: ModelConfig, kind: LayerKind, shapes: Mapping[Path, tuple[int, ...]]) -> list[Site]:
  """All of a layer, in the order in which it computes.

  Args:
    kind: of the layer.
    shapes: of its parameters.
  """
  there = lambda *paths: tuple(p for p in paths if (*p, "w") in shapes)
  found = []
  for name in ("attn", "cross_attn"):
    found += _of_attention(cfg, name, shapes, there)
  mlp = there(("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "shared", "gate_proj"),
              ("mlp", "shared", "up_proj"), ("mlp", "shared_gate"))  # fmt: skip
  router = (("mlp", "router", "w"),) if kind.experts else ()
  if cfg.residual == "parallel":
    found = [_joined(site, mlp, router) if site.name == "attn_norm" else site for site in found]
  elif ("mlp_norm", "scale") in shapes:
    found.append(_of_norm(cfg, ("mlp_norm",), mlp, shapes, router))
  if _linear_in_up(cfg):
    for mlp in there(("mlp", "up_proj"), ("mlp", "shared", "up_proj")):
      found += _of_hidden(cfg, mlp[:-1], shapes)
  return found


def _of_attention(cfg: ModelConfig, name: str, shapes, there) -> list[Site]:
  attn, found = (name,), []
  queries = there((*attn, "q_proj"), (*attn, "q_proj", "down_proj"))
  keys = there((*attn, "k_proj"), (*attn, "v_proj"), (*attn, "kv_proj", "down_proj"))
  # Vectors of positions go through the projections of tokens, unless they have their own.
  alone = cfg.positions != "disentangled" or cfg.relative_own_proj
  if (f"{name}_norm", "scale") in shapes and alone:
    readers = queries if name == "cross_attn" else queries + keys  # Its keys are the encoder's.
    found.append(_of_norm(cfg, (f"{name}_norm",), readers, shapes))
  for latent in there((*attn, "q_proj", "up_proj"), (*attn, "kv_proj", "up_proj")):
    found.append(_of_norm(cfg, (*latent[:-1], "norm"), (latent,), shapes))
  if queries:
    found.append(_of_values(cfg, attn))
  return found


def _of_norm(cfg: ModelConfig, norm: Path, readers, shapes, others: tuple[Path, ...] = ()) -> Site:
  offset = float(cfg.norm_offset)

  def divided(params: Params, scales: Array) -> Params:
    out = {}
    for path, more in (((*norm, "scale"), offset), ((*norm, "bias"), 0.0)):
      if path in params:
        out[path] = ((params[path] + more) / scales - more).astype(params[path].dtype)
    return out

  channel = np.arange(shapes[(*norm, "scale")][0])
  return Site(".".join(norm), readers, channel, divided, others)


def _joined(site: Site, readers: tuple[Path, ...], others: tuple[Path, ...]) -> Site:
  return dataclasses.replace(site, readers=site.readers + readers, others=others)


def _of_values(cfg: ModelConfig, attn: Path) -> Site:
  """From values to what mixes heads. Heads that share values share their scales."""
  latent = cfg.kv_latent_dim is not None
  heads = cfg.num_heads if latent else cfg.kv_heads
  width, still = cfg.value_width, 0
  if latent:
    still = cfg.head_width - cfg.rotated_width  # What comes before a head's values are its keys.
  made = (*attn, "kv_proj", "up_proj") if latent else (*attn, "v_proj")

  def divided(params: Params, scales: Array) -> Params:
    by = jnp.concatenate((jnp.ones((heads, still)), scales.reshape(heads, width)), axis=-1)
    paths = [p for p in ((*made, "w"), (*made, "b")) if p in params]
    return {p: (params[p] / by).astype(params[p].dtype) for p in paths}

  own = np.arange(heads * width).reshape(heads, width)
  channel = np.repeat(own, cfg.num_heads // heads, axis=0).reshape(-1)
  return Site(".".join(made), ((*attn, "o_proj"),), channel, divided)


def _linear_in_up(cfg: ModelConfig) -> bool:
  """Whether what down_proj reads is some power of what up_proj gives, times what it gives not."""
  if cfg.gated:
    return cfg.gate_limit is None and cfg.gate_offset == 0
  return cfg.activation in ("relu", "relu_squared")


def _of_hidden(cfg: ModelConfig, mlp: Path, shapes) -> list[Site]:
  """From the hidden elements of an MLP, or of each expert, to what reads them."""
  power = 0.5 if not cfg.gated and cfg.activation == "relu_squared" else 1.0
  up, down = (*mlp, "up_proj"), (*mlp, "down_proj")
  shape = shapes[(*up, "w")]

  def site(expert: int | None) -> Site:
    def divided(params: Params, scales: Array) -> Params:
      by, out = scales**power, {}
      for path in ((*up, "w"), (*up, "b")):
        if path in params:
          old = params[path]
          new = (old / by if expert is None else old.at[expert].divide(by)).astype(old.dtype)
          out[path] = new
      return out

    name = ".".join(up) if expert is None else f"{'.'.join(up)}[{expert}]"
    return Site(name, (down,), np.arange(shape[-1]), divided, expert=expert)

  return [site(None)] if len(shape) == 2 else [site(e) for e in range(shape[0])]


def _multiplied(w: Array, each: Array, path: Path, expert: int | None) -> Array:
  """A matrix whose inputs, the flat ones of `each`, are multiplied."""
  if expert is not None:
    return w.at[expert].multiply(each[:, None].astype(w.dtype))
  if path[:-1] in _EXPERT_MATRICES and w.ndim == 3:
    return (w * each[:, None]).astype(w.dtype)
  axes, rest = 0, len(each)
  while rest > 1:
    rest //= w.shape[axes]
    axes += 1
  by = each.reshape(*w.shape[:axes], *[1] * (w.ndim - axes))
  return (w * by).astype(w.dtype)
