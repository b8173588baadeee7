"""ELECTRA: two networks that learn together, one of which is the model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model
from model.checkpoint import Checkpoints
from model.errors import InputError
from model.layers import ParamInfo, param_info
from model.sharding import make_mesh
from tests.train.objectives.rows import separate
from tests.train.objectives.test_masked_lm import (
  BYTES,
  ENCODER,
  close,
  config,
  gradient,
  one_step,
  packed,
)
from train.config import Config, ObjectiveConfig
from train.data.pipeline import Data
from train.flops import step_flops
from train.loop import restore_or_init
from train.objectives import make_objective, replaced_token
from train.program import build_program

DISCRIMINATOR = dataclasses.replace(
  ENCODER, head="replaced_token", head_norm=False, logit_bias=False, token_types=0
)

NARROW = dataclasses.replace(DISCRIMINATOR, d_embed=8, layer_sets=1, relative_bias=True)


def electra(share: float = 0.5, **changes) -> Config:
  objective = ObjectiveConfig(name="replaced_token", generator_share=share)
  return config(**{"model": DISCRIMINATOR, "objective": objective, **changes})


@pytest.fixture
def greedy(monkeypatch):
  """Samples that depend on what the generator says alone."""
  monkeypatch.setattr(replaced_token, "sampled", lambda logits, key: jnp.argmax(logits, -1))


@pytest.mark.parametrize(
  ("share", "model"),
  [
    (0.5, NARROW),
    *(pytest.param(share, DISCRIMINATOR, marks=pytest.mark.slow) for share in (0.5, 1.0)),
  ],
)
def test_packed_equals_separate_in_loss_and_gradients(greedy, share, model):
  cfg = electra(share, model=model)
  objective = make_objective(cfg, BYTES)
  batch = packed(objective)
  alone = separate(batch, dict(objective.sides))
  for got, want in zip(gradient(cfg, batch), gradient(cfg, alone), strict=True):
    close(got, want, 5e-5)


@pytest.mark.slow
def test_accumulation_equals_one_big_batch(greedy):
  results = []
  for parts in (1, 4):
    cfg = electra(accumulation=parts)
    objective = make_objective(cfg, BYTES)
    batch = packed(objective, rows=8)
    assert len(set(batch["masked_weights"].sum(1))) > 1, "parts must differ in both weights"
    results.append(one_step(cfg, objective, batch))
  close(*results)
  first = results[0][0]
  total = first["loss"] + 50 * first["replaced_loss"]
  assert first["minimized"] == pytest.approx(total, rel=1e-5)


def test_the_model_reads_samples_and_originals_and_its_loss_equals_torch():
  torch = pytest.importorskip("torch")
  cfg = electra()
  objective = make_objective(cfg, BYTES)
  batch, net = packed(objective), objective.build(cfg.model, nnx.Rngs(0))
  rng = np.random.default_rng(0)
  samples = np.where(rng.random(batch["masked_targets"].shape) < 0.5, 7, batch["masked_targets"])
  traced = jax.tree.map(jnp.asarray, batch)
  tokens, replaced = map(np.asarray, replaced_token.corrupted(traced, jnp.asarray(samples)))
  original = batch["tokens"].copy()
  for row, real in enumerate(batch["masked_weights"] > 0):
    places = batch["masked_places"][row][real]
    original[row, places] = batch["masked_targets"][row][real]
  assert (replaced == (tokens != original)).all() and replaced.any()
  at_masks = np.take_along_axis(tokens, batch["masked_places"], 1)
  assert (at_masks == samples)[batch["masked_weights"] > 0].all()
  loss, again = (objective.loss(net, traced, None) for _ in range(2))
  close(loss.means, again.means, 0)
  scores = rng.normal(size=tokens.shape).astype(np.float32)
  real = batch["positions"] >= 0
  nats, means = replaced_token._detection(*map(jnp.asarray, (scores, replaced, real)))
  want = torch.nn.functional.binary_cross_entropy_with_logits(
    torch.tensor(scores[real]), torch.tensor(replaced[real].astype(np.float32)), reduction="sum"
  )
  np.testing.assert_allclose(nats, float(want), rtol=1e-5)
  found, count = means["replaced_found"]
  assert (int(found), int(count)) == ((scores > 0)[replaced].sum(), replaced.sum())


def test_samples_follow_the_generator_and_the_key():
  logits = jnp.log(jnp.array([0.1, 0.2, 0.7])) * jnp.ones((4, 5000, 1))
  one, other = (replaced_token.sampled(logits, jax.random.key(k)) for k in (0, 1))
  shares = np.bincount(np.asarray(one).ravel()) / one.size
  np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.01)
  assert (one != other).any()


def test_the_generator_learns_from_its_own_loss_only():
  cfg = electra()
  objective = make_objective(cfg, BYTES)
  batch = jax.tree.map(jnp.asarray, packed(objective))
  graphdef, state = nnx.split(objective.build(cfg.model, nnx.Rngs(0)), nnx.Param)
  params = nnx.to_pure_dict(state)
  loss = lambda p, name: objective.loss(nnx.merge(graphdef, p), batch, None).terms[name]
  term = lambda name: jax.jit(jax.grad(loss), static_argnums=1)(params, name)
  size = lambda tree: sum(float(jnp.abs(a).sum()) for a in jax.tree.leaves(tree))
  own, detection = term("loss"), term("replaced")
  assert size(detection["generator"]) == 0 < size(own["generator"])
  assert size(own["encoder"]["layers"]) == 0 < size(detection["encoder"]["layers"])
  for shared in (own, detection):  # Both learn the embeddings.
    assert size(shared["embed"]) > 0 and size(shared["encoder"]["position_embed"]) > 0


@pytest.mark.slow
def test_a_checkpoint_loads_as_the_model_alone_and_begins_another_run(tmp_path):
  cfg = electra(init_from=str(tmp_path))
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(cfg, mesh)
    state = program.init()
    meta = {"config": {"model": cfg.model.to_dict()}}
    (tmp_path / "config.json").write_text(json.dumps(meta["config"]))
    BYTES.save(tmp_path / "tokenizer")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state, meta, blocking=True)
    checkpoints.close()
    fresh = Checkpoints(tmp_path / "new", keep=1)
    data: Data = dataclasses.make_dataclass("Data", ["tokenizer"])(BYTES)  # pyright: ignore
    begun, start = restore_or_init(cfg, program, fresh, data)
    fresh.close()
  assert start == 0
  close(begun.params, state.params, 0)
  m = model.load(tmp_path)
  alone = {k: v for k, v in state.params.items() if k != "generator"}
  close(m.params, alone, 0)
  size = sum(a.size for a in jax.tree.leaves(alone))
  assert cfg.model.num_params() == size - (264 - 260) * 16  # The padding of the vocabulary.
  assert m(np.array([[257, 65, 66, 258]])).shape == (1, 4)


@pytest.mark.parametrize("width", [None, 8])
def test_model_flops_count_the_matrices_of_both_networks(width):
  cfg = electra(seq_len=8, model=dataclasses.replace(DISCRIMINATOR, d_embed=width))
  net = nnx.eval_shape(lambda: make_objective(cfg).build(cfg.model, nnx.Rngs(0)))
  infos = jax.tree.leaves(param_info(net.generator), is_leaf=lambda i: isinstance(i, ParamInfo))
  shapes = [p.shape for p in jax.tree.leaves(nnx.to_pure_dict(nnx.state(net.generator)))]
  pairs = list(zip(infos, shapes, strict=True))
  matrices = sum(np.prod(shape) for info, shape in pairs if info.role == "matrix")
  tokens = {"encoder": 0, "head": 0, "generator.encoder": 1, "generator.head": 1}
  none = {f"{name}encoder.None": 0 for name in ("", "generator.")}
  assert step_flops(cfg)(tokens, none) == 6 * (matrices + 260 * (width or 16))


def test_wrong_settings_are_named():
  cases = [
    (dict(share=0.3), "generator_share=0.3 of model.d_model=16 is 4.8"),
    (dict(share=0.25), "model.num_heads=2 is 0.5"),
  ]
  for settings, words in cases:
    with pytest.raises(InputError, match=words):
      make_objective(electra(**settings), BYTES)
