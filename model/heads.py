"""Heads, and the whole network: embeddings, an encoder or decoder or both, and a head."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.attention import Context
from model.cache import Cache
from model.config import ModelConfig
from model.errors import InputError
from model.layers import Embed, Linear, Norm, ParamInfo, activation, dropout, param, param_info
from model.peft.virtual import in_front
from model.sharding import constrain_rows
from model.transformer import Aux, Inputs, Stack, join_aux

TEXT_HEADS = ("sequence", "embedding")  # One answer for a text; the others have one for a token.
WORD_HEADS = ("language", "masked_lm")  # Score the vocabulary.


class Head(nnx.Module):
  """What a network says: scores of the vocabulary or of labels, ends of spans, or an embedding.

  Where asked for, a dense layer with an activation and a norm come first: the transform of BERT's
  masked-LM head, its pooler, the discriminator's layer of ELECTRA. Vocabularies are scored against
  the embedding table where the two are tied; where that is narrower, the dense layer leads there.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    D, zeros = cfg.d_model, jax.nn.initializers.zeros
    width = cfg.embed_width if cfg.head_kind in WORD_HEADS else D
    if cfg.head_dense:
      axes = ("embed", "embed_out")
      self.dense = Linear(cfg, (D, width), axes, rngs=rngs, bias=cfg.head_dense_bias)
    if cfg.head_norm:
      self.norm = Norm(cfg, rngs=rngs, shape=(width,))
    if cfg.head_kind in WORD_HEADS:
      if not cfg.tie_embeddings:
        self.proj = Linear(cfg, (width, cfg.padded_vocab), ("embed", "vocab"), rngs=rngs)
      if cfg.logit_bias:
        shape, axes = (cfg.padded_vocab,), ("vocab",)
        self.bias = param(cfg, rngs, shape, axes, role="vector", init=zeros)
    elif cfg.head_kind != "embedding":
      axes = ("embed", "label")
      self.proj = Linear(cfg, (D, cfg.outputs), axes, rngs=rngs, bias=cfg.head_bias)

  def __call__(
    self, x: Float[Array, "... D"], embed: Embed, key: jax.Array | None = None
  ) -> Float[Array, "... C"]:
    """Scores in at least float32; embeddings of length 1 where the config asks for it.

    Args:
      x: hidden states, of tokens or of whole texts (`pool`).
      embed: the table of tokens.
      key: of the dropout before labels are told.
    """
    x = self._transformed(constrain_rows(x), key)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if self.cfg.head_kind in WORD_HEADS:
      return self._words(x, embed)
    if self.cfg.head_kind != "embedding":
      return self.proj(x).astype(wide)
    x = x.astype(wide)
    if not self.cfg.normalize:
      return x
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  def _transformed(self, x: Array, key: jax.Array | None) -> Array:
    labels = self.cfg.head_kind in ("sequence", "token", "span")
    keys = (None, None) if key is None or not labels else jax.random.split(key)
    if self.cfg.head_dense:
      x = dropout(x, self.cfg.dropout, keys[0]) if self.cfg.head_kind == "sequence" else x
      x = constrain_rows(activation(self.cfg.head_activation)(self.dense(x)))
    if self.cfg.head_norm:
      x = self.norm(x)
    return dropout(x, self.cfg.dropout, keys[1])

  def _words(self, x: Array, embed: Embed) -> Float[Array, "... V"]:
    """Scores over the padded vocabulary; what is padding scores -inf."""
    cfg = self.cfg
    if cfg.logit_scale is not None:
      x = x * jnp.asarray(cfg.logit_scale, x.dtype)
    logits = embed.attend(x) if cfg.tie_embeddings else self.proj(x)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if cfg.logit_bias:
      logits += self.bias[...]
    if cfg.logit_softcap is not None:
      logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    if cfg.padded_vocab == cfg.real_vocab:
      return logits
    return jnp.where(jnp.arange(cfg.padded_vocab) < cfg.real_vocab, logits, -jnp.inf)


