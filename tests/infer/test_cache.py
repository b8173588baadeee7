"""How prompts are read and kept changes nothing: chunks, rings, prefixes; int8 changes little."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import infer
from infer import batch
from infer.batch import batches
from infer.reading import Reader, read_chunk
from infer.settings import Settings
from model.cache import new_cache, quantized
from model.transformer import Inputs
from tests.infer import tiny
from tests.infer.test_beam import on_request

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


@pytest.mark.parametrize("kind", on_request(list(KINDS), "ring", "longrope"))
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
