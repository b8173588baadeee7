"""Perplexity: each token scored once, with what its window holds before it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from infer.evaluate import Perplexity, perplexity, rise
from model.errors import InputError
from tests.commands import run
from tests.infer import tiny
from train.config import Config, DataConfig, OptimizerConfig, PeftConfig
from train.loop import train

TEXT = "Some text with é, some words and\n\nseveral lines; as long as two windows or three." * 2


def by_hand(m, ids, first, window, stride):
  """Nats of each token from the window that scores it, one after the other."""
  nats, start, scored = [], 0, first
  while scored < len(ids):
    stop = min(start + window, len(ids))
    scores = jax.nn.log_softmax(m(jnp.asarray([ids[start:stop]]))[0])
    nats += [-float(scores[t - 1 - start, ids[t]]) for t in range(scored, stop)]
    scored, start = max(scored, stop), start + stride
  return nats


@pytest.mark.parametrize(("window", "stride"), [(None, None), (20, 19), (20, 7), (96, 50), (5, 1)])
def test_each_token_is_scored_once_with_what_its_window_holds_before_it(window, stride):
  m = tiny.model()
  text = TEXT if stride is None or stride > 1 else TEXT[:60]
  found = perplexity(m, text, window=window, stride=stride)
  ids = m.tokenizer.encode(text, add_special_tokens=False)
  before = m.tokenizer.affixes[0]
  first = max(1, len(before))
  nats = by_hand(m, [*before, *ids], first, window or 96, stride or 95)
  assert found.tokens == len(nats) == len(before) + len(ids) - first
  np.testing.assert_allclose(found.nats, sum(nats), rtol=1e-5)
  np.testing.assert_allclose(found.perplexity, math.exp(sum(nats) / len(nats)), rtol=1e-5)
  size = len(text.encode())
  np.testing.assert_allclose(found.bits_per_byte, sum(nats) / size / math.log(2), rtol=1e-5)
  np.testing.assert_allclose(found.word_perplexity, found.byte_perplexity ** (size / found.words))


def test_a_sample_of_windows_is_evenly_spaced_and_counts_what_they_score():
  m = tiny.model()
  whole = perplexity(m, TEXT, window=20, stride=7)
  assert not whole.sampled and sum(n for n, _ in whole.windows) == whole.tokens
  number = len(whole.windows)
  some = perplexity(m, TEXT, window=20, stride=7, windows=4)
  places = [0, round((number - 1) / 3), round(2 * (number - 1) / 3), number - 1]
  assert number > 12 and some.sampled
  assert [n for n, _ in some.windows] == [whole.windows[i][0] for i in places]
  nats = [whole.windows[i][1] for i in places]
  np.testing.assert_allclose([n for _, n in some.windows], nats, rtol=1e-5)
  np.testing.assert_allclose(some.perplexity, math.exp(sum(nats) / some.tokens), rtol=1e-5)
  # By word and byte it stands for the whole text.
  per_byte = whole.tokens / whole.bytes * sum(nats) / some.tokens
  np.testing.assert_allclose(some.byte_perplexity, math.exp(per_byte), rtol=1e-5)
  assert (some.words, some.bytes) == (whole.words, whole.bytes)
  assert "of them 4, evenly spaced, are read" in some.protocol()
  every = perplexity(m, TEXT, window=20, stride=7, windows=number)
  assert every == whole


def test_a_rise_is_told_with_the_standard_error_of_its_windows():
  rng = np.random.default_rng(0)
  plain, more = rng.normal(1200, 200, 40), rng.normal(4, 2, 40)

  def measured(nats, tokens):
    mean = nats.sum() / sum(tokens)
    windows = tuple(zip(tokens, nats, strict=True))
    return Perplexity(math.exp(min(mean, 700)), 1, 1, 1, nats.sum(), sum(tokens), 1, 1, 401, 400,
                      False, windows, True)  # fmt: skip

  found, base = measured(plain + more, [400] * 40), measured(plain, [400] * 40)
  percent, error = rise(found, base)
  assert percent == pytest.approx(100 * (found.perplexity / base.perplexity - 1))
  # Nats of one window have far more variance than what is told of each beside itself.
  want = np.std(more / 400, ddof=1) / math.sqrt(40)
  assert error == pytest.approx(found.perplexity / base.perplexity * 100 * want)
  assert rise(measured(plain[:1], [400]), measured(plain[:1], [400])) == (0, None)
  huge = measured(plain[:1] * 0 + 1e6, [400])
  assert rise(huge, measured(plain[:1], [400])) == (math.inf, None)
  with pytest.raises(ValueError, match="same windows"):
    rise(found, measured(plain, [300] + [400] * 39))


@pytest.mark.parametrize(
  ("changes", "settings", "text", "said"),
  [
    ({}, dict(window=97), TEXT, "window=97 must be between 2 and the model's 96 positions"),
    ({}, dict(window=20, stride=20), TEXT, "stride=20 must be between 1 and 19"),
    ({}, dict(stride=0), TEXT, "stride=0"),
    ({}, dict(windows=0), TEXT, "windows=0 must be between 1 and the 2 windows"),
    ({}, dict(windows=3), TEXT, "windows=3 must be between 1 and the 2 windows"),
    ({}, {}, "", "no token that could be scored"),
    (dict(shape="encoder", layer_pattern=("global",), window=None), {}, TEXT, "needs a decoder"),
  ],
)
def test_what_cannot_be_measured_is_said(changes, settings, text, said):
  with pytest.raises(InputError, match=said):
    perplexity(tiny.model(**changes), text, **settings)


def test_the_command_says_the_numbers_and_the_protocol(tmp_path):
  m = tiny.model()
  model.save(m, tmp_path / "gpt")
  (tmp_path / "text.txt").write_text(TEXT)
  command = [f"--checkpoint={tmp_path / 'gpt'}", "--task=perplexity", "--stride=48",
             f"--data={tmp_path / 'text.txt'}", f"--cache_dir={tmp_path}"]  # fmt: skip
  done = run("infer.evaluate", *command, "--json")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert told["perplexity"] == perplexity(m, TEXT, stride=48).perplexity
  assert "windows of 96 tokens, each begins 48 tokens behind" in told["protocol"]
  unparted = TEXT.replace(" ", "").replace("\n", "")  # A word of more nats than exp can take.
  (tmp_path / "text.txt").write_text(unparted)
  done = run("infer.evaluate", *command, "--json")
  told, found = json.loads(done.stdout), perplexity(m, unparted, stride=48)
  assert told["word_perplexity"] is None and found.word_perplexity == math.inf
  assert told["perplexity"] == found.perplexity
  wrong = run("infer.evaluate", *command[:2], f"--data={tmp_path}")
  assert wrong.returncode == 2
  assert wrong.stderr.splitlines()[-1].startswith(f"error: --data={str(tmp_path)!r} is no text")


@pytest.mark.slow
def test_an_adapter_is_measured_beside_its_float_base_whatever_its_run_kept(tmp_path):
  (tmp_path / "text.txt").write_text(TEXT)
  m = tiny.model(d_model=64, d_ff=128, window=None, layer_pattern=("global",))
  model.save(m, tmp_path / "base")
  config = Config(
    steps=1, batch_size=8, seq_len=16, checkpoint_every=1, init_from=str(tmp_path / "base"),
    cache_dir=str(tmp_path / "cache"), data=DataConfig(source=str(tmp_path / "text.txt")),
    peft=PeftConfig(method="lora", rank=2, base_format="int4"),
    optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.03),
  )  # fmt: skip
  assert train(config, tmp_path / "run") == 0
  plain = model.load(tmp_path / "base", adapter=tmp_path / "run")
  kept = model.load(tmp_path / "base", adapter=tmp_path / "run", quantize="int4")
  settings = ["--task=perplexity", f"--data={tmp_path / 'text.txt'}", f"--cache_dir={tmp_path}",
              "--quantize=int4", "--beside_float", "--json"]  # fmt: skip
  alone, base, run_ = "--checkpoint={}", tmp_path / "base", tmp_path / "run"
  for given in ([alone.format(run_)], [alone.format(base), f"--adapter={run_}"]):
    done = run("infer.evaluate", *given, *settings)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["perplexity"] == pytest.approx(perplexity(kept, TEXT).perplexity, rel=1e-4)
    assert told["float_perplexity"] == pytest.approx(perplexity(plain, TEXT).perplexity, rel=1e-5)
    assert abs(told["rise_percent"]) > 1e-3


@pytest.mark.slow
def test_the_command_says_what_fewer_bits_cost_beside_the_stored_model(tmp_path):
  m = tiny.model(d_model=64, d_ff=128)
  model.save(m, tmp_path / "gpt")
  (tmp_path / "text.txt").write_text(TEXT)
  command = [f"--checkpoint={tmp_path / 'gpt'}", "--task=perplexity", "--window=20",
             f"--data={tmp_path / 'text.txt'}", f"--cache_dir={tmp_path}", "--windows=5",
             "--beside_float"]  # fmt: skip
  done = run("infer.evaluate", *command, "--quantize=int4", "--json")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  settings = dict(window=20, windows=5)
  plain, kept = perplexity(m, TEXT, **settings), model.load(tmp_path / "gpt", quantize="int4")
  percent, error = rise(perplexity(kept, TEXT, **settings), plain)
  assert told["float_perplexity"] == pytest.approx(plain.perplexity, rel=1e-5)
  assert told["rise_percent"] == pytest.approx(percent, abs=1e-2) and percent != 0
  assert told["rise_error_percent"] == pytest.approx(error, abs=1e-2) and len(told["windows"]) == 5
  said = run("infer.evaluate", *command, "--quantize=int4").stdout
  assert f"quantized {told['rise_percent']:+.2f} % ± {told['rise_error_percent']:.2f}" in said
  wrong = run("infer.evaluate", *command)
  assert wrong.returncode == 2
  assert wrong.stderr.splitlines()[-1].startswith("error: --beside_float compares")
