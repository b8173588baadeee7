"""Masked language models: the loss is that of the masked tokens, however rows are made up."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model.config import ModelConfig
from model.errors import InputError
from model.layers import param_info
from model.vocabulary import build_tokenizer
from tests.train.objectives.rows import corpus_of, filled, rebuilt, separate
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig
from train.data.pipeline import load_data
from train.inspect import describe
from train.objectives import make_objective
from train.objectives.loss import inputs_of
from train.optim import make_optimizer
from train.program import make_loss
from train.resolve import check_fit, resolved
from train.step import init_state, make_train_step

BYTES = build_tokenizer("bytes", None, ())
ENCODER = ModelConfig(
  shape="encoder", vocab_size=260, vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=2,
  max_positions=64, positions="learned", norm="layer", norm_placement="post", embed_norm=True,
  final_norm=False, activation="gelu", gated=False, token_types=2, head_dense=True, head_norm=True,
  logit_bias=True,
)  # fmt: skip
PAIRS = ["none", "next_sentence", "sentence_order"]


def config(pairs: str = "none", **changes) -> Config:
  model = dataclasses.replace(ENCODER, head="masked_lm", pair_head=pairs != "none")
  optimizer = OptimizerConfig(warmup_steps=1, learning_rate=0.01)
  objective = ObjectiveConfig(name="masked_lm", pairs=pairs)
  defaults = dict(batch_size=8, seq_len=48, model=model, objective=objective, optimizer=optimizer)
  return Config(**{**defaults, "data": DataConfig(max_texts=6), **changes})


def documents(seed: int, lengths) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, n) for n in lengths]


def packed(objective, rows: int = 4, seed: int = 0):
  """Rows of three documents each."""
  rng = np.random.default_rng(seed)
  texts = documents(seed, rng.integers(2, 12, 3 * rows))
  return filled(objective, corpus_of(texts), np.repeat(np.arange(rows), 3).tolist(), seed)


def gradient(cfg: Config, batch, seed: int = 0):
  """(terms, means, gradients of the sum of both terms' sums)."""
  objective = make_objective(cfg)
  net = objective.build(cfg.model, nnx.Rngs(seed))
  graphdef, state = nnx.split(net, nnx.Param)
  loss_fn = make_loss(graphdef, objective)

  def total(params, batch):
    loss = loss_fn(params, {}, batch, None)
    return sum(loss.terms.values()), loss

  step = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, loss), grads = step(nnx.to_pure_dict(state), batch)
  return loss.terms, loss.means, grads


def one_step(cfg: Config, objective, batch):
  """(metrics, parameters) after one step of plain gradient descent."""
  net = objective.build(cfg.model, nnx.Rngs(0))
  graphdef, state = nnx.split(net, nnx.Param)
  plain = OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, learning_rate=1.0,
                          clip_norm=None, weight_decay=0.0)  # fmt: skip
  tx = make_optimizer(plain, 10, param_info(net))
  step = make_train_step(
    make_loss(graphdef, objective), objective.weights, tx, optax.constant_schedule(1.0),
    seed=0, accumulation=cfg.accumulation, ema_decay=None, random=objective.samples,
  )  # fmt: skip
  before = init_state(nnx.to_pure_dict(state), {}, tx, ema=False)
  after, metrics = jax.jit(step)(before, batch)
  return {k: float(v) for k, v in metrics.items()}, after.params


def close(got, want, tolerance: float = 2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
  )


@pytest.mark.parametrize(
  "pairs", [PAIRS[0], *(pytest.param(pairs, marks=pytest.mark.slow) for pairs in PAIRS[1:])]
)
def test_packed_equals_separate_in_loss_and_gradients(pairs):
  cfg = config(pairs)
  objective = make_objective(cfg, BYTES)
  batch = packed(objective)
  alone = separate(batch, objective.sides)
  assert len(alone["tokens"]) == 12
  for got, want in zip(gradient(cfg, batch), gradient(cfg, alone), strict=True):
    close(got, want)


