"""Generation behind virtual tokens equals full passes, however prompts are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer import generate, stream
from infer.attention.maps import attention_maps
from infer.prefix_cache import PrefixCache
from model.cache import new_cache
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.peft.attach import together
from model.peft.names import KEY
from model.peft.written import placed_prefix
from model.trained import Model

COUNT, NEW = 9, 8
BODY = ModelConfig(
  vocab_size=61, vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2,
  max_positions=64, init_std=0.3, layer_pattern=("local", "global"), window=6, dtype="float32",
)  # fmt: skip
LONG = dict(
  layer_pattern=("global",), window=None, rope_scaling="longrope", rope_original_positions=24,
  rope_short_factors=(1.0, 1.5), rope_long_factors=(1.0, 3.0), rope_factor=2.0,
)  # fmt: skip
PAIR = dataclasses.replace(
  BODY, shape="encoder_decoder", positions="t5_bias", norm="rms", relative_buckets=8,
  relative_max_distance=20, layer_pattern=("global",), window=None, decoder_start_id=0,
)  # fmt: skip
PROMPTS = [[5, 6, 7], list(range(1, 20)), [9]]


def made(kind, cfg=BODY):
  base, key = init_params(cfg, jax.random.key(0)), jax.random.key(1)
  if kind == "prompt":
    adapter = {cfg.stacks[0]: {KEY: {"prompt": jax.random.normal(key, (COUNT, cfg.d_model))}}}
  else:
    table = jax.random.normal(key, (COUNT, 2, 2, cfg.kv_heads, cfg.head_width))
    adapter: dict = {}
    for path, leaf in placed_prefix(table, cfg).items():
      below = adapter
      for name in path[:-1]:
        below = below.setdefault(name, {})
      below[path[-1]] = leaf
  return Model(cfg, together(base, adapter))


def check(m, **settings):
  """Each token is the likeliest one behind all before it, in one pass without a cache."""
  found = generate(m, PROMPTS, max_new_tokens=NEW, **settings)
  behind = m.config.shape == "encoder_decoder"
  for prompt, done in zip(PROMPTS, found, strict=True):
    assert len(done.tokens) == NEW
    read = [0, *done.tokens[:-1]] if behind else [*prompt, *done.tokens[:-1]]
    rows = [padded(prompt), padded(read)] if behind else [padded(read)]
    names = ("tokens", "positions", "decoder_tokens", "decoder_positions")
    logits = m(**dict(zip(names, [a for row in rows for a in row], strict=False)))[0]
    told = jax.nn.log_softmax(logits[len(read) - NEW : len(read)])
    assert told.argmax(-1).tolist() == done.tokens
    np.testing.assert_allclose(done.logprobs, told.max(-1), rtol=1e-4, atol=1e-4)


def padded(row):
  """(tokens, positions) of one row, on the right to 32."""
  tokens, pos = np.zeros((1, 32), np.int32), np.full((1, 32), -1, np.int32)
  tokens[0, : len(row)], pos[0, : len(row)] = row, np.arange(len(row))
  return tokens, pos


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_cached_decoding_of_ragged_prompts_in_chunks_equals_full_passes(kind):
  m = made(kind)
  check(m, prefill_chunk=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_guesses_kept_beginnings_beams_and_streams_hold_with_virtual_tokens(kind):
  m, plain = made(kind), Model(BODY, init_params(BODY, jax.random.key(0)))
  check(m)
  check(m, draft="lookup")
  check(m, draft=plain)
  cache = PrefixCache(m, block=8)
  check(m, prefix_cache=cache)
  check(m, prefix_cache=cache)
  assert cache.tokens_reused == 16
  with pytest.raises(InputError, match="another model"):
    generate(plain, PROMPTS, prefix_cache=cache)
  assert "".join(stream(m, PROMPTS[0], max_new_tokens=NEW)) == ""  # There is no tokenizer.
  for settings in (dict(num_beams=3), dict(penalty_alpha=0.3, top_k=4), dict(cache_dtype="int8"),
                   dict(repetition_penalty=1.3), dict(temperature=1.0, seed=3)):  # fmt: skip
    together_ = generate(m, PROMPTS, max_new_tokens=NEW, **settings)
    alone = [generate(m, [p], max_new_tokens=NEW, **settings)[0] for p in PROMPTS]
    assert [c.tokens for c in together_] == [c.tokens for c in alone], settings
  guessed = generate(plain, PROMPTS, max_new_tokens=NEW, draft=m)
  assert [c.tokens for c in guessed] == [
    c.tokens for c in generate(plain, PROMPTS, max_new_tokens=NEW)
  ]
  told = generate(m, PROMPTS[1], max_new_tokens=1, echo=True)[0].prompt_logprobs
  want = jax.nn.log_softmax(m(np.array([PROMPTS[1]]))[0])
  np.testing.assert_allclose(
    told, [float(want[i, t]) for i, t in enumerate(PROMPTS[1][1:])], atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_scalings_by_length_count_virtual_tokens(kind):
  m = made(kind, dataclasses.replace(BODY, **LONG))
  check(m)  # The longest prompt is beyond the original length, the others reach it.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_stands_behind_an_encoder_equals_full_passes(kind):
  m = made(kind, PAIR)
  check(m)
  check(m, cache_dtype="float32")


@pytest.mark.slow
def test_a_prefix_of_the_keys_and_values_of_a_prompt_is_that_prompt():
  m = made("prompt")
  net = nnx.merge(m.graphdef, m.params)
  cache = net.begun(new_cache(BODY, 1, COUNT, stacked=True, chunk=COUNT), jnp.array([0]))
  prefix: dict = {"decoder": {"layers": {}}}
  for i, layer in enumerate(cache):
    # Rings of windows hold what is still seen, in slots of their own.
    order = jnp.argsort(layer.own.pos[0, 0])
    assert layer.own.pos[0, 0, order].tolist() == list(range(COUNT))
    k, v = (a[:, 0, :, order].transpose(1, 0, 2, 3) for a in (layer.own.k, layer.own.v))
    prefix["decoder"]["layers"][i] = {"attn": {KEY: {"prefix_k": k, "prefix_v": v}}}
  other = Model(BODY, together(init_params(BODY, jax.random.key(0)), prefix))
  tokens = np.array([PROMPTS[1]])
  np.testing.assert_allclose(other(tokens), m(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_leaves_no_room_or_cannot_be_shown_is_refused():
  m = made("prompt")
  with pytest.raises(InputError, match="has 55 positions beside 9 virtual tokens"):
    generate(m, [[1] * 50], max_new_tokens=6)
  assert len(generate(m, [[1] * 50], max_new_tokens=5)[0].tokens) == 5
  with pytest.raises(InputError, match="the 55 that the model has for a text"):
    m(np.ones((1, 56), int))
  with pytest.raises(InputError, match="draw those of its base"):
    attention_maps(m, PROMPTS[0])
  with pytest.raises(InputError, match="segments must be known"):
    jax.jit(lambda s: m.apply(m.params, np.ones((1, 4), int), segments=s))(np.ones((1, 4), int))
