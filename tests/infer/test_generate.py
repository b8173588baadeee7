"""Generation: equal to full passes, to Transformers, and to itself however it is batched."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

import infer
import model
from infer.decode import decode, start
from infer.reading import read_chunk
from model.heads import abstract
from model.layers import param_info
from model.sharding import make_mesh, shardings
from model.transformer import Inputs
from model.vocabulary import build_tokenizer
from tests.infer import tiny
from train.certify.cases import CASES
from train.certify.theirs import Theirs

SAMPLED = dict(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module")
def m():
  return tiny.model()


def test_greedy_decoding_equals_the_argmax_of_full_passes(m):
  prompt = m.tokenizer.encode_prompt(tiny.PROMPTS[1])
  got = infer.generate(m, prompt, max_new_tokens=24, min_new_tokens=24, logprobs=3)[0]
  whole = np.array(prompt + got.tokens)
  padded = np.zeros((1, m.config.max_positions), np.int32)
  padded[0, : len(whole)] = whole
  logits = m(padded)[0, len(prompt) - 1 : len(whole) - 1].at[:, m.tokenizer.eos_id].add(-1e9)
  np.testing.assert_array_equal(got.tokens, logits.argmax(-1))
  own = np.asarray(jax.nn.log_softmax(m(padded)[0, len(prompt) - 1 : len(whole) - 1]))
  np.testing.assert_allclose(got.logprobs, own[np.arange(24), got.tokens], atol=1e-4)
  for place, row in zip(got.top_logprobs, own, strict=True):
    assert [t for t, _ in place] == np.argsort(-row)[:3].tolist()
    np.testing.assert_allclose([p for _, p in place], np.sort(row)[::-1][:3], atol=1e-4)


@pytest.mark.parametrize("positions", [pytest.param("rotary", marks=pytest.mark.slow), "t5_bias"])
def test_a_prefix_lm_reads_its_prompt_as_it_was_trained_to(positions):
  m = tiny.model(prefix_attention=True, positions=positions)
  prompts = [m.tokenizer.encode_prompt(p) for p in tiny.PROMPTS]
  got = infer.generate(m, prompts, max_new_tokens=8, min_new_tokens=8)

  @jax.jit
  def full(tokens, pos, marked):
    net = nnx.merge(m.graphdef, m.params)
    return net.logits(net.hidden(Inputs(tokens, pos, bidirectional=marked))[0])

  for prompt, one in zip(prompts, got, strict=True):
    whole = np.zeros((1, 40), np.int32)
    whole[0, : len(prompt) + 8] = [*prompt, *one.tokens]
    index = np.arange(40)[None]
    pos = np.where(index < len(prompt) + 8, index, -1)
    logits = full(whole, pos, index < len(prompt))[0, len(prompt) - 1 : len(prompt) + 7]
    ends = np.arange(logits.shape[-1]) == m.tokenizer.eos_id
    assert np.where(ends, -np.inf, logits).argmax(-1).tolist() == one.tokens
    causal = np.asarray(full(whole, pos, index < 0))[0, len(prompt) - 1 : len(prompt) + 7]
    assert len(prompt) < 4 or np.abs(causal - logits)[:, :200].max() > 1e-3


@pytest.mark.parametrize("settings", [dict(), SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_gives_the_same_alone_and_at_any_place_of_a_batch(m, settings):
  settings = dict(settings, max_new_tokens=20, seed=7)
  alone = [infer.generate(m, p, **settings)[0].tokens for p in tiny.PROMPTS]
  batch = infer.generate(m, tiny.PROMPTS, **settings)
  assert [c.tokens for c in batch] == alone
  turned = infer.generate(m, tiny.PROMPTS[::-1], **settings)
  assert [c.tokens for c in turned[::-1]] == alone
  some = infer.generate(m, tiny.PROMPTS[1:], **settings)  # One row fills the batch.
  assert [c.tokens for c in some] == alone[1:]
  ids = [m.tokenizer.encode_prompt(p) for p in tiny.PROMPTS]
  assert [c.tokens for c in infer.generate(m, ids, **settings)] == alone


def test_results_do_not_depend_on_how_much_room_there_is(m):
  few = infer.generate(m, tiny.PROMPTS[0], max_new_tokens=9, **SAMPLED)[0]
  many = infer.generate(m, tiny.PROMPTS[0], max_new_tokens=80, **SAMPLED)[0]
  assert few.tokens == many.tokens[:9]
  assert few.finish_reason == "length"


def test_seeds_of_one_call_are_those_of_single_calls_and_differ(m):
  seeds = [3, 4, 2**40]
  each = [infer.generate(m, "Hi", seed=s, max_new_tokens=16, **SAMPLED)[0].tokens for s in seeds]
  both = infer.generate(m, ["Hi"] * 3, seed=seeds, max_new_tokens=16, **SAMPLED)
  assert [c.tokens for c in both] == each
  assert len({tuple(t) for t in each}) == 3


def test_new_values_of_settings_and_lengths_compile_nothing(m):
  infer.generate(m, "warm", max_new_tokens=20)
  sizes = [f._cache_size() for f in (read_chunk, start, decode.jitted())]
  for i, prompt in enumerate(("a", "other words", "!" * 12)):
    settings = dict(temperature=0.5 * i, top_k=i + 3, top_p=0.9, min_p=0.1 * i, seed=i)
    infer.generate(m, prompt, max_new_tokens=17 + i, min_new_tokens=i, stop=[5, "q"], **settings)
    "".join(infer.stream(m, prompt, max_new_tokens=18, **settings))
  assert [f._cache_size() for f in (read_chunk, start, decode.jitted())] == sizes


def test_each_setting_changes_the_outcome(m):
  base = dict(max_new_tokens=16, temperature=2.0)
  tokens = lambda **s: infer.generate(m, "Hi", **base | s)[0].tokens
  plain = tokens()
  for changed in (dict(seed=1), dict(temperature=0), dict(top_k=2), dict(top_p=0.2),
                  dict(min_p=0.9), dict(max_new_tokens=3), dict(stop=[plain[4]])):  # fmt: skip
    assert tokens(**changed) != plain, changed
  assert tokens(temperature=0) == tokens(top_k=1) == tokens(min_p=1.0) == tokens(top_p=1e-9)


def test_end_and_stop_tokens_end_a_sequence_and_are_its_last_token(m):
  free = infer.generate(m, "Hi", max_new_tokens=12)[0]
  at = next(i for i in range(3, 12) if free.tokens[i] not in free.tokens[:i])
  stopped = infer.generate(m, "Hi", max_new_tokens=12, stop=free.tokens[at])[0]
  assert stopped.tokens == free.tokens[: at + 1] and stopped.finish_reason == "stop"
  assert stopped.text == m.tokenizer.decode(free.tokens[:at])
  assert len(stopped.logprobs) == len(stopped.tokens)
  later = infer.generate(m, "Hi", max_new_tokens=12, min_new_tokens=12, stop=free.tokens[at])[0]
  assert len(later.tokens) == 12 and free.tokens[at] not in later.tokens


def test_stop_strings_end_each_row_where_its_own_text_has_them(m):
  free = infer.generate(m, tiny.PROMPTS, max_new_tokens=40, **SAMPLED)
  cuts = [c.text[len(c.text) // 2 :][:2] for c in free]
  got = infer.generate(m, tiny.PROMPTS, max_new_tokens=40, stop=cuts, **SAMPLED)
  for c, whole in zip(got, free, strict=True):
    ends = [whole.text.find(s) + len(s) for s in cuts if s in whole.text]
    first = min(ends)
    want = min(whole.text.find(s) for s in cuts if whole.text.find(s) + len(s) == first)
    assert c.text == whole.text[:want] and c.finish_reason == "stop"
    assert c.tokens == whole.tokens[: len(c.tokens)]
    assert c.logprobs == pytest.approx(whole.logprobs[: len(c.tokens)], abs=1e-5)
    assert c.text.startswith(m.tokenizer.decode(c.tokens).rstrip("\ufffd"))


@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_join_to_the_text_of_generate(m, seed):
  for stop in ((), ("e", "00")):
    settings = dict(max_new_tokens=50, stop=stop, seed=seed, **SAMPLED)
    whole = infer.generate(m, tiny.PROMPTS[1], **settings)[0].text
    pieces = list(infer.stream(m, tiny.PROMPTS[1], **settings))
    assert "".join(pieces) == whole
    assert all(pieces)
  for settings in (dict(echo=True), dict(logprobs=1), dict(penalty_alpha=1, top_k=2)):
    with pytest.raises(ValueError, match="cannot be streamed"):
      infer.stream(m, "a", **settings)
  assert "".join(infer.stream(m, "a", best_of=1)) == infer.generate(m, "a")[0].text


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_greedy_tokens_and_log_probabilities_equal_transformers(name, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  Theirs(CASES[name]).save(tmp_path)
  kind = getattr(transformers, CASES[name][0])
  theirs = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
  m = dataclasses.replace(model.load(tmp_path), end_ids=())
  prompts = np.random.default_rng(1).integers(1, 96, (2, 13))
  want = theirs.generate(
    torch.tensor(prompts), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
    output_logits=True, return_dict_in_generate=True,
  )  # fmt: skip
  new = want.sequences[:, 13:]
  logprobs = torch.stack(want.logits, dim=1).log_softmax(-1)
  logprobs = logprobs.gather(-1, new[..., None])[..., 0].numpy()
  for got, tokens, values in zip(
    infer.generate(m, prompts, max_new_tokens=30), new.tolist(), logprobs, strict=True
  ):
    assert got.tokens == tokens
    np.testing.assert_allclose(got.logprobs, values, atol=1e-4)


def test_a_model_spread_over_devices_gives_what_one_device_gives(m):
  mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=None)
  axes = jax.tree.map(lambda i: i.axes, param_info(abstract(m.config)))
  spread = dataclasses.replace(m, params=jax.device_put(m.params, shardings(m.params, axes, mesh)))
  settings = dict(max_new_tokens=16, **SAMPLED)
  want, got = (infer.generate(x, tiny.PROMPTS, **settings) for x in (m, spread))
  assert [c.tokens for c in got] == [c.tokens for c in want]


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (dict(temperature=-1), "temperature=-1"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature="hot"), "temperature='hot'"),
    (dict(top_k=0), "top_k=0"),
    (dict(top_k=2.5), "top_k=2.5"),
    (dict(top_p=0), "top_p=0"),
    (dict(top_p=1.1), "top_p=1.1"),
    (dict(min_p=1.5), "min_p=1.5"),
    (dict(min_p=-0.1), "min_p=-0.1"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=True), "max_new_tokens=True"),
    (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens=9 exceeds max_new_tokens=8"),
    (dict(seed=-1), "seed=-1"),
    (dict(seed=[1, 2]), "2 values for 1 prompts"),
    (dict(stop=""), "stop=''"),
    (dict(stop=[260]), "token 260"),
    (dict(stop=2.5), "stop=2.5"),
    (dict(logprobs=0), "logprobs=0"),
    (dict(logprobs=261), "logprobs=261"),
    (dict(top_q=0.5), "unknown setting 'top_q' of generate. Did you mean 'top_p'"),
    (dict(max_new_tokens=94), "together 98, and the model has 96 positions"),
  ],
)
def test_impossible_settings_are_named(m, settings, said):
  for call in (infer.generate, infer.stream):
    with pytest.raises(ValueError, match=re.escape(said)):
      call(m, "abc", **settings)


@pytest.mark.parametrize(
  ("prompts", "said"),
  [
    ([], "prompts is empty"),
    (3, "prompts=3"),
    ([[1, 300]], "token 300 is not in the vocabulary of ids 0 to 259"),
    ([[1, -1]], "token -1"),
    (["a", 2.5], "prompt 1"),
    ([["a"]], "prompt 0"),
  ],
)
def test_impossible_prompts_are_named(m, prompts, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    infer.generate(m, prompts)


def test_an_empty_prompt_needs_a_token_that_begins_a_text(m):
  settings = dict(max_new_tokens=4)
  began = infer.generate(m, [m.tokenizer.bos_id], **settings)
  assert infer.generate(m, "", **settings) == infer.generate(m, [[]], **settings) == began
  bare = dataclasses.replace(m, tokenizer=build_tokenizer("char", None, ["abc"]))
  for empty in ("", [[]]):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
      infer.generate(bare, empty)


def test_a_model_without_a_tokenizer_continues_token_ids(m):
  bare = dataclasses.replace(m, tokenizer=None)
  got = infer.generate(bare, [[1, 2, 3]], max_new_tokens=5)[0]
  assert len(got.tokens) == 5 and got.text == ""
  for prompts, settings in (("a", {}), ([[1]], {"stop": "a"})):
    with pytest.raises(ValueError, match="tokenizer"):
      infer.generate(bare, prompts, **settings)


def test_without_a_number_a_text_ends_where_the_model_has_no_positions_left(m):
  limit = m.config.max_positions
  ids = [5] * (limit - 9)
  short, full = infer.generate(m, [[5, 6, 7], ids], min_new_tokens=3)
  assert len(full.tokens) <= 9 and full.tokens == infer.generate(m, ids, min_new_tokens=3)[0].tokens
  assert short.tokens == infer.generate(m, [5, 6, 7], min_new_tokens=3)[0].tokens
  assert infer.generate(m, ids, prefix=[5] * 9)[0].tokens == [5] * 9
  for settings in (dict(max_new_tokens=10), dict(prefix=[5] * 10)):
    with pytest.raises(ValueError, match="10 new ones are asked for"):
      infer.generate(m, ids, **settings)
