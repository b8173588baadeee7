"""Generation behind an encoder: equal to Transformers, to full passes, to itself in any batch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import infer
from infer.prompts import prefix
from model.cache import new_cache
from model.heads import abstract, unstack
from model.transformer import Inputs
from tests.infer import tiny
from tests.infer.copies import theirs_and_ours

NAMES = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
SHAPE = dict(shape="encoder_decoder", decoder_start_id=256, layer_pattern=("global",), window=None)
SAMPLED = dict(temperature=0.9, top_k=50, top_p=0.95, max_new_tokens=24)


@pytest.fixture(scope="module")
def m():
  return tiny.model(**SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_log_probabilities_equal_transformers(name):
  theirs, m = theirs_and_ours(name)
  import torch

  prompts = [np.random.default_rng(n).integers(5, 96, n).tolist() for n in (1, 7, 16, 30)]
  together = infer.generate(m, prompts, max_new_tokens=30)
  for prompt, got in zip(prompts, together, strict=True):
    want = theirs.generate(
      torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
      output_logits=True, return_dict_in_generate=True, use_cache=False,
    )  # fmt: skip
    new = want.sequences[:, 1:]
    logprobs = torch.stack(want.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])
    assert got.tokens == new[0].tolist()
    np.testing.assert_allclose(got.logprobs, logprobs[0, :, 0], atol=2e-4)
    assert infer.generate(m, prompt, max_new_tokens=30)[0].tokens == got.tokens
  assert len({token for c in together for token in c.tokens}) > 3


def test_a_prompt_gives_the_same_alone_streamed_and_in_any_batch(m):
  for settings in (dict(max_new_tokens=24), SAMPLED):
    together = infer.generate(m, [*tiny.PROMPTS, "long " * 12], **settings)
    alone = [infer.generate(m, p, **settings)[0] for p in (*tiny.PROMPTS, "long " * 12)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len({tuple(c.tokens) for c in together}) == 5  # The encoder is heard.
    assert "".join(infer.stream(m, tiny.PROMPTS[1], **settings)) == together[1].text


def test_greedy_decoding_equals_the_argmax_of_full_passes(m):
  got = infer.generate(m, tiny.PROMPTS[1], max_new_tokens=12, min_new_tokens=12)[0]
  source = m.tokenizer.encode(tiny.PROMPTS[1])
  logits = m([source], decoder_tokens=[[256, *got.tokens[:-1]]])[0].at[:, 258].set(-jnp.inf)
  assert got.tokens == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stacked", [pytest.param(True, marks=pytest.mark.slow), False])
def test_cached_cross_attention_equals_one_full_pass(name, stacked):
  _, m = theirs_and_ours(name)
  graphdef = nnx.split(abstract(m.config, stacked=stacked), nnx.Param)[0]
  params = m.params if stacked else unstack(m.config, m.params)
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 96)
  source = jax.random.randint(jax.random.key(1), (2, 7), 0, 96)
  read = Inputs(source, jnp.stack([jnp.arange(7), jnp.arange(7) - 2]).clip(-1))  # Padded left.
  pos = jnp.broadcast_to(jnp.arange(9), (2, 9))
  whole = lambda p: nnx.merge(graphdef, p).hidden(Inputs(tokens, pos), source=read)[0]
  want = jax.jit(whole)(params)

  @jax.jit
  def step(params, cache, tokens, pos):
    return nnx.merge(graphdef, params).hidden(Inputs(tokens, pos), cache=cache)[:2]

  empty, got = new_cache(m.config, 2, 9, stacked=stacked, source=7), []
  cache = jax.jit(lambda p: nnx.merge(graphdef, p).read(empty, read))(params)
  for chunk in (slice(0, 4), *(slice(t, t + 1) for t in range(4, 9))):
    x, cache = step(params, cache, tokens[:, chunk], pos[:, chunk])
    got.append(x)
  np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-4)


def test_the_encoder_reads_closing_tokens_and_an_end_token_ends(m):
  ids = m.tokenizer.encode("abc")
  assert ids[-1] == m.tokenizer.eos_id
  for settings in (dict(max_new_tokens=9), SAMPLED):
    assert infer.generate(m, "abc", **settings) == infer.generate(m, ids, **settings)
  token = infer.generate(m, "abc", max_new_tokens=9)[0].tokens[4]
  stopped = infer.generate(m, "abc", max_new_tokens=9, stop=[token])[0]
  assert stopped.tokens[-1] == token and stopped.finish_reason == "stop"


@pytest.mark.slow
def test_positions_limit_what_is_read_and_what_is_written_each_by_itself(m):
  limit = m.config.max_positions
  full = infer.generate(m, [5] * limit, max_new_tokens=limit - 1, min_new_tokens=limit - 1)[0]
  assert len(full.tokens) == limit - 1
  with pytest.raises(ValueError, match=f"prompt 1 has {limit + 1} tokens"):
    infer.generate(m, [[5], [5] * (limit + 1)])
  with pytest.raises(ValueError, match=f"{limit} new tokens are asked for"):
    infer.generate(m, "abc", max_new_tokens=limit)
  free = tiny.model(**SHAPE, positions="t5_bias", max_positions=None)
  assert (
    len(infer.generate(free, [5] * 200, max_new_tokens=150, min_new_tokens=150)[0].tokens) == 150
  )


def test_a_decoder_without_a_token_that_starts_it_is_named(m):
  bare = dataclasses.replace(m.config, decoder_start_id=None)
  padded = dataclasses.replace(m, config=bare)  # The tokenizer's padding starts it.
  assert prefix(padded, [5, 6]) == prefix(m, [5, 6]) == [256]
  with pytest.raises(ValueError, match=r"set model\.decoder_start_id"):
    infer.generate(dataclasses.replace(padded, tokenizer=None), [[5]])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(shape="encoder"), "(encoder, head 'masked_lm') cannot generate: use --task=fill-mask"),
    (dict(head="sequence", num_labels=3), "use --task=classify (infer.classify)"),
    (dict(head="embedding"), "use --task=embed (m.embed)"),
  ],
)
def test_a_model_that_cannot_generate_says_what_it_can(changes, said):
  for call in (infer.generate, infer.stream):
    with pytest.raises(ValueError, match=re.escape(said)):
      call(tiny.model(**changes), "abc")
