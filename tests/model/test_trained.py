"""A model as a function: the shape of what each head says, padding, packing, what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.heads import init_params
from model.inputs import decoder_start
from model.trained import Model
from model.vocabulary import build_tokenizer

BASE = ModelConfig(
  vocab_size=61, vocab_multiple=8, num_layers=2, d_model=16, d_ff=24, num_heads=2, max_positions=24,
  init_std=0.3,
)  # fmt: skip
TYPED = dict(shape="encoder", token_types=2)
BOTH = dict(shape="encoder_decoder", decoder_start_id=7)
# Changes of the config -> shape of what is said of 2 rows of 6 tokens, and 4 of a decoder's.
SHAPES = {
  "language": (dict(), (2, 6, 61)),
  "masked_lm": (TYPED, (2, 6, 61)),
  "replaced_token": (TYPED | dict(head="replaced_token"), (2, 6)),
  "sequence": (TYPED | dict(head="sequence", num_labels=3), (2, 3)),
  "regression": (dict(head="sequence", problem="regression"), (2, 1)),
  "token": (TYPED | dict(head="token", num_labels=3), (2, 6, 3)),
  "span": (TYPED | dict(head="span"), (2, 6, 2)),
  "embedding": (dict(head="embedding", pooling="mean"), (2, 16)),
  "seq2seq": (BOTH, (2, 4, 61)),
  "seq2seq_embedding": (BOTH | dict(head="embedding"), (2, 16)),
  "seq2seq_sequence": (BOTH | dict(head="sequence", num_labels=3, pooling="last"), (2, 3)),
}
TOKENS = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
DECODED = np.array([[7, 20, 21, 22], [7, 30, 31, 32]])


def built(name: str) -> Model:
  cfg = dataclasses.replace(BASE, **SHAPES[name][0])
  return Model(cfg, init_params(cfg, jax.random.key(0)))


def decoded(m: Model, tokens: np.ndarray, **more) -> dict:
  """The decoder's arguments, of a model whose decoder is told what to read."""
  writes = m.config.shape == "encoder_decoder" and m.config.head_kind == "language"
  return dict(decoder_tokens=tokens, **more) if writes else {}


@pytest.mark.parametrize("name", SHAPES)
def test_what_each_head_says_has_its_shape_and_does_not_see_padding_or_neighbours(name):
  m, shape = built(name), SHAPES[name][1]
  whole = m(TOKENS, **decoded(m, DECODED))
  assert whole.shape == shape and whole.dtype == np.float32
  pad = lambda a, fill: np.pad(a, ((0, 0), (0, 3)), constant_values=fill)
  pos = lambda a: pad(np.broadcast_to(np.arange(a.shape[1]), a.shape), -1)
  padded = m(pad(TOKENS, 50), positions=pos(TOKENS),
             **decoded(m, pad(DECODED, 50), decoder_positions=pos(DECODED)))  # fmt: skip
  places = slice(None) if whole.ndim == 2 and name != "replaced_token" else slice(shape[1])
  np.testing.assert_allclose(padded[:, places], whole, atol=1e-5)
  # Both rows packed into one, a segment each.
  segments = lambda a: np.repeat([[1, 2]], a.shape[1], axis=1)
  packed = m(TOKENS.reshape(1, -1), segments=segments(TOKENS),
             **decoded(m, DECODED.reshape(1, -1), decoder_segments=segments(DECODED)))  # fmt: skip
  np.testing.assert_allclose(packed.reshape(whole.shape), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["masked_lm", "sequence", "embedding", "seq2seq"])
