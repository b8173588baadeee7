"""A trained model as an object: parameters with what they mean, called like a function."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.errors import InputError
from model.heads import TEXT_HEADS, abstract, pool, unstack
from model.inputs import (
  check_decoder,
  check_ids,
  check_positions,
  most_segments,
  padded,
  shifted,
  whole_numbers,
)
from model.layers import turn
from model.mask import positions_of
from model.peft.attach import attached
from model.peft.virtual import has_prompt, virtual_tokens
from model.tokenizer import Tokenizer
from model.transformer import Inputs

TRAINED_BESIDE = ("generator",)  # Parameters that a checkpoint may hold and no model has.
_TEXTS = 64  # Texts that `embed` reads at a time.


@dataclasses.dataclass(frozen=True)
class Adapted:
  """What is known of a model's adapter beside its parameters."""

  base: str | None  # PATH of the base that it was put on, where that is known.
  rslora: bool  # Whether its updates are scaled by alpha / sqrt(rank), as a file says it.
  whole: tuple[tuple[str | int, ...], ...] = ()  # Paths of the base's parameters trained with it.
  hash: str | None = None  # Of the base, where the adapter says it.


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters and tokenizer. Pure: nothing changes when it is called."""

  config: ModelConfig
  params: dict
  tokenizer: Tokenizer | None = None
  labels: tuple[str, ...] | None = None  # Names of the classes, for heads that have them.
  family: str | None = None  # As what kind of models Hugging Face has it, where it came from there.
  end_ids: tuple[int, ...] = ()  # Tokens that end what it writes; (): the tokenizer's.
  text_limit: int | None = None  # Tokens of the longest text to embed; None: as many as positions.
  adapted: Adapted | None = None  # Of its adapter, which lies among the parameters.
  adapters: tuple[str, ...] = ()  # Names of several, of which each row of a batch may have one.
  rows: int = 1  # Rows that have one each, by `using`; 1: all have the same.

  @functools.cached_property
  def graphdef(self) -> nnx.GraphDef:
    """The network without parameters: `nnx.merge(m.graphdef, m.params)`."""
    return nnx.split(attached(abstract(self.config), self.params), nnx.Param)[0]

  @functools.cached_property
  def _unstacked(self) -> tuple[nnx.GraphDef, dict]:
    params = _separated(self.config, self.params)
    net = attached(abstract(self.config, stacked=False), params)
    params = turn(net, params)
    return nnx.split(net, nnx.Param)[0], params

  def unstacked(self) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params) with separate, turned arrays for each layer, which decodes faster."""
    return self._unstacked

  def room(self, stack: str) -> int | None:
    """Tokens of the longest text that a stack reads, or a decoder writes; None: any number."""
    limit = self.config.max_positions
    return None if limit is None else limit - virtual_tokens(self.params, stack)

  def merged(self) -> "Model":
    """The model with its adapter merged into its parameters: the same function, and no adapter.

    Raises:
      InputError: if it has none, or its dtype is too narrow to hold what the adapter adds.
    """
    from model.peft.merge import merged  # It makes models.

    return merged(self)

  def using(self, adapter: str | Sequence[str | None] | None) -> "Model":
    """The model with one of the adapters that it has by name, or for batches of as many rows as are
    named with one for each; None is the base. It shares all arrays and all that is compiled.

    Raises:
      InputError: for a name that it does not have.
    """
    from model.peft.named import using  # It makes models.

    return using(self, adapter)

  def with_adapter(self, name: str, other: "str | Path | Model") -> "Model":
    """The model, which has adapters by name, with another under a name: the one at a PATH, or that
    of a model of the same base. One that had the name gives way, and what is compiled serves on
    where ranks and places are no more than they were:

        m = model.load(BASE, adapter={"chat": DIR})
        infer.generate(m, prompts, adapter="chat")
        m = m.with_adapter("chat", NEWER)  # A swap: nothing is compiled, the base is not copied.

    Raises:
      InputError: if it has no adapters by name, or the other is of another base.
    """
    from model.peft.named import with_adapter  # It makes models.

    return with_adapter(self, name, other)

  def __call__(
    self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None, token_types: Int[Array, "B T"] | None = None,
    decoder_tokens: Int[Array, "B U"] | None = None,
    decoder_segments: Int[Array, "B U"] | None = None,
    decoder_positions: Int[Array, "B U"] | None = None,
  ) -> Float[Array, "..."]:  # fmt: skip
    """What the head says, compiled once for each shape.

    Args:
      tokens: ids; of an encoder–decoder, what the encoder reads. A decoder reads them causally
        here, with `prefix_attention` too.
      segments: from 1, 0 is nothing; tokens see their own segment only.
      positions: -1 is padding; omitted, they restart in each segment.
      token_types: of an encoder that has them; omitted, they are 0.
      decoder_tokens: what the decoder reads, the token that starts it first: nothing is shifted. A
        head on labels or spans needs none: the decoder reads `tokens` behind its start token, and
        the encoder alone embeds texts.
      decoder_segments, decoder_positions: as `segments` and `positions`.

    Returns:
      In at least float32: (B, T, V) of heads that score the vocabulary (V without padding; U
      instead of T for encoder–decoders); (B, labels) of a sequence head and (B, D) of an embedding,
      with a second axis for segments where they are given; (B, T, labels) of a token head, (B, T)
      of one that finds replaced tokens; (B, T, 2), start and end, of a span head.

    Raises:
      InputError: for ids outside of the vocabulary, positions that the model does not have, or
        arguments that its shape does not take.
    """
    inputs, source, texts = self._checked(
      tokens, segments, positions, token_types, decoder_tokens, decoder_segments, decoder_positions
    )
    return _logits(self.graphdef, self.config, self.params, inputs, source, texts)

  def apply(
    self, params: dict, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None, token_types: Int[Array, "B T"] | None = None,
    decoder_tokens: Int[Array, "B U"] | None = None,
    decoder_segments: Int[Array, "B U"] | None = None,
    decoder_positions: Int[Array, "B U"] | None = None,
  ) -> Float[Array, "..."]:  # fmt: skip
    """As calling the model, pure in `params` and traceable: for jax.grad and jax.jit."""
    inputs, source, texts = self._checked(
      tokens, segments, positions, token_types, decoder_tokens, decoder_segments, decoder_positions
    )
    return _apply(self.graphdef, self.config, params, inputs, source, texts)

  def hidden(
    self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None, token_types: Int[Array, "B T"] | None = None,
    decoder_tokens: Int[Array, "B U"] | None = None,
    decoder_segments: Int[Array, "B U"] | None = None,
    decoder_positions: Int[Array, "B U"] | None = None,
  ) -> Float[Array, "B T D"]:  # fmt: skip
    """Last hidden states, behind the last norm; of an encoder–decoder the encoder's, unless there
    are `decoder_tokens`. Arguments and errors as in calling the model.
    """
    if self.config.shape == "encoder_decoder" and decoder_tokens is None:
      check_decoder(decoder_tokens, decoder_segments, decoder_positions)
      source = self._side(tokens, segments, positions, token_types)
      return _encoded(self.graphdef, self.params, source)
    inputs, source, _ = self._checked(
      tokens, segments, positions, token_types, decoder_tokens, decoder_segments, decoder_positions
    )
    return _hidden(self.graphdef, self.params, inputs, source)

  def embed(self, texts: str | Sequence[str]) -> Float[np.ndarray, "n D"]:
    """One vector for each text, float32: its hidden states pooled as the config says.

    Of an encoder–decoder the encoder's; with an embedding head what that makes of them, otherwise
    the pooled states, of length 1 where `model.normalize` asks for it.

    Raises:
      InputError: for no text, a text longer than the model's positions, or a missing tokenizer.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if self.tokenizer is None or not texts:
      raise InputError("embed needs a tokenizer and at least one text.")
    ids = self.tokenizer.encode_batch(texts)
    room = self.room(self.config.stacks[0])
    limits = [n for n in (self.text_limit, room) if n is not None]
    limit = min(limits, default=None)
    for i, one in enumerate(ids):
      if not one or (limit is not None and len(one) > limit):
        raise InputError(
          f"text {i} has {len(one)} tokens: at least 1 and at most {limit} are needed."
        )
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out: Any = np.zeros((len(ids), self.config.d_model), np.float32)
    for start in range(0, len(order), _TEXTS):
      places = order[start : start + _TEXTS]
      rows = padded([ids[i] for i in places], room)
      vectors = _pooled(self.graphdef, self.config, self.params, *rows)
      out[places] = np.asarray(vectors)[: len(places)]
    return out

  def _checked(
    self, tokens, segments, positions, types, decoder_tokens, decoder_segments, decoder_positions
  ) -> tuple[Inputs, Inputs | None, int | None]:
    """(what the last stack reads, what an encoder before it reads, texts in a row if it pools)."""
    source = self._side(tokens, segments, positions, types)
    texts = self._texts(segments) if self.config.head_kind in TEXT_HEADS else None
    if self.config.shape != "encoder_decoder":
      for name, value in (("decoder_tokens", decoder_tokens),
                          ("decoder_segments", decoder_segments),
                          ("decoder_positions", decoder_positions)):  # fmt: skip
        if value is not None:
          raise InputError(f"{name} were given, and this model is no encoder–decoder.")
      return source, None, texts
    if self.config.head_kind == "embedding" and decoder_tokens is not None:
      raise InputError("decoder_tokens were given, and the encoder alone embeds texts.")
    check_decoder(decoder_tokens, decoder_segments, decoder_positions)
    if self.config.head_kind == "embedding":
      return source, None, texts
    if decoder_tokens is not None:
      other = self._side(decoder_tokens, decoder_segments, decoder_positions, None, "decoder_")
      if (source.seg is None) != (other.seg is None):
        raise InputError("give segments for the encoder and for the decoder, or for neither.")
      return other, source, texts
    if self.config.head_kind == "language" or self.config.decoder_start_id is None:
      raise InputError("an encoder–decoder needs decoder_tokens: what its decoder reads.")
    return shifted(source, self.config.decoder_start_id), source, texts

  def _texts(self, segments: Any) -> int | None:
    if segments is None:
      return 1
    return most_segments(segments)

  def _side(self, tokens: Any, segments: Any, positions: Any, types: Any, name="") -> Inputs:
    """The arrays as int32; of what is traced only the shape is checked."""
    tokens = whole_numbers(f"{name}tokens", tokens, least=0)
    if self.rows not in (1, len(tokens)):
      raise InputError(
        f"{self.rows} rows were given an adapter each, and {name}tokens have {len(tokens)} rows."
      )
    given = {f"{name}segments": (segments, 0), f"{name}positions": (positions, -1),
             "token_types": (types, 0)}  # fmt: skip
    arrays = []
    for what, (value, least) in given.items():
      array = None if value is None else whole_numbers(what, value, least=least)
      if array is not None and array.shape != tokens.shape:
        raise InputError(f"{what} have shape {array.shape}, but tokens {tokens.shape}.")
      arrays.append(array)
    segments, positions, types = arrays
    check_ids(f"{name}token", tokens, self.config.real_vocab)
    if types is not None:
      if not self.config.token_types:
        raise InputError("token_types were given, and this model has none.")
      check_ids("token type", types, self.config.token_types)
    stack = "decoder" if name else self.config.stacks[0]
    check_positions(self.room(stack), tokens.shape[1], segments, positions, self.config)
    if positions is None and segments is not None:
      positions = positions_of(jnp.asarray(segments))
    elif positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    prompted = has_prompt(self.params) and not name and segments is not None
    return Inputs(
      tokens, positions, segments, types, texts=most_segments(segments) if prompted else 1
    )


def _apply(graphdef, cfg: ModelConfig, params, inputs: Inputs, source: Inputs | None, texts):
  net, embeds = nnx.merge(graphdef, params), cfg.text_stack != cfg.stacks[-1]
  if texts is not None and source is None:
    inputs = net.prompted(inputs)
  x = net.encode(inputs)[0] if embeds else net.hidden(inputs, source=source)[0]
  if texts is not None:
    x = pool(x, inputs.pos, inputs.seg, how=cfg.pooling_of(cfg.text_stack), segments=texts)
    x = x[:, 0] if inputs.seg is None else x
  logits = net.logits(x)
  if cfg.head_kind == "replaced_token":
    return logits[..., 0]
  return logits if cfg.head_kind not in ("language", "masked_lm") else logits[..., : cfg.vocab_size]


_logits = jax.jit(_apply, static_argnums=(0, 1, 5))
_separate = jax.jit(unstack, static_argnums=0)  # One program for all models of a config.


def _separated(cfg: ModelConfig, params: dict) -> dict:
  """`unstack`; on one CPU without copies, as views of the stacked arrays."""
  leaves = jax.tree.leaves(params)
  if any(not isinstance(a, jax.Array) or isinstance(a, Tracer) for a in leaves):
    return _separate(cfg, params)
  devices = {device for a in leaves for device in a.devices()}
  if len(devices) > 1 or devices.pop().platform != "cpu":
    return _separate(cfg, params)
  return unstack(cfg, params, _view)


def _view(a: jax.Array, layer: int) -> jax.Array:
  """One layer of a stacked array in the CPU's memory, where it lies; a copy of one that lies at no
  multiple of what XLA's loads need.
  """
  sharding: Any = a.sharding if a.committed else None  # Else programs would be compiled twice.
  if isinstance(sharding, NamedSharding):
    sharding = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
  return jax.device_put(np.asarray(a)[layer], sharding, may_alias=True)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, params, inputs, source):
  return nnx.merge(graphdef, params).hidden(inputs, source=source)[0]


@functools.partial(jax.jit, static_argnums=0)
def _encoded(graphdef, params, source):
  return nnx.merge(graphdef, params).encode(source)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(graphdef, cfg: ModelConfig, params, tokens, pos):
  net = nnx.merge(graphdef, params)
  inputs = net.prompted(Inputs(tokens, pos))
  x = net.encode(inputs)[0] if cfg.shape == "encoder_decoder" else net.hidden(inputs)[0]
  x = pool(x, inputs.pos, None, how=cfg.pooling_of(cfg.stacks[0]), segments=1)[:, 0]
  if cfg.head_kind == "embedding":
    return net.logits(x).astype(jnp.float32)
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if cfg.normalize else x
