"""The attention of a model that reads a text: weights by layer and head, with the tokens."""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from infer.batch import end_ids
from infer.generate import generate
from infer.settings import Settings
from infer.text import BROKEN
from model.errors import InputError
from model.inputs import decoder_start, shifted
from model.observe import observe
from model.peft.virtual_files import has_virtual
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

Text = str | Sequence[int]
WRITTEN = 32  # Tokens that a decoder writes behind an encoder, where no target is given.


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
  """What each query gives each key: rows sum to 1, with a sink to 1 less what the sink takes.

  Attributes:
    weights: float32, by layer and head.
    queries, keys: the tokens, as a person reads them.
  """

  weights: Float[np.ndarray, "L N T S"]
  queries: tuple[str, ...]
  keys: tuple[str, ...]


def attention_maps(
  m: "Model", text: Text, *, target: Text | None = None
) -> dict[str, AttentionMap]:
  """The attention of one pass over a text.

  Args:
    text: a text or token ids; texts get the special tokens that the model reads them with.
    target: of an encoder–decoder that writes, what its decoder reads behind its start token; None:
      what it writes itself, greedily, up to 32 tokens.

  Returns:
    By name: "encoder", "decoder" (self-attention) and "cross" (a decoder's, to the encoder).

  Raises:
    InputError: for a text of no tokens or more than the model has positions for, a token outside
      of the vocabulary, or a target that the model has no use for.
  """
  if has_virtual(m.params):
    raise InputError(
      "attention maps show what a text's own tokens attend to, and this model puts virtual tokens "
      "before each text: draw those of its base."
    )
  tokens = _ids(m, "text", text)
  second = _second(m, tokens, target)
  with_encoder = m.config.shape == "encoder_decoder"
  both_ways = jnp.ones((1, len(tokens)), bool) if m.config.prefix_attention else None
  first = _inputs(tokens)
  if with_encoder and second is None:
    inputs, source = None, first
  elif second is not None:
    inputs, source = _inputs(second), first
  else:
    inputs, source = dataclasses.replace(first, bidirectional=both_ways), None
  plain = dataclasses.replace(m.config, remat="none")
  watched = m if plain == m.config else dataclasses.replace(m, config=plain)
  found = jax.device_get(_observed(*watched.unstacked(), inputs, source))
  return _named(m, found, tokens, second)


@functools.partial(jax.jit, static_argnames="graphdef")
def _observed(
  graphdef: nnx.GraphDef, params: dict, inputs: Inputs | None, source: Inputs | None
) -> list[Float[Array, "N T S"]]:
  net = nnx.merge(graphdef, params)
  with observe() as seen:
    if inputs is None and source is not None:
      net.encode(source)
    else:
      net.hidden(inputs, source=source)
  return [weights[0].astype("float32") for weights in seen]


def _named(
  m: "Model", found: list[np.ndarray], tokens: list[int], second: list[int] | None
) -> dict[str, AttentionMap]:
  """The weights of each stack's layers, which were seen in the order in which they ran."""
  stacks = m.config.stacks if second is not None else m.config.stacks[:1]
  read = {stack: labels(m, tokens) for stack in stacks[:1]}
  read |= {stack: labels(m, second or []) for stack in stacks[1:]}
  rest = iter(found)
  out: dict[str, list[np.ndarray]] = {}
  for stack in stacks:
    for kind in m.config.layers(stack):
      out.setdefault(stack, []).append(next(rest))
      if kind.cross:
        out.setdefault("cross", []).append(next(rest))
  keys = lambda name: read[stacks[0] if name == "cross" else name]
  queries = lambda name: read[stacks[-1] if name == "cross" else name]
  return {
    name: AttentionMap(np.stack(layers), queries(name), keys(name)) for name, layers in out.items()
  }


def _ids(m: "Model", name: str, text: Text) -> list[int]:
  """Token ids of a text as the model reads it, checked."""
  if isinstance(text, str):
    if m.tokenizer is None:
      raise InputError(f"{name} is a text and the model has no tokenizer: give token ids.")
    continued = name == "target" or (
      m.config.shape == "decoder" and m.config.head_kind == "language"
    )
    tokens = m.tokenizer.encode_prompt(text) if continued else m.tokenizer.encode(text)
  else:
    tokens = [int(token) for token in text]
  limit, vocab = m.config.max_positions, m.config.real_vocab
  room = None if limit is None else limit - (name == "target")
  if not tokens or (room is not None and len(tokens) > room):
    raise InputError(f"{name} has {len(tokens)} tokens: at least 1 and at most {room} are needed.")
  for token in tokens:
    if not 0 <= token < vocab:
      raise InputError(f"{name}: token {token} is not in the vocabulary of ids 0 to {vocab - 1}.")
  return tokens


def _second(m: "Model", tokens: list[int], target: Text | None) -> list[int] | None:
  """What a decoder behind an encoder reads; None where there is none."""
  cfg = m.config
  writes = cfg.shape == "encoder_decoder" and cfg.head_kind == "language"
  if target is not None and not writes:
    raise InputError(
      f"target has no effect on this model ({cfg.shape}, head {cfg.head_kind!r}): it is what the "
      "decoder of an encoder–decoder reads that writes text."
    )
  start = decoder_start(cfg, m.tokenizer)
  if start is None or cfg.head_kind == "embedding":
    return None
  if not writes:  # Its decoder reads the text again.
    return np.asarray(shifted(_inputs(tokens), start).tokens)[0].tolist()
  if target is not None:
    return [start, *_ids(m, "target", target)]
  room = WRITTEN if cfg.max_positions is None else min(WRITTEN, cfg.max_positions - 1)
  written = generate(m, [tokens], max_new_tokens=room)[0].tokens
  ends = end_ids(m, Settings())
  return [start, *(written[:-1] if written[-1] in ends else written)]


def _inputs(tokens: list[int]) -> Inputs:
  """One row of tokens."""
  return Inputs(jnp.array([tokens], jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32)[None])


def labels(m: "Model", tokens: Sequence[int]) -> tuple[str, ...]:
  """Tokens as a person reads them: spaces are dots, what cannot be seen is spelled."""
  return tuple(_label(m, token) for token in tokens)


def _label(m: "Model", token: int) -> str:
  if m.tokenizer is None:
    return str(token)
  raw = m.tokenizer.backend.id_to_token(token)
  if raw is None:
    return str(token)
  text = m.tokenizer.decode([token])
  if token in m.tokenizer.special_ids or "▁" in raw or raw.startswith("##") or not text:
    text = raw.replace("▁", " ")
  elif BROKEN in text:
    text = raw
  seen = {" ": "·", "\n": "⏎", "\t": "⇥"}
  spelled = lambda c: seen.get(c) or (f"\\u{ord(c):04x}" if _hidden(c) else c)
  return "".join(map(spelled, text))


def _hidden(character: str) -> bool:
  return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
