"""Heads, and the whole network: a body with a head on it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.cache import KVCache
from model.config import ModelConfig
from model.layers import Linear, ParamInfo, param, param_info
from model.transformer import Aux, Decoder


class LanguageHead(nnx.Module):
  """Scores of the next token; the embedding table is its matrix when the two are tied."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    D, V, axes = cfg.d_model, cfg.padded_vocab, ("embed", "vocab")
    if not cfg.tie_embeddings:
      self.proj = Linear(cfg, (D, V), axes, rngs=rngs)
    if cfg.logit_bias:
      zeros = jax.nn.initializers.zeros
      self.bias = param(cfg, rngs, (V,), ("vocab",), role="vector", init=zeros)

  def __call__(self, x: Float[Array, "... D"], body: Decoder) -> Float[Array, "... V"]:
    cfg = self.cfg
    logits = body.embed.attend(x) if cfg.tie_embeddings else self.proj(x)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if cfg.logit_bias:
      logits += self.bias[...]
    if cfg.logit_softcap is not None:
      logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    if cfg.padded_vocab == cfg.real_vocab:
      return logits
    return jnp.where(jnp.arange(cfg.padded_vocab) < cfg.real_vocab, logits, -jnp.inf)


class Network(nnx.Module):
  """A body (embeddings and blocks) and a head."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = True):
    self.body = Decoder(cfg, rngs=rngs, stacked=stacked)
    self.head = LanguageHead(cfg, rngs=rngs)

  def hidden(
    self, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], seg: Int[Array, "B T"] | None = None,
    *, cache: tuple[KVCache, ...] | None = None, key: jax.Array | None = None,
    ordered: bool = False,
  ) -> tuple[Float[Array, "B T D"], tuple[KVCache, ...] | None, Aux]:  # fmt: skip
    """The last hidden states; see Decoder."""
    return self.body(tokens, pos, seg, cache=cache, key=key, ordered=ordered)

  def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Scores in at least float32, over the padded vocabulary; what is padding scores -inf."""
    return self.head(x, self.body)


def build(cfg: ModelConfig, rngs: nnx.Rngs, *, stacked: bool = True) -> Network:
  """The network of `cfg` with fresh parameters."""
  return Network(cfg, rngs=rngs, stacked=stacked)


def abstract(cfg: ModelConfig, *, stacked: bool = True) -> Network:
  """The network of `cfg` with shapes in the place of parameters."""
  return nnx.eval_shape(lambda: build(cfg, nnx.Rngs(0), stacked=stacked))


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
  """Fresh parameters as a nested dict: what a jitted, sharded initialization calls."""
  return nnx.to_pure_dict(nnx.state(build(cfg, nnx.Rngs(params=key)), nnx.Param))


def unstack(cfg: ModelConfig, params: dict) -> dict:
  """Parameters of stacked layers -> parameters with one entry per layer (`stacked=False`)."""
  layers, stack = [], 0
  stacks = params["body"]["layers"]
  for pattern, repeats in cfg.groups():
    for r in range(repeats):
      for place in range(len(pattern)):
        layers.append(jax.tree.map(lambda a: a[r], stacks[stack + place]))  # noqa: B023
    stack += len(pattern)
  return {**params, "body": {**params["body"], "layers": dict(enumerate(layers))}}


def count_params(cfg: ModelConfig) -> int:
  """Parameters of the network of `cfg`, the padding of the vocabulary left out."""
  net = abstract(cfg)
  infos = jax.tree.leaves(param_info(net), is_leaf=lambda i: isinstance(i, ParamInfo))
  shapes = [p.shape for p in jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, nnx.Param)))]
  pairs = zip(infos, shapes, strict=True)
  return sum(info.count(shape, cfg.real_vocab) for info, shape in pairs)
