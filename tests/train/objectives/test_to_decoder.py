"""Batches of objectives that write: whole, the same for everyone, and exact losses of each pair."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer
from tests.train.objectives.pieces import KINDS, config, corpus_of, make, objective_of, segment
from train.config import ObjectiveConfig, OptimizerConfig
from train.data.pipeline import load_data
from train.loop import train
from train.objectives import make_objective
from train.objectives.loss import inputs_of
from train.objectives.objective import empty_batch, place

QUICK = OptimizerConfig(warmup_steps=1)


@pytest.fixture
def texts(tmp_path) -> Path:
  """Files of sentences, some of them longer than several rows."""
  rng = np.random.default_rng(0)
  for i in range(40):
    size = 400 if i % 9 == 0 else int(rng.integers(1, 90))
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 8)))) for _ in range(size)]
    (tmp_path / f"{i:02}.txt").write_text(" ".join(words)[:size].strip() + ". ")
  return tmp_path


def _config(texts: Path, name: str, shape: str, **settings):
  where = dict(source=str(texts / "*.txt"), validation_fraction=0.2, cache_dir=str(texts / "cache"))
  return config(name, shape, **(where | settings))


def _equal(a, b) -> bool:
  return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("name, shape", KINDS)
def test_batches_depend_on_seed_and_step_alone(texts, name, shape):
  one = _config(texts, name, shape, batch_size=8, seed=1)
  data, again = load_data(one), load_data(one)
  hosts = [load_data(one, rows=np.arange(4 * i, 4 * i + 4)) for i in range(2)]
  for step in (0, 3, 40):
    batch = data.batch(step)
    assert _equal(batch, again.batch(step))
    parts = [host.batch(step) for host in hosts]
    assert _equal({k: np.concatenate([p[k] for p in parts]) for k in batch}, batch)
  assert not _equal(data.batch(0), data.batch(1))
  assert not _equal(data.batch(0), load_data(dataclasses.replace(one, seed=2)).batch(0))
  first = [b["tokens"] for b in data.validation_batches()]
  assert all(
    (x == b["tokens"]).all() for x, b in zip(first, data.validation_batches(), strict=True)
  )


@pytest.mark.parametrize("name, shape", KINDS)
def test_each_piece_has_one_beginning_and_one_end(texts, name, shape):
  """Those of the document's own template are gone where the objective puts its own."""
  data = load_data(_config(texts, name, shape, batch_size=1))
  for step in range(data.rows_per_epoch):
    row = {k: v[0] for k, v in data.batch(step).items()}
    for number in range(1, int(row["segments"].max()) + 1):
      piece = segment(row, number)
      if name == "prefix_lm" and shape == "decoder":
        assert np.isin(piece["tokens"][1:], [257, 258]).sum() == 0
        continue
      written = piece["decoder_targets"] if shape == "encoder_decoder" else piece["targets"]
      assert (written == 258).nonzero()[0].tolist() == [len(written) - 1]
      assert (piece["tokens"] == 257).nonzero()[0].tolist() == [0]
      assert (piece["tokens"] == 258).sum() == (shape == "encoder_decoder")


@pytest.mark.parametrize("name, shape", KINDS)
def test_another_epoch_has_other_noise_on_the_same_text(name, shape):
  objective, _ = objective_of(config(name, shape, 100, 100))
  corpus = corpus_of([np.arange(n) % 256 for n in (47, 60, 39, 55)])  # Of more spans than one.
  epochs = [sorted(_key(p) for p in make(objective, corpus, 1, epoch)) for epoch in (0, 0, 1)]
  assert epochs[0] == epochs[1]
  fixed = name == "prefix_lm" and shape == "encoder_decoder"  # Its room depends on the division.
  assert (epochs[0] == epochs[2]) == fixed
  assert [k[:3] for k in epochs[0]] == [k[:3] for k in epochs[2]]


def _key(piece) -> tuple:
  fields = "tokens", "decoder_targets", "weights"
  return (piece.document, piece.begin, piece.length,
          *(piece.arrays[k].tolist() for k in fields if k in piece.arrays))  # fmt: skip


def _prepared(name: str, shape: str):
  """(objective, network, batch of packed rows, batch with each of their pieces in its own row)."""
  one = config(name, shape, 64, 40)
  objective, tokenizer = objective_of(one)
  model = dataclasses.replace(one.model, vocab_size=tokenizer.vocab_size, decoder_start_id=256)
  objective = make_objective(dataclasses.replace(one, model=model), tokenizer)
  net = objective.build(model, nnx.Rngs(0))
  rng = np.random.default_rng(0)
  corpus = corpus_of([rng.integers(0, 256, n) for n in (20, 9, 14, 8, 11)])
  pieces = [p.arrays for p in make(objective, corpus, seed=0)]
  sides = [""] if shape == "decoder" else ["", "decoder_"]
  examples = [
    {s: {f: p[s + f] for f in objective.sides[s].fields} for s in sides} for p in pieces
  ]  # fmt: skip
  packed, separate = empty_batch(objective.sides, 2), empty_batch(objective.sides, 5)
  place(packed, objective.sides, [0, 0, 1, 1, 1][: len(examples)], _fitting(examples))
  place(separate, objective.sides, range(5), _fitting(examples))
  return objective, net, packed, separate


def _fitting(examples: list) -> list:
  """Long ones with short ones, so that a row holds two or three."""
  order = sorted(examples, key=lambda e: len(e[""]["tokens"]))
  return [order[i] for i in (4, 0, 1, 2, 3)]