class PairHead(nnx.Module):
  """Whether two texts belong together, from the first token's hidden state (BERT's pooler)."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    axes = ("embed", "embed_out")
    self.dense = Linear(cfg, (cfg.d_model, cfg.d_model), axes, rngs=rngs, bias=True)
    self.proj = Linear(cfg, (cfg.d_model, 2), ("embed", "label"), rngs=rngs, bias=True)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... 2"]:
    """Scores of (they follow each other, they do not)."""
    scores = self.proj(constrain_rows(jnp.tanh(self.dense(constrain_rows(x)))))
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


class Network(nnx.Module):
  """Embeddings of tokens, the stacks of the config's shape, and a head on the last of them."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = True):
    self.cfg = cfg
    self.embed = Embed(cfg, cfg.padded_vocab, "vocab", rngs=rngs)
    if cfg.decoder_embed:
      self.decoder_embed = Embed(cfg, cfg.padded_vocab, "vocab", rngs=rngs)
    if "encoder" in cfg.stacks:
      self.encoder = Stack(cfg, "encoder", rngs=rngs, stacked=stacked)
    if "decoder" in cfg.stacks:
      self.decoder = Stack(cfg, "decoder", rngs=rngs, stacked=stacked)
    self.head = Head(cfg, rngs=rngs)
    if cfg.pair_head:
      self.pair = PairHead(cfg, rngs=rngs)

  @property
  def _table(self) -> Embed:
    """The table of tokens of the last stack."""
    return self.decoder_embed if self.cfg.decoder_embed else self.embed

  def encode(
    self, inputs: Inputs, *, key: jax.Array | None = None
  ) -> tuple[Float[Array, "B S D"], Aux]:
    """Last hidden states of the encoder, and sums that router losses need."""
    x, _, aux = self.encoder(self.embed, self.prompted(inputs), key=key)
    return _last(x, inputs), aux

  @property
  def prompt_tokens(self) -> int:
    """Virtual tokens of each text that the first layer of the first stack reads."""
    return getattr(self, self.cfg.stacks[0]).prompt_tokens

  def prompted(self, inputs: Inputs) -> Inputs:
    """What the first stack reads, with virtual tokens in front where they are not among them yet.

    Hidden states of what they are not among have none for them either.
    """
    count = self.prompt_tokens
    return in_front(inputs, count) if count and not inputs.placed else inputs

  def begun(self, cache: Cache, length: Int[Array, "B"]) -> Cache:
    """The empty cache of a decoder with the virtual tokens that stand before each text.

    Args:
      length: of the text of each row.
    """
    return self.decoder.begun(self._table, cache, length)

  def hidden(
    self, inputs: Inputs, *, source: Inputs | None = None, cache: Cache | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache | None, Aux]:  # fmt: skip
    """Last hidden states; see Stack.

    Args:
      inputs: what the last stack reads: of an encoder–decoder what the decoder reads, the token
        that starts it first.
      source: what the encoder of an encoder–decoder reads; not given with a cache (`read`).
    """
    if len(self.cfg.stacks) == 1:
      stack = self.encoder if self.cfg.shape == "encoder" else self.decoder
      whole = self.prompted(inputs) if cache is None else inputs
      x, cache, aux = stack(self.embed, whole, cache=cache, key=key)
      return _last(x, inputs), cache, aux
    keys = (None, None) if key is None else jax.random.split(key)
    context, auxes = None, []
    if source is not None:
      source = self.prompted(source)
      x, aux = self.encode(source, key=keys[0])
      context, auxes = Context(x, source.pos, source.seg), [aux] if aux else []
    elif cache is None:
      raise InputError("an encoder–decoder needs tokens for its encoder and for its decoder.")
    x, cache, aux = self.decoder(self._table, inputs, context=context, cache=cache, key=keys[1])
    return x, cache, join_aux(auxes + ([aux] if aux else []))

  def read(self, cache: Cache, source: Inputs) -> Cache:
    """The cache of a decoder with what the encoder makes of `source`, one text a row."""
    source = self.prompted(source)
    x, _ = self.encode(source)
    return self.decoder.read(cache, Context(x, source.pos, None))

  def logits(self, x: Float[Array, "... D"], key: jax.Array | None = None) -> Float[Array, "... C"]:
    """What the head says about hidden states of tokens, or about pooled ones of texts."""
    return self.head(x, self._table, key)

  def pair_logits(self, x: Float[Array, "... D"]) -> Float[Array, "... 2"]:
    """What the pair head says about hidden states of first tokens."""
    return self.pair(x)


