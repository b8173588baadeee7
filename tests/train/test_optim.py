"""Optimizers on stacked, multi-axis leaves against optax on separate two-dimensional matrices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.errors import InputError
from model.layers import ParamInfo
from tests.quick import xla_flags
from train.config import OptimizerConfig
from train.config_optimizer import OPTIMIZERS
from train.optim import SPIKE_WARMUP, make_optimizer, skipped_steps, state_axes
from train.schedules import make_schedule

STEPS = 10
# name: (shape, axes, role, inputs). One side of some matrices is below Adafactor's 128.
LEAVES = {
  "q_proj": ((2, 130, 4, 32), ("layers", "embed", "heads", "head_dim"), "matrix", 1),
  "o_proj": ((2, 4, 32, 136), ("layers", "heads", "head_dim", "embed"), "matrix", 2),
  "narrow": ((2, 24, 4, 8), ("layers", "embed", "heads", "head_dim"), "matrix", 1),
  "square": ((128, 128), ("embed", "mlp"), "matrix", 1),
  "experts": ((2, 2, 144, 128), ("layers", "expert", "mlp", "embed"), "matrix", 1),
  "expert_bias": ((2, 2, 16), ("layers", "expert", "mlp"), "vector", 1),
  "router": ((2, 16, 2), ("layers", "embed", "expert"), "matrix", 1),
  "bias": ((2, 4, 8), ("layers", "heads", "head_dim"), "vector", 1),
  "norm": ((2, 16), ("layers", "embed"), "vector", 1),
  "table": ((136, 128), ("vocab", "embed"), "embedding", 1),
  "head": ((128, 136), ("embed", "vocab"), "matrix", 1),
}
INFO = {"net": {k: ParamInfo(*rest) for k, (_, *rest) in LEAVES.items()}}

SMALL = ("narrow", "expert_bias", "norm", "table")


def config(name: str, **rest) -> OptimizerConfig:
  rest = {"learning_rate": 0.01, "warmup_steps": 3, **rest}
  return OptimizerConfig(name=name, **rest)


def arrays(seed: int, dtype=np.float64) -> dict:
  draw = np.random.default_rng(seed).normal
  return {"net": {k: jnp.asarray(draw(size=v[0]), dtype) for k, v in LEAVES.items()}}


def some(tree: dict, *names: str) -> dict:
  return {"net": {k: tree["net"][k] for k in names}}


def run(tx, params, gradients) -> tuple:
  state = jax.jit(tx.init)(params)

  @jax.jit
  def one(grads, state, params, step):
    updates, state = tx.update(grads, state, params, step=step)
    return optax.apply_updates(params, updates), state

  for step, grads in enumerate(gradients):
    params, state = one(grads, state, params, step)
  return params, state


def separate(tree: dict) -> dict:
  """Every layer's and expert's array alone: two-dimensional, or one-dimensional."""
  out = {}
  for name, x in jax.device_get(tree)["net"].items():
    shape, axes, role, inputs = LEAVES[name]
    stacked = 1 + (axes[1] == "expert") if axes[0] == "layers" else 0
    for index in np.ndindex(shape[:stacked]):
      part = x[index]
      rows = int(np.prod(part.shape[:inputs]))
      out[(name, *index)] = part.reshape(-1) if role == "vector" else part.reshape(rows, -1)
  return out


def reference(name: str, leaf: tuple, schedule) -> optax.GradientTransformation:
  """What optax offers under that name, for one matrix or vector."""
  _, axes, role, _ = leaf
  decay = 0.0 if role == "vector" else 0.1
  if name == "lion":
    return optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=decay)
  if name == "sgd":
    parts = optax.trace(0.9), optax.add_decayed_weights(decay)
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))
  if name == "adafactor":
    return optax.adafactor(schedule, weight_decay_rate=lambda count: decay * schedule(count))
  if name == "muon" and role == "matrix" and "vocab" not in axes:
    return optax.contrib.muon(schedule, beta=0.95, weight_decay=decay, consistent_rms=0.2)
  return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay)


MOST = [pytest.param(n, marks=pytest.mark.slow) if n in ("lion", "sgd") else n for n in OPTIMIZERS]


@pytest.mark.parametrize("name", MOST)
def test_stacked_multi_axis_leaves_equal_optax_on_each_matrix(name):
  with jax.enable_x64(True):
    cfg = config(name, clip_norm=None)
    gradients = [arrays(seed) for seed in (1, 2, 3)]
    params, _ = run(make_optimizer(cfg, STEPS, INFO), arrays(0), gradients)
    ours = separate(params)

    schedule = make_schedule(cfg, STEPS)
    parts = [separate(grads) for grads in gradients]
    for key, value in separate(arrays(0)).items():
      if key[1:] in ((), (0,), (0, 0)):  # The next leaf: its parts share compiled functions.
        tx = reference(name, LEAVES[key[0]], schedule)
        init, update = jax.jit(tx.init), jax.jit(tx.update)
      state = init(value)
      for grads in parts:
        move, state = update(grads[key], state, value)
        value = value + np.asarray(move)
      np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-11, err_msg=str(key))


@pytest.mark.parametrize("name", MOST)
def test_state_of_a_stack_is_the_stack_of_its_layers_states(name):
  """Two layers apart, clipped together, against the same two layers stacked."""
  stacked = {k: LEAVES[k] for k in ("q_proj", "router", "expert_bias")}
  pick = lambda tree: {k: tree["net"][k] for k in stacked}
  apart = lambda tree: {k: {i: x[i] for i in range(2)} for k, x in pick(tree).items()}
  info = {k: ParamInfo(*v[1:]) for k, v in stacked.items()}
  alone = {k: {i: ParamInfo(v[1][1:], *v[2:]) for i in range(2)} for k, v in stacked.items()}
  with jax.enable_x64(True):
    cfg = config(name, skip_spikes=4.0)
    gradients = [arrays(seed) for seed in (1, 2)]
    scan = run(make_optimizer(cfg, STEPS, info), pick(arrays(0)), map(pick, gradients))
    loop = run(make_optimizer(cfg, STEPS, alone), apart(arrays(0)), map(apart, gradients))

    flat = jax.tree_util.tree_flatten_with_path(loop)[0]
    found = {jax.tree_util.keystr(path): x for path, x in flat}
    matched = 0
    for path, value in jax.tree_util.tree_flatten_with_path(scan)[0]:
      place = next((i for i, key in enumerate(path) if getattr(key, "key", "") in stacked), None)
      if place is None:
        np.testing.assert_allclose(value, found[jax.tree_util.keystr(path)], rtol=1e-12)
        continue
      key = [jax.tree_util.DictKey(i) for i in range(2)]
      layers = [
        found[jax.tree_util.keystr((*path[: place + 1], k, *path[place + 1 :]))] for k in key
      ]
      shared = path[-1] in map(jax.tree_util.GetAttrKey, ("count", "ns_coeffs"))
      expected = layers[0] if shared else np.stack(layers)
      np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12, err_msg=str(path))
      matched += 1
    assert matched > len(stacked)


def test_adafactor_factors_each_matrix_by_its_rows_and_columns():
  params = arrays(0, np.float32)
  state = jax.eval_shape(make_optimizer(config("adafactor"), STEPS, INFO).init, params)
  leaves = {k: v[0] for k, v in state.inner[1]["net"].items()}
  shapes = {k: (v.v_row.shape, v.v_col.shape, v.v.shape) for k, v in leaves.items()}
  assert shapes["q_proj"] == ((2, 128), (2, 130), (2, 1))
  assert shapes["o_proj"] == ((2, 128), (2, 136), (2, 1))
  assert shapes["experts"] == ((2, 2, 128), (2, 2, 144), (2, 2, 1))
  assert shapes["narrow"] == ((2, 1), (2, 1), LEAVES["narrow"][0])


def test_state_axes_name_what_each_axis_of_the_state_stands_for():
  params = arrays(0, np.float32)
  axes = {
    name: state_axes(make_optimizer(config(name), STEPS, INFO), params, INFO).inner[1]
    for name in ("adamw", "adafactor", "muon")
  }
  assert axes["adamw"].mu["net"]["q_proj"] == LEAVES["q_proj"][1]
  assert axes["adamw"].count == ()
  matrix, other = axes["muon"]["net"]["o_proj"][0], axes["muon"]["net"]["table"]
  assert (matrix.mu, matrix.ns_coeffs, other.nu) == (
    LEAVES["o_proj"][1],
    (None,),
    ("vocab", "embed"),
  )
  factored = {k: (v[0].v_row, v[0].v_col, v[0].v) for k, v in axes["adafactor"]["net"].items()}
  # The longer side of q_proj are its rows, of o_proj its columns.
  none = ("layers", None)
  assert factored["q_proj"] == (("layers", "heads"), ("layers", "embed"), none)
  assert factored["o_proj"] == (("layers", "heads"), ("layers", "embed"), none)
  assert factored["square"] == (("embed",), ("mlp",), (None,))
  assert factored["experts"][:2] == (("layers", "expert", "embed"), ("layers", "expert", "mlp"))
  assert factored["router"] == (none, none, LEAVES["router"][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_decoupled_scaled_by_the_learning_rate_and_spares_vectors(name):
  params = some(arrays(0, np.float32), *SMALL)
  zeros = jax.tree.map(jnp.zeros_like, params)
  cfg = config(name, learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.2)
  after, _ = run(make_optimizer(cfg, STEPS, some(INFO, *SMALL)), params, [zeros])
  for key, value in after["net"].items():
    factor = 1.0 if LEAVES[key][2] == "vector" else 1 - 0.5 * 0.2
    np.testing.assert_allclose(value, params["net"][key] * factor, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_bfloat16_parameters_have_float32_moments_and_round_once(name):
  start = some(arrays(0, jnp.bfloat16), "narrow", "norm")
  same = jax.tree.map(lambda x: x.astype(jnp.float32), start)
  tx = make_optimizer(config(name), STEPS, some(INFO, "narrow", "norm"))
  narrow, state = run(tx, start, [start])
  wide, expected = run(tx, same, [same])
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-8)


def test_spikes_change_nothing_but_the_counter_and_nan_does_not_poison_the_mean():
  params = {"w": jnp.ones((4,))}
  info = {"w": ParamInfo(("embed",), "vector", 1)}
  tx = make_optimizer(config("adamw", skip_spikes=4.0, clip_norm=None), 200, info)
  update = jax.jit(tx.update)
  grad = lambda norm: {"w": jnp.full((4,), norm / 2)}
  state = tx.init(params)
  for step in range(SPIKE_WARMUP):
    norm = jnp.nan if step in (0, 5) else 1.0
    before = state
    updates, state = update(grad(norm), state, params, step=step)
    assert np.isfinite(updates["w"]).all()
    if np.isnan(norm):
      jax.tree.map(np.testing.assert_array_equal, state, before)
  for _ in range(2):
    _, state = update(grad(1.0), state, params, step=20)
  assert float(state.spikes.mean) == pytest.approx(1.0)

  updates, spiked = update(grad(4.5), state, params, step=21)
  assert not updates["w"].any() and int(skipped_steps(spiked)) == 1
  jax.tree.map(np.testing.assert_array_equal, spiked.inner, state.inner)
  updates, _ = update(grad(3.5), spiked, params, step=22)
  assert updates["w"].all()

  # A lasting change of scale is followed after a while.
  for step in range(100):
    updates, spiked = update(grad(10.0), spiked, params, step=step)
  assert updates["w"].all() and 1 < int(skipped_steps(spiked)) < 20


def test_skipped_steps_is_zero_where_no_update_is_skipped():
  params = {"w": jnp.ones((4,))}
  info = {"w": ParamInfo(("embed",), "vector", 1)}
  assert int(skipped_steps(make_optimizer(config("sgd"), 10, info).init(params))) == 0


def test_schedules_equal_their_formulas():
  steps, warmup, peak, last = 50, 5, 2.0, 0.5
  n = np.arange(steps + 1)
  rise = peak * (n + 1) / (warmup + 1)
  share = (n - warmup) / (steps - warmup)
  expected = {
    "cosine": last + 0.5 * (1 + np.cos(np.pi * share)) * (peak - last),  # nanoGPT's get_lr.
    "linear": peak + share * (last - peak),
    "constant": np.full(n.shape, peak),
    "inverse_sqrt": peak * np.sqrt(warmup / np.maximum(n, 1)),
    "wsd": np.where(n < 40, peak, peak + (n - 40) / 10 * (last - peak)),
  }
  for name, after in expected.items():
    fraction = {} if name in ("constant", "inverse_sqrt") else {"final_fraction": last / peak}
    decay = {"decay_steps": 10} if name == "wsd" else {}
    cfg = config("sgd", schedule=name, learning_rate=peak, warmup_steps=warmup, **fraction, **decay)
    values = jax.vmap(make_schedule(cfg, steps))(jnp.arange(steps + 1))
    np.testing.assert_allclose(values, np.where(n < warmup, rise, after), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "settings",
  [
    dict(name="sgd", b2=0.9),
    dict(name="lion", eps=1e-6),
    dict(name="adafactor", b1=0.9),
    dict(schedule="constant", final_fraction=0.0),
    dict(schedule="cosine", decay_steps=3),
    dict(schedule="wsd", decay_steps=0),
    dict(skip_spikes=0.5),
    dict(b1=1.0),
    dict(eps=float("nan")),
    dict(name="adam"),
  ],
  ids=str,
)
def test_settings_without_effect_or_sense_are_refused(settings):
  key = next(k for k in reversed(settings))
  with pytest.raises(InputError, match=f"optimizer.{key}"):
    OptimizerConfig(**settings)


def test_a_warmup_or_decay_that_does_not_fit_is_refused():
  with pytest.raises(InputError, match="warmup_steps=10 must be below steps=10"):
    make_schedule(config("adamw", warmup_steps=10), 10)
  with pytest.raises(InputError, match="decay of 8 steps"):
    make_schedule(config("adamw", schedule="wsd", decay_steps=8), 10)


def sharded_equals_one_device():
  """Runs in a process of its own with 8 devices: see the test below."""
  from model.sharding import make_mesh, spec

  jax.config.update("jax_enable_x64", True)
  leaves = {
    "k_proj": ((2, 128, 2, 64), ("layers", "embed", "kv_heads", "head_dim"), "matrix", 1),
    "down": ((2, 2, 160, 128), ("layers", "expert", "mlp", "embed"), "matrix", 1),
    "norm": ((2, 16), *LEAVES["norm"][1:]),
    "table": ((256, 128), *LEAVES["table"][1:]),
  }
  info = {k: ParamInfo(*rest) for k, (_, *rest) in leaves.items()}
  draw = lambda seed: {
    k: jnp.asarray(np.random.default_rng(seed).normal(size=v[0])) for k, v in leaves.items()
  }
  mesh = make_mesh(data=1, fsdp=2, tensor=4)

  def place(leaf, axes):
    return jax.sharding.NamedSharding(mesh, spec(axes, leaf.shape, mesh))

  where = jax.tree.map(lambda i, p: place(p, i.axes), info, draw(0))
  for name, bits in [*((name, 32) for name in OPTIMIZERS), ("adamw", 8), ("lion", 8)]:
    tx = make_optimizer(config(name, skip_spikes=4.0, state_bits=bits), STEPS, info)
    state = jax.eval_shape(tx.init, draw(0))
    state_where = jax.tree.map(place, state, state_axes(tx, draw(0), info))
    expected = run(tx, draw(0), [draw(1), draw(2)])

    params = jax.device_put(draw(0), where)
    state = jax.jit(tx.init, out_shardings=state_where)(params)
    whole = [
      jax.tree_util.keystr(path)
      for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
      if x.size >= 256 and x.is_fully_replicated and "k_proj" not in jax.tree_util.keystr(path)
    ]
    assert not whole, (name, whole)

    def one(grads, state, params, step, tx=tx):
      updates, state = tx.update(grads, state, params, step=step)
      return optax.apply_updates(params, updates), state

    one = jax.jit(one, out_shardings=(where, state_where), donate_argnums=(1, 2))
    for step, seed in enumerate((1, 2)):
      params, state = one(jax.device_put(draw(seed), where), state, params, step)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    jax.tree.map(close, (params, state), expected)


def test_state_is_sharded_like_the_parameters_and_steps_equal_one_device():
  environment = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
  code = "from tests.train.test_optim import sharded_equals_one_device as f; f()"
  root = Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert "rematerialization" not in done.stderr, done.stderr[-4000:]
