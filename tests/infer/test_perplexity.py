"""Perplexity: each token scored once, with what its window holds before it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from infer.evaluate import perplexity
from model.errors import InputError
from tests.commands import run
from tests.infer import tiny

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


@pytest.mark.parametrize(
  ("changes", "settings", "text", "said"),
  [
    ({}, dict(window=97), TEXT, "window=97 must be between 2 and the model's 96 positions"),
    ({}, dict(window=20, stride=20), TEXT, "stride=20 must be between 1 and 19"),
    ({}, dict(stride=0), TEXT, "stride=0"),
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
  wrong = run("infer.evaluate", *command[:2], f"--data={tmp_path}")
  assert wrong.returncode == 2
  assert wrong.stderr.splitlines()[-1].startswith(f"error: --data={str(tmp_path)!r} is no text")
