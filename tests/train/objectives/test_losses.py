"""The losses of tasks beside PyTorch's and NumPy's, and the exactness of their averages."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.sharding import make_mesh
from tests.train.objectives import tasks
from tests.train.test_step import born
from train.objectives import make_objective
from train.objectives.contrastive import similarities, text_id
from train.objectives.loss import inputs_of
from train.objectives.seq2seq import after_prompt
from train.objectives.texts import pooled
from train.program import build_program, put_batch


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_the_loss_of_texts_equals_torch_on_the_same_logits(tmp_path, problem):
  torch = pytest.importorskip("torch")
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(8))
  columns = dict(single_label="label", multi_label="labels", regression="number")
  made = tasks.config(tmp_path, "classification", problem=problem, label=columns[problem])
  labelled, _, batch = tasks.epoch(made)
  objective, rng = make_objective(labelled), np.random.default_rng(0)
  labels, weights = batch["text_labels"], batch["text_weights"]
  outputs = labelled.model.outputs
  logits = rng.normal(size=(*weights.shape, outputs)).astype(np.float32)
  total, means = objective.compare(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
  there = weights > 0
  scores, goals = torch.tensor(logits[there]), torch.tensor(labels[there])
  want = {
    "single_label": lambda: torch.nn.functional.cross_entropy(scores, goals.long()),
    "multi_label": lambda: torch.nn.BCEWithLogitsLoss()(scores, goals.float()),
    "regression": lambda: torch.nn.functional.mse_loss(scores[:, 0], goals),
  }[problem]()
  np.testing.assert_allclose(total / means["loss"][1], float(want), rtol=1e-5)
  np.testing.assert_allclose(means["loss"][1], objective.weights(batch)["loss"])
  if problem == "single_label":
    right = (scores.argmax(-1) == goals).sum()
    np.testing.assert_allclose(means["accuracy"], [float(right), there.sum()])
  if problem == "multi_label":
    said, true = logits[there] > 0, labels[there] > 0
    wrong = (said != true).sum()
    hits = (said & true).sum()
    np.testing.assert_allclose(means["f1"][0] / means["f1"][1], 2 * hits / (2 * hits + wrong))
    np.testing.assert_allclose(means["accuracy"][0], (said == true).all(-1).sum())


def test_the_loss_of_answers_equals_torch_on_unpacked_rows(tmp_path):
  torch = pytest.importorskip("torch")
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(9))
  made = tasks.config(tmp_path, "span_qa")
  packed, _, batch = tasks.epoch(made)
  params = tasks.fresh(packed)
  got, weight, means, _ = tasks.gradient(packed, params, batch)
  apart = dataclasses.replace(made, data=dataclasses.replace(made.data, packing=False))
  single, _, rows = tasks.epoch(apart)
  net, inputs = tasks.network(single, params), inputs_of(rows)
  logits = np.array(net.logits(net.hidden(inputs)[0]))
  nats, right = 0.0, 0
  for row in range(len(logits)):
    length = int((rows["segments"][row] > 0).sum())
    ends = [int(rows["text_start"][row, 0]), int(rows["text_end"][row, 0])]
    scores = torch.tensor(logits[row, :length].T)
    nats += float(torch.nn.functional.cross_entropy(scores, torch.tensor(ends), reduction="sum"))
    right += scores.argmax(-1).tolist() == ends
  assert weight == 2 * len(logits)
  np.testing.assert_allclose(got, nats, rtol=1e-4)
  np.testing.assert_allclose(means["accuracy"], [right, len(logits)])


def test_similarities_equal_numpy_and_empty_places_and_equal_texts_never_count():
  rng = np.random.default_rng(0)
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  vectors = {n: unit(rng.normal(size=(5, 6))) for n in ("text", "text_pair", "negative")}
  ids = dict(text=[1, 2, 1, 4, 0], text_pair=[5, 6, 7, 6, 0], negative=[8, 5, 9, 10, 0])
  weights = np.array([1, 1, 1, 1, 0.0])
  got = similarities(
    jax.tree.map(jnp.asarray, vectors), {k: jnp.asarray(v) for k, v in ids.items()},
    jnp.asarray(weights), temperature=0.1,
  )  # fmt: skip
  want = vectors["text"] @ np.concatenate([vectors["text_pair"], vectors["negative"]]).T / 0.1
  hidden = {(0, 2), (2, 0), (1, 3), (3, 1), (0, 5 + 1)}
  hidden |= set(itertools.product(range(5), (4, 9))) - {(4, 4)}
  for place in hidden:
    want[place] = -np.inf
  np.testing.assert_allclose(got[:4], want[:4], rtol=1e-4, atol=1e-5)
  assert np.isfinite(got[4, 4])


def test_equal_texts_have_equal_ids_and_others_have_others():
  texts = [[1, 2], [1, 2], [2, 1], [1], [1, 2, 0]]
  ids = [text_id(np.array(t, dtype)) for t, dtype in zip(texts, [int, np.uint16] + [int] * 3)]  # noqa: B905
  assert ids[0] == ids[1] and len(set(ids)) == 4
  assert all(0 <= i < 2**31 for i in ids)


def step(config, batch, devices: int):
  mesh = make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state = born(config, program)
    start = jax.device_get(state.params)
    state, metrics = program.train_step(state, put_batch(program, batch))
    return start, jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.slow
def test_contrastive_learns_against_the_global_batch_on_any_number_of_devices(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(20))
  made = tasks.config(tmp_path, "contrastive", pooling="mean", packing=False, batch_size=4)
  made, data, _ = tasks.epoch(made)
  batch = data.batch(0)
  params, one, metrics = step(made, batch, 1)
  _, four, spread = step(made, batch, 4)
  np.testing.assert_allclose(spread["loss"], metrics["loss"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), four, one)
  vectors, net = {}, tasks.network(made, params)
  for side, name in (("", "a"), ("pair_", "b"), ("negative_", "c")):
    inputs = inputs_of(batch, side)
    vector = np.array(pooled(made.model, net.hidden(inputs)[0], inputs, 1))[:, 0]
    vectors[name] = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
  logits = vectors["a"] @ np.concatenate([vectors["b"], vectors["c"]]).T / 0.05
  log_z = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
  np.testing.assert_allclose(metrics["loss"], np.mean(log_z - np.diag(logits)), rtol=1e-4)


@pytest.mark.slow
def test_accumulation_equals_one_batch_for_classification(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(60))
  made = tasks.config(tmp_path, "classification", batch_size=8, max_texts=5)
  made, data, _ = tasks.epoch(made)
  batch = data.batch(0)
  assert len(set(batch["text_weights"].sum(1))) > 1, "parts must differ in weight"
  _, whole, metrics = step(made, batch, 1)
  _, parts, sums = step(dataclasses.replace(made, accumulation=4), batch, 1)
  for name in ("loss", "accuracy"):
    np.testing.assert_allclose(sums[name], metrics[name], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, whole)


def test_only_what_follows_a_prompt_is_learned():
  fields = after_prompt(np.array([1, 5, 6]), np.array([7, 2]))
  assert fields["tokens"].tolist() == [1, 5, 6, 7]
  assert fields["targets"].tolist() == [5, 6, 7, 2]
  assert fields["weights"].tolist() == [False, False, True, True]