def _last(x: Float[Array, "B S D"], inputs: Inputs) -> Float[Array, "B T D"]:
  """Hidden states of the tokens of `inputs`, which lie behind all others."""
  return x[:, x.shape[1] - inputs.pos.shape[1] :]


def pool(
  x: Float[Array, "B T D"], pos: Int[Array, "B T"], seg: Int[Array, "B T"] | None, *,
  how: str, segments: int,
) -> Float[Array, "B S D"]:  # fmt: skip
  """One vector for each of the first `segments` segments of a row; zeros where there is none.

  Args:
    seg: None: each row is one segment.
    how: `first`, `last` (by position) or `mean`, which is taken in at least float32.
  """
  seg = jnp.ones_like(pos) if seg is None else seg
  number = jnp.arange(1, segments + 1)[:, None]
  own = (seg[:, None] == number) & (pos[:, None] >= 0)  # (B, S, T)
  if how != "mean":
    edge = jnp.where(
      own, pos[:, None] if how == "last" else -pos[:, None], jnp.iinfo(jnp.int32).min
    )
    place = jnp.argmax(edge, axis=-1)
    rows = jnp.take_along_axis(x, place[..., None], axis=1)
    return jnp.where(jnp.any(own, axis=-1)[..., None], rows, 0)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  weight = own / jnp.maximum(jnp.sum(own, axis=-1, keepdims=True), 1)
  mean = jnp.einsum("BST,BTD->BSD", weight.astype(wide), x.astype(wide), precision="highest")
  return mean.astype(x.dtype)


def build(cfg: ModelConfig, rngs: nnx.Rngs, *, stacked: bool = True) -> Network:
  """The network of `cfg` with fresh parameters."""
  return Network(cfg, rngs=rngs, stacked=stacked)


def abstract(cfg: ModelConfig, *, stacked: bool = True) -> Network:
  """The network of `cfg` with shapes in the place of parameters."""
  return nnx.eval_shape(lambda: build(cfg, nnx.Rngs(0), stacked=stacked))


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
  """Fresh parameters as a nested dict: what a jitted, sharded initialization calls."""
  return nnx.to_pure_dict(nnx.state(build(cfg, nnx.Rngs(params=key)), nnx.Param))


def unstack(
  cfg: ModelConfig, params: dict, layer: Callable[[Any, int], Any] = operator.getitem
) -> dict:  # fmt: skip
  """Parameters of stacked layers -> parameters with one entry per layer (`stacked=False`).

  Args:
    layer: takes one of a stacked array.
  """
  out = dict(params)
  for name in cfg.stacks:
    layers, stack = [], 0
    stacks = params[name]["layers"]
    for pattern, repeats in cfg.groups(name):
      for r in range(repeats):
        own = r // cfg.layer_uses(name)
        for place in range(len(pattern)):
          layers.append(jax.tree.map(lambda a: layer(a, own), stacks[stack + place]))  # noqa: B023
      stack += len(pattern)
    out[name] = {**params[name], "layers": dict(enumerate(layers))}
  return out


def count_params(cfg: ModelConfig) -> int:
  """Parameters of the network of `cfg`, the padding of the vocabulary left out."""
  net = abstract(cfg)
  infos = jax.tree.leaves(param_info(net), is_leaf=lambda i: isinstance(i, ParamInfo))
  shapes = [p.shape for p in jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, nnx.Param)))]
  pairs = zip(infos, shapes, strict=True)
  return sum(info.count(shape, cfg.real_vocab) for info, shape in pairs)