QUICKEST = (KINDS[0], KINDS[5])  # The others are slow where each kind compiles programs of its own.
SLOW = [pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICKEST]


@pytest.mark.parametrize("name, shape", [*QUICKEST, *SLOW])
def test_packed_equals_separate_loss_and_gradient(name, shape):
  objective, net, packed, separate = _prepared(name, shape)
  graphdef, params = nnx.split(net, nnx.Param)

  def total(params, batch):
    loss = objective.loss(nnx.merge(graphdef, params), batch, None)
    return loss.terms["loss"] / objective.weights(batch)["loss"], loss

  results = [
    jax.jit(jax.value_and_grad(total, has_aux=True))(params, b) for b in (packed, separate)
  ]
  ((one, loss), grads), ((other, alone), same) = results
  np.testing.assert_allclose(one, other, rtol=1e-5)
  np.testing.assert_allclose(loss.means["loss"][1], alone.means["loss"][1])
  for name in loss.pairs:
    np.testing.assert_allclose(loss.pairs[name], alone.pairs[name])
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=1e-4)


def test_prefix_pairs_are_those_that_the_mask_shows():
  from model.mask import attention_mask
  from train.objectives.loss import work

  for window, pattern in ((None, ("global",)), (5, ("local",))):
    _, net, packed, _ = _prepared("ul2", "decoder")
    cfg = dataclasses.replace(net.cfg, window=window, layer_pattern=pattern)
    side = inputs_of(packed)
    seen = attention_mask(
      *(side.pos,) * 2, *(side.seg,) * 2, causal=True, window=window,
      bidirectional=side.bidirectional,
    )  # fmt: skip
    pairs = work(cfg, side, head=0)["pairs"]
    assert float(pairs[f"decoder.{window}"]) == float(seen.sum())


@pytest.mark.parametrize("changed", ["", "decoder_"])
def test_a_pair_sees_nothing_of_the_others_in_its_row(changed):
  _, net, packed, _ = _prepared("span_corruption", "encoder_decoder")
  graphdef, params = nnx.split(net, nnx.Param)

  @jax.jit
  def logits(batch):
    net = nnx.merge(graphdef, params)
    x, _, _ = net.hidden(inputs_of(batch, "decoder_"), source=inputs_of(batch))
    return net.logits(x)

  second = packed[f"{changed}segments"] == 2
  tokens = np.where(second, (packed[f"{changed}tokens"] + 7) % 256, packed[f"{changed}tokens"])
  before, after = logits(packed), logits(packed | {f"{changed}tokens": tokens})
  written = packed["decoder_segments"]
  assert (before == after)[(written == 1) | (written == 3)].all()
  vocabulary = net.cfg.vocab_size
  assert (before != after)[written == 2][:, :vocabulary].any(-1).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", KINDS[2:5])
def test_a_run_trains_to_its_end_and_shows_what_it_says(texts, name, shape, tmp_path, capsys):
  one = _config(texts, name, shape, steps=2, batch_size=8, eval_batches=1, optimizer=QUICK)
  assert train(one, tmp_path / "run") == 0
  out = capsys.readouterr().out
  assert out.startswith("sample: ") and (" -> " in out) == (shape == "encoder_decoder")


def _bare_bpe() -> Tokenizer:
  return build_tokenizer("bpe", 400, ["some text to build a vocabulary of"] * 9)


def _wrong(one, tokenizer: Tokenizer | None = None) -> str:
  with pytest.raises(InputError) as caught:
    if tokenizer is None:
      objective_of(one)
    else:
      make_objective(one, tokenizer)
  return str(caught.value)


def test_wrong_input_is_one_named_error():
  both = "encoder_decoder"
  assert "has none: use T5's, add" in _wrong(config("span_corruption", both), _bare_bpe())
  assert "needs a mask token" in _wrong(config("denoising", both), _bare_bpe())
  assert "mode R and the tokenizer has none" in _wrong(config("ul2", both), _bare_bpe())
  sentinels = build_tokenizer("bytes", None, (), ("<extra_id_1>", "<extra_id_0>"))
  many = _wrong(config("span_corruption", both), sentinels)
  assert "spans and the tokenizer 2 sentinels: shorten seq_len" in many
  assert "sentinels" in _wrong(config("span_corruption", both, 4096, 1024))
  for name in ("span_corruption", "denoising", "prefix_lm", "ul2"):
    assert "target_len=1 leave no room" in _wrong(config(name, both, 48, 1))
    assert "seq_len=2 and target_len=40 leave no room" in _wrong(config(name, both, 2, 40))
  char = build_tokenizer("char", None, ["abc"], ("<extra_id_0>",))
  assert "the tokenizer has none: name it as eos_token" in _wrong(
    config("span_corruption", both), char
  )
  for denoisers, words in {
    (): "denoisers is empty",
    ("R:3:0.15", "Q:3:0.15"): "'Q:3:0.15' is none. Write R:MEAN_SPAN:RATE",
    ("S:3:0.25",): "'S:3:0.25' is none",
    ("R:0.15",): "'R:0.15' is none",
    ("R:three:0.15",): "no number behind R",
    ("X:3:1.5",): "rate of 'X:3:1.5' must lie between 0 and 1",
    ("X:0.5:0.5",): "mean span of 'X:0.5:0.5' must be at least 1",
  }.items():
    with pytest.raises(InputError, match=words):
      ObjectiveConfig(name="ul2", denoisers=denoisers)