def test_the_loss_equals_torch_cross_entropy_over_all_places():
  torch = pytest.importorskip("torch")
  cfg = config()
  objective = make_objective(cfg, BYTES)
  batch = packed(objective)
  net = objective.build(cfg.model, nnx.Rngs(1))
  loss = objective.loss(net, batch, None)
  logits = np.asarray(net.logits(net.hidden(inputs_of(jax.tree.map(jnp.asarray, batch)))[0]))
  labels = np.full(batch["tokens"].shape, -100)
  for row, places in enumerate(batch["masked_places"]):
    real = batch["masked_weights"][row] > 0
    labels[row, places[real]] = batch["masked_targets"][row][real]
  flat = torch.tensor(logits[..., :260]).reshape(-1, 260)
  goal = torch.tensor(labels).reshape(-1)
  want = torch.nn.functional.cross_entropy(flat, goal, ignore_index=-100)
  total, weight = loss.means["loss"]
  np.testing.assert_allclose(total / weight, float(want), rtol=1e-5)
  right = ((flat.argmax(-1) == goal) & (goal >= 0)).sum() / (goal >= 0).sum()
  got, count = loss.means["accuracy"]
  np.testing.assert_allclose(got / count, float(right), rtol=1e-6)
  assert int(loss.tokens["head"]) == (labels >= 0).sum()


@pytest.mark.parametrize("pairs", PAIRS[1:])
def test_half_of_the_pairs_are_what_they_seem_and_all_tokens_are_those_of_documents(pairs):
  cfg = config(pairs, seq_len=64)
  objective = make_objective(cfg, BYTES)
  texts = documents(3, np.random.default_rng(3).integers(2, 50, 10_000))
  corpus = corpus_of(texts)
  batch = filled(objective, corpus, list(range(len(texts))))
  labels = batch["text_labels"][:, 0]
  assert (batch["text_weights"] == (np.arange(6) == 0)).all()
  assert np.mean(labels) == pytest.approx(0.5, abs=0.01)
  everything = corpus.tokens.astype(np.uint8).tobytes()
  cuts = Counter()
  for i, tokens in enumerate(rebuilt(batch)):
    bos = np.flatnonzero(tokens == 257)
    first, second = tokens[1 : bos[1] - 1], tokens[bos[1] + 1 : -1]
    assert tokens.tolist() == [257, *first, 258, 257, *second, 258]
    types = batch["types"][i][: len(tokens)]
    assert (types == (np.arange(len(tokens)) > len(first) + 1)).all()
    assert len(first) and len(second) and len(first) + len(second) == len(texts[i])
    cuts[len(first) / len(texts[i]) < 0.5] += 1
    if pairs == "sentence_order":
      ordered = (second, first) if labels[i] else (first, second)
      assert (np.concatenate(ordered) == texts[i]).all()
    elif not labels[i]:
      assert (np.concatenate([first, second]) == texts[i]).all()
    else:
      assert (first == texts[i][: len(first)]).all()
      assert second.astype(np.uint8).tobytes() in everything
  assert len(cuts) == 2


def test_a_text_of_another_document_is_none_of_its_own():
  objective = make_objective(config("next_sentence"), BYTES)
  texts = [np.full(n, i) for i, n in enumerate([20, 3, 1, 1, 7])]
  for seed in range(60):
    batch = filled(objective, corpus_of(texts), list(range(5)), seed)
    for i, tokens in enumerate(rebuilt(batch)):
      if batch["text_weights"][i, 0]:
        second = tokens[np.flatnonzero(tokens == 257)[1] + 1 : -1]
        assert (i in second) == (batch["text_labels"][i, 0] == 0)
      else:
        assert len(texts[i]) == 1


@pytest.mark.parametrize("pairs", [pytest.param("none", marks=pytest.mark.slow), "sentence_order"])
def test_accumulation_equals_one_big_batch(pairs):
  results = []
  for parts in (1, 4):
    cfg = config(pairs, accumulation=parts)
    objective = make_objective(cfg, BYTES)
    batch = packed(objective, rows=8)
    assert len(set(batch["masked_weights"].sum(1))) > 1, "parts must differ in weight"
    results.append(one_step(cfg, objective, batch))
  close(*results)
  first = results[0][0]
  assert first["minimized"] == pytest.approx(first["loss"] + first.get("pair_loss", 0), rel=1e-5)