def test_apply_is_the_same_function_under_jit_and_has_gradients(name):
  m = built(name)
  call = lambda params: m.apply(params, TOKENS, **decoded(m, DECODED))
  np.testing.assert_allclose(jax.jit(call)(m.params), m(TOKENS, **decoded(m, DECODED)), atol=1e-5)
  grads = jax.jit(jax.grad(lambda params: (call(params) ** 2).mean()))(m.params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert np.abs(grads["embed"]["table"]).max() > 0


def test_hidden_states_are_those_of_the_last_stack_that_reads_something():
  m = built("seq2seq")
  assert m.hidden(TOKENS).shape == (2, 6, 16)
  assert m.hidden(TOKENS, decoder_tokens=DECODED).shape == (2, 4, 16)
  assert built("masked_lm").hidden(TOKENS).shape == (2, 6, 16)


@pytest.mark.parametrize("name", ["language", "embedding", "seq2seq_embedding", "masked_lm"])
def test_a_vector_stands_for_the_whole_text(name):
  tokenizer = build_tokenizer("char", None, ["ab "])
  m = dataclasses.replace(built(name), tokenizer=tokenizer)
  texts = ["a b", "ab ab", "a"]
  vectors = m.embed(texts)
  differ = np.abs(vectors[:, None] - vectors[None]).max(-1)
  assert (differ[~np.eye(3, dtype=bool)] > 1e-3).all(), "a decoder's first state is of a letter"
  if m.config.head_kind == "embedding":
    alone = [m(np.array([tokenizer.encode(text)]))[0] for text in texts]
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_a_decoder_cannot_tell_at_its_first_token_what_follows():
  with pytest.raises(ValueError, match="'last' or 'mean'"):
    dataclasses.replace(BASE, pooling="first")


def test_token_types_are_zero_where_none_are_given_and_count_where_they_are():
  m = built("masked_lm")
  np.testing.assert_array_equal(m(TOKENS), m(TOKENS, token_types=np.zeros_like(TOKENS)))
  assert np.abs(m(TOKENS) - m(TOKENS, token_types=np.ones_like(TOKENS))).max() > 1e-3


def test_a_decoder_behind_an_encoder_sees_its_past_and_all_that_was_read():
  m = built("seq2seq")
  want = m(TOKENS, decoder_tokens=DECODED)
  later, other = DECODED.copy(), TOKENS.copy()
  later[:, 3], other[:, 5] = 40, 40
  np.testing.assert_allclose(m(TOKENS, decoder_tokens=later)[:, :3], want[:, :3], atol=1e-6)
  assert (np.abs(m(other, decoder_tokens=DECODED) - want).max(-1) > 1e-4).all()


@pytest.mark.parametrize(
  ("name", "arguments", "said"),
  [
    ("language", dict(token_types=TOKENS * 0), "token_types were given, and this model has none"),
    ("masked_lm", dict(token_types=TOKENS * 0 + 2), "token type 2 is outside"),
    ("language", dict(decoder_tokens=DECODED), "decoder_tokens were given, and this model is no"),
    ("masked_lm", dict(decoder_positions=DECODED), "decoder_positions were given"),
    ("seq2seq", dict(), "needs decoder_tokens"),
    ("seq2seq_sequence", dict(decoder_segments=DECODED), "without decoder_tokens"),
    ("seq2seq_embedding", dict(decoder_tokens=DECODED), "the encoder alone embeds"),
    ("seq2seq", dict(decoder_tokens=DECODED + 60), "decoder_token 92 is outside"),
    ("seq2seq", dict(decoder_tokens=DECODED[0]), "decoder_tokens have shape (4,)"),
    ("seq2seq", dict(decoder_tokens=DECODED, segments=TOKENS * 0 + 1), "for neither"),
    ("seq2seq", dict(decoder_tokens=np.zeros((2, 25), int)), "position 24 is beyond"),
    ("seq2seq", dict(decoder_tokens=DECODED, decoder_positions=DECODED[:, :3]), "(2, 3)"),
  ],
)
def test_arguments_that_a_shape_does_not_take_are_named(name, arguments, said):
  m = built(name)
  for call in (m, lambda tokens, **a: m.apply(m.params, tokens, **a)):
    with pytest.raises(ValueError, match=re.escape(said)):
      call(TOKENS, **arguments)


def test_a_decoder_starts_with_its_id_else_padding_else_the_beginning_of_a_text():
  named = dataclasses.replace(BASE, **BOTH)
  bare = dataclasses.replace(named, decoder_start_id=None)
  bytes_, char = build_tokenizer("bytes", None, []), build_tokenizer("char", None, ["ab"])
  assert decoder_start(named, None) == 7
  assert decoder_start(bare, bytes_) == bytes_.pad_id
  assert decoder_start(BASE, bytes_) is None
  for tokenizer in (None, char):
    with pytest.raises(ValueError, match=r"set model\.decoder_start_id"):
      decoder_start(bare, tokenizer)
