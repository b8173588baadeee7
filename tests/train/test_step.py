"""The identities of the training step, on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.heads import abstract, init_params
from model.sharding import make_mesh
from tests.train import tiny
from train.config import ObjectiveConfig, OptimizerConfig
from train.objectives.causal_lm import CausalLM
from train.objectives.loss import token_loss
from train.optim import make_optimizer
from train.program import build_program, make_loss, put_batch
from train.step import init_state


def gradient(model, batch, params, key=None):
  """(nats, weight, gradients of the sum) of a batch."""
  graphdef = nnx.split(abstract(model), nnx.Param)[0]
  loss_fn = make_loss(graphdef, CausalLM(ObjectiveConfig(), model, batch["tokens"].shape[1]))

  def total(params, batch):
    loss = loss_fn(params, {}, batch, key)
    return loss.terms["loss"], loss

  (_, loss), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)
  return *map(float, loss.means["loss"]), grads


def params_of(model, seed=0):
  return init_params(model, jax.random.key(seed))


def close(got, want, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
  )


def born(config, program):
  """What `program.init` gives, without compiling it: that takes longer than the step."""
  tx = make_optimizer(config.optimizer, config.steps, program.info)
  params = init_params(config.model, jax.random.key(config.seed))
  state = init_state(params, {}, tx, ema=config.ema_decay is not None)
  own = jax.tree.map(np.array, state)  # Counters that are all 0 may share memory.
  return jax.device_put(own, jax.tree.map(lambda a: a.sharding, program.state))


def run(config, batches, devices=1):
  """(final state, losses) of a program fed with `batches`."""
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state, losses = born(config, program), []
    for batch in batches:
      state, metrics = program.train_step(state, put_batch(program, batch))
      losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.mark.parametrize("name", tiny.marked(*tiny.LONGER))
def test_packed_equals_separate_in_loss_and_gradients(name):
  model, docs = tiny.MODELS[name], tiny.documents(1, [5, 9, 2])
  packed = tiny.batch_of([tiny.row(docs, 20)])
  separate = tiny.batch_of([tiny.row([doc], 20) for doc in docs])
  params = params_of(model)
  nats, weight, grads = gradient(model, packed, params)
  want_nats, want_weight, want = gradient(model, separate, params)
  assert weight == want_weight == 16
  np.testing.assert_allclose(nats, want_nats, rtol=1e-5)
  close(grads, want)


@pytest.mark.parametrize(
  "change",
  [
    dict(remat="full"),
    *(
      pytest.param(change, marks=pytest.mark.slow)
      for change in (
        dict(scan_layers=False), dict(remat="offload"), dict(remat="dots"), dict(remat="attention")
      )
    ),
  ],
  ids=str,
)  # fmt: skip
def test_loop_and_remat_equal_the_plain_scan_with_dropout(change):
  model = dataclasses.replace(tiny.ROTARY, dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1)
  batch, params, key = tiny.random_batch(2), params_of(model), jax.random.key(3)
  nats, _, grads = gradient(dataclasses.replace(model, **change), batch, params, key)
  want_nats, _, want = gradient(model, batch, params, key)
  assert nats != pytest.approx(gradient(model, batch, params)[0], rel=1e-4), "no dropout at all"
  np.testing.assert_allclose(nats, want_nats, rtol=1e-6)
  close(grads, want)


@pytest.mark.parametrize(
  "optimizer",
  [
    "adamw",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "adafactor", "lion", "sgd")),
  ],
)
def test_scan_equals_loop_with_every_optimizer(optimizer):
  batches = [tiny.random_batch(seed) for seed in range(2)]
  settings = OptimizerConfig(name=optimizer, warmup_steps=0, learning_rate=1e-3)
  models = [dataclasses.replace(tiny.ROTARY, scan_layers=scan) for scan in (True, False)]
  one, other = (run(tiny.config(m, optimizer=settings), batches)[0] for m in models)
  # Lion takes signs: where a momentum is all but 0, either sign is right.
  loose = optimizer == "lion"
  differ = jax.tree.map(lambda a, b: np.mean(np.abs(a - b) > 1e-5), one.params, other.params)
  assert max(jax.tree.leaves(differ)) <= (0.01 if loose else 0)
  same = jax.tree.map(lambda a, b: a.shape == b.shape, one.opt_state, other.opt_state)
  assert all(jax.tree.leaves(same))


def test_accumulation_equals_one_big_batch():
  batches = [tiny.random_batch(seed) for seed in range(3)]
  assert len({tuple(b["weights"].sum(1)) for b in batches}) > 1, "parts must differ in weight"
  whole, losses = run(tiny.config(), batches)
  parts, part_losses = run(tiny.config(accumulation=4), batches)
  np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
  close(parts.params, whole.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moving_average_is_that_of_the_parameters(dtype):
  batches = [tiny.random_batch(seed) for seed in range(2)]
  config = tiny.config(dataclasses.replace(tiny.ROTARY, param_dtype=dtype), ema_decay=0.999)
  wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), jax.device_get(tree))
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state = born(config, program)
    first = want = wide(state.params)
    for batch in batches:
      state, _ = program.train_step(state, put_batch(program, batch))
      want = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b, want, wide(state.params))
  moved = lambda tree: jax.tree.map(lambda a, b: 1000 * (a - b), wide(tree), first)
  close(moved(state.ema), moved(want), 1e-3)


def test_a_non_finite_step_changes_nothing_but_the_counters():
  good, bad = tiny.random_batch(0), tiny.random_batch(1)
  bad["weights"][0, 0] = np.inf
  config = tiny.config()
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state, _ = program.train_step(born(config, program), put_batch(program, good))
    before = jax.device_get(state)
    state, metrics = program.train_step(state, put_batch(program, bad))
    after = jax.device_get(state)
    assert int(metrics["bad_steps"]) == 1 and int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    state, metrics = program.train_step(state, put_batch(program, good))
    assert int(metrics["bad_steps"]) == 0


def test_token_loss_equals_torch_with_label_smoothing():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  logits, targets = rng.normal(size=(2, 5, 11)).astype(np.float32), rng.integers(0, 11, (2, 5))
  padded = np.pad(logits, ((0, 0), (0, 0), (0, 5)), constant_values=-np.inf)
  got = token_loss(
    jnp.asarray(padded), jnp.asarray(targets), jnp.ones((2, 5)), vocab_size=11, z_loss=0.5,
    label_smoothing=0.2,
  )  # fmt: skip
  flat, goal = torch.tensor(logits).reshape(-1, 11), torch.tensor(targets).reshape(-1)
  smooth = torch.nn.functional.cross_entropy(flat, goal, label_smoothing=0.2, reduction="sum")
  z = 0.5 * torch.logsumexp(flat, -1).square().sum()
  plain = torch.nn.functional.cross_entropy(flat, goal, reduction="sum")
  np.testing.assert_allclose(got, [float(smooth + z), 10.0, float(plain)], rtol=1e-5)


def test_weight_decay_reaches_matrices_and_tables_only():
  from model.layers import param_info

  net = abstract(tiny.MODELS["learned_layer_norm"])
  info, params = param_info(net), params_of(tiny.MODELS["learned_layer_norm"])
  tx = make_optimizer(OptimizerConfig(name="sgd", warmup_steps=0, clip_norm=None), 10, info)
  zeros = jax.tree.map(jnp.zeros_like, params)
  ones = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(zeros, tx.init(ones), ones, step=0)
  decayed = jax.tree.map(lambda u, i: bool(jnp.any(u != 0)) == (i.role != "vector"), updates, info)
  assert all(jax.tree.leaves(decayed))