@pytest.fixture
def text(tmp_path):
  rng = np.random.default_rng(0)
  words = ["masked", "language", "models", "tell", "words", "from", "both", "sides"]
  lines = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(80)]
  (tmp_path / "text.txt").write_text("\n".join(lines))
  return tmp_path


def from_text(folder, pairs: str, **settings) -> Config:
  data = DataConfig(source=str(folder / "text.txt"), documents="line", tokenizer="wordpiece:60",
                    validation_fraction=0.2)  # fmt: skip
  model = dataclasses.replace(ENCODER, vocab_size=None)
  objective = ObjectiveConfig(name="masked_lm", pairs=pairs, **settings)
  cfg = config(cache_dir=str(folder / "cache"), data=data, model=model, objective=objective)
  check_fit(cfg)
  return cfg


@pytest.mark.parametrize("pairs", PAIRS)
def test_batches_are_the_same_after_resume_and_lose_no_token(text, pairs):
  one, other = (load_data(from_text(text, pairs, mask_unit="ngram")) for _ in range(2))
  for step in (0, 7, 31):
    got, want = one.batch(step), other.batch(step)
    assert got.keys() == want.keys() and all((got[k] == want[k]).all() for k in got)
  assert (one.batch(0)["masked_places"] != one.batch(1)["masked_places"]).any()
  assert resolved(from_text(text, pairs), one).model.pair_head == (pairs != "none")
  if pairs == "next_sentence":
    return
  alone = load_data(dataclasses.replace(from_text(text, pairs), batch_size=1))
  epochs = [[t for s in range(alone.rows_per_epoch) for t in rebuilt(alone.batch(
    e * alone.rows_per_epoch + s))] for e in range(2)]  # fmt: skip
  special = list(alone.tokenizer.special_ids - {alone.tokenizer.backend.token_to_id("[UNK]")})
  counts = [Counter(np.concatenate(e).tolist()) for e in epochs]
  bare = lambda c: {k: v for k, v in c.items() if k not in special}
  assert bare(counts[0]) == bare(counts[1])
  total = sum((bare(counts[0]) if pairs != "none" else counts[0]).values())
  assert total == alone.tokens_per_epoch


def test_a_person_sees_masks_targets_types_and_pairs(text):
  data = load_data(from_text(text, "sentence_order"))
  batch = data.batch(0)
  shown = describe(batch, data.sides, data.tokenizer, rows=1, tokens=200)
  assert f"8 rows of 48 places: {(batch['segments'] > 0).sum()} tokens" in shown
  assert shown.count("  segment ") == batch["segments"][0].max()
  assert "[CLS]" in shown and "[MASK]" in shown
  lines = [line.split() for line in shown.splitlines()]
  assert ["column", "position", "token", "id", "token", "type"] in lines
  assert ["column", "place", "target", "id", "target", "weight"] in lines
  assert ["column", "label", "weight"] in lines
  place, target = batch["masked_places"][0, 0], batch["masked_targets"][0, 0]
  name = data.tokenizer.backend.id_to_token(int(target))
  assert ["0", str(place), str(target), repr(name), "1"] in lines


def test_wrong_settings_are_named(text):
  plain = build_tokenizer("char", None, ["abc"])
  cases = [
    (lambda: make_objective(config(), plain), "needs a mask token"),
    (lambda: make_objective(config("sentence_order", seq_len=5), BYTES), "no place for two texts"),
    (lambda: from_text(text, "none", max_ngram=2) and load_data(from_text(text, "none",
      max_ngram=2)), "max_ngram=2 has no effect"),
    (lambda: load_data(dataclasses.replace(from_text(text, "next_sentence"), data=DataConfig(
      source=str(text / "text.txt"), tokenizer="bytes"))), "only one"),
    (lambda: ObjectiveConfig(name="masked_lm", mask_share=0.9, random_share=0.2), "at most 1"),
    (lambda: ObjectiveConfig(name="causal_lm", mask_rate=0.2), "has no effect"),
    (lambda: check_fit(config(model=ModelConfig())), "trains model.shape encoder"),
  ]  # fmt: skip
  for call, words in cases:
    with pytest.raises(InputError, match=words):
      call()
