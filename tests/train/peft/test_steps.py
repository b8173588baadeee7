"""Training of a part: what is frozen stays, and only what is trained has state, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from model.errors import InputError
from model.heads import build
from model.layers import ParamInfo
from model.peft.attach import KEY, attached, together, with_dropout
from model.peft.create import adapter_maker
from model.sharding import make_mesh
from model.transformer import Inputs
from tests.train import tiny
from train.config import MeshConfig, OptimizerConfig, PeftConfig
from train.optim import make_optimizer
from train.program import build_program, put_batch
from train.report import parameter_lines

WIDE = dict(dtype="float64", param_dtype="float64")
PLAIN = dict(method="lora", rank=2, dtype="float64")
slow = pytest.mark.slow


def run(peft, *, model=tiny.ROTARY, devices=1, steps=3, optimizer="adamw", rows=8, **changes):
  """(the program, the state before, the state after, losses) of float64 steps."""
  with jax.enable_x64(True):
    settings = OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.05)
    config = tiny.config(
      dataclasses.replace(model, **WIDE), peft=PeftConfig(**peft), optimizer=settings, **changes
    )
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
      program = build_program(config, mesh)
      state = program.init()
      before, losses = jax.device_get(state), []
      for i in range(steps):
        batch = put_batch(program, tiny.random_batch(i, rows=rows))
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
      return program, before, jax.device_get(state), losses


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def near(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-9), a, b)


METHODS = {
  "lora": PLAIN,
  "dora": PLAIN | dict(method="dora"),
  "ia3": dict(method="ia3", dtype="float64"),
  "pissa": PLAIN | dict(init="pissa"),
  "orthogonal": PLAIN | dict(init="orthogonal", rslora=True),
  "some_layers": PLAIN | dict(targets=("layers.1.attn", "embed"), ranks=("embed=3",)),
  # Of ReLU's few units some may stay silent for a step.
  "houlsby": dict(method="houlsby", bottleneck=3, activation="silu", dtype="float64"),
  "parallel": dict(method="parallel", bottleneck=3, activation="gelu", dtype="float64"),
  "pfeiffer_layer": dict(method="pfeiffer", targets=("layers.1",), dtype="float64"),
  "freeze": dict(method="full", freeze=("embed", "layers.0")),
  "bitfit": dict(method="bitfit", also=("final_norm",)),
}


@pytest.mark.parametrize(
  "name", [n if n == "lora" else pytest.param(n, marks=slow) for n in METHODS]
)
def test_only_what_is_trained_changes_or_has_state(name):
  model = tiny.MODELS["learned_layer_norm"] if name == "bitfit" else tiny.ROTARY
  _, before, after, losses = run(METHODS[name], model=model)
  assert same(before.frozen, after.frozen)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
  # What is added to all keys of a query alike, as their bias is, has no effect.
  assert (any if name == "bitfit" else all)(jax.tree.leaves(changed))
  assert losses[-1] < losses[0] + 0.05
  trained = sum(leaf.size for leaf in jax.tree.leaves(after.params))
  moments = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
  assert moments == 2 * trained
  if name not in ("freeze", "bitfit"):
    assert all(KEY in path for path in flatten_dict(after.params))


@pytest.mark.parametrize(
  "name", ["dora", "pissa", "orthogonal", "ia3", "lora", "houlsby", "parallel"]
)
@pytest.mark.slow
def test_new_adapters_change_nothing(name):
  _, _, _, adapted = run(METHODS[name], steps=1)
  _, _, _, plain = run(dict(), steps=1)
  np.testing.assert_allclose(adapted, plain, rtol=0, atol=1e-9)


MESHES = {
  "mix": MeshConfig(data=2, fsdp=2, tensor=2),
  "seq_tensor": MeshConfig(data=1, seq=4, tensor=2),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "stage": MeshConfig(data=2, stage=2, fsdp=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "pissa", "houlsby", "parallel"])
def test_eight_devices_equal_one(name, mesh):
  model = tiny.ROTARY
  if mesh == "stage":
    model = dataclasses.replace(model, num_layers=4)
  _, _, want, want_losses = run(METHODS[name], model=model)
  _, _, got, losses = run(METHODS[name], model=model, devices=8, mesh=MESHES[mesh])
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near(got.params, want.params)
  near(got.opt_state, want.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "latent_grouped_experts"])
def test_adapters_of_experts_on_split_experts_equal_one_device(name):
  model = tiny.MODELS[name]
  _, _, want, want_losses = run(PLAIN, model=model)
  mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
  _, _, got, losses = run(PLAIN, model=model, devices=8, mesh=mesh)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near(got.params, want.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "houlsby", "parallel"])
@pytest.mark.parametrize(
  "changes",
  [dict(scan_layers=False), dict(remat="full"), dict(remat="dots"), dict(accumulation=4)],
)
def test_unrolled_rematerialized_and_accumulated_equal_plain(name, changes):
  own = {k: changes[k] for k in changes if k == "accumulation"}
  model = dataclasses.replace(tiny.ROTARY, **{k: v for k, v in changes.items() if k not in own})
  _, _, want, want_losses = run(METHODS[name])
  _, _, got, losses = run(METHODS[name], model=model, **own)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near(got.params, want.params)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon", "sgd"])
def test_every_optimizer_trains_adapters(optimizer):
  _, before, after, _ = run(PLAIN, optimizer=optimizer)
  b = lambda state: state.params["decoder"]["layers"][0]["attn"]["q_proj"][KEY]["b"]
  assert same(before.frozen, after.frozen) and not np.array_equal(b(before), b(after))


def test_lora_plus_moves_b_by_its_own_rate_and_not_that_of_tables():
  matrix, table = (
    ParamInfo(("embed", "rank"), "matrix", 1),
    ParamInfo(("vocab", "rank"), "matrix", 1),
  )
  info = {"q_proj": {KEY: {"a": matrix, "b": matrix}}, "embed": {KEY: {"a": table, "b": table}}}
  params = jax.tree.map(lambda _: jnp.ones((2, 3)), info)
  settings = OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=0.5)
  moved = {}
  for ratio in (None, 16.0):
    tx = make_optimizer(settings, 10, info, ratio=ratio)
    moved[ratio], _ = tx.update(params, tx.init(params), params, step=jnp.zeros((), jnp.int32))
  faster = jax.tree.map(lambda a, b: float((a / b)[0, 0]), moved[16.0], moved[None])
  assert faster == {"q_proj": {KEY: {"a": 1, "b": 16}}, "embed": {KEY: {"a": 1, "b": 1}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "houlsby", "parallel"])
def test_dropout_of_adapters_draws_anew_in_each_step_and_layer(name):
  _, _, plain, _ = run(METHODS[name])
  _, _, dropped, losses = run(METHODS[name] | dict(dropout=0.5))
  _, _, again, same_losses = run(METHODS[name] | dict(dropout=0.5))
  assert losses == same_losses and same(dropped.params, again.params)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain.params, dropped.params)
  assert all(most > 1e-6 for most in jax.tree.leaves(moved))


def test_dropout_of_adapters_is_the_same_for_split_texts_and_new_for_each_micro_batch():
  cfg = dataclasses.replace(tiny.ROTARY, num_layers=2, layer_pattern=("global",), window=None)
  net = build(cfg, nnx.Rngs(0))
  base, key = nnx.to_pure_dict(nnx.state(net, nnx.Param)), jax.random.key(1)
  own = adapter_maker(PeftConfig(method="lora", rank=2), cfg, net)(base, key)
  own = jax.tree.map(lambda a: a + 0.3, own)  # B begins as 0.
  graphdef, _ = nnx.split(attached(net, own), nnx.Param)
  pos = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))  # Two equal rows.

  def hidden(params):
    net = nnx.merge(graphdef, params)
    with_dropout(net, 0.5, key)
    return net.hidden(Inputs(pos, pos), key=key)[0]

  def on(**mesh):
    with jax.set_mesh(make_mesh(**mesh, devices=jax.devices()[:2])):
      return jax.jit(lambda params: hidden(params))(together(base, own))

  np.testing.assert_allclose(on(seq=2), jax.jit(hidden)(together(base, own)), atol=1e-5)
  first, second = on(stage=2)
  assert not np.allclose(first, second)


def test_the_report_tells_how_much_is_trained():
  config = tiny.config(tiny.ROTARY, peft=PeftConfig(method="lora", rank=2))
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    lines = parameter_lines(config, build_program(config, mesh))
  row = next(line.split() for line in lines if line.split()[0] == "trained")
  # Three layers of q (32), k and v (16), o (32), two up (32) and down (16), read and written.
  want = 3 * 2 * ((16 + 32) + 2 * (16 + 16) + (32 + 16) + 3 * (16 + 32))
  assert row[1] == f"{want:,}" and row[2] == f"{want / (want + 10_304 + 21):.1%}"


WRONG = {
  "method": (dict(method="lorra"), "peft.method='lorra' is not known"),
  "no_rank": (dict(method="lora", rank=0), "peft.rank=0 must be at least 1"),
  "no_effect": (dict(method="ia3", rank=4), "peft.rank=4 has no effect on peft.method='ia3'"),
  "freeze": (dict(method="lora", freeze=("embed",)), "peft.freeze=('embed',) has no effect"),
  "dropout": (dict(method="lora", dropout=1.0), "peft.dropout=1.0"),
  "alpha": (dict(method="lora", alpha=-1.0), "peft.alpha=-1.0 must be a positive number"),
  "pattern_number": (dict(method="lora", ranks=("attn",)), "'pattern=rank' with a positive rank"),
  "init": (dict(method="lora", init="zeros"), "peft.init='zeros' is not known"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(name):
  settings, message = WRONG[name]
  with pytest.raises(InputError) as error:
    PeftConfig(**settings)
  assert message in str(error.value) and "\n" not in str(error.value)


UNFITTING = {
  "target": (dict(method="lora", targets=("q_porj",)), "peft.targets has 'q_porj'"),
  "rank_pattern": (
    dict(method="lora", targets=("attn",), ranks=("mlp=2",)), "peft.ranks has 'mlp'"
  ),
  "layer_ranks": (dict(method="lora", ranks=("layers.0=2",)), "equal layers are one stack"),
  "table": (dict(method="dora", targets=("embed",)), "does not adapt a table of vectors"),
  "dropout": (dict(method="lora", targets=("embed",), dropout=0.1), "has no effect on tables"),
  "pissa": (dict(method="lora", rank=17, init="pissa"), "lower the rank"),
  "odd": (dict(method="lora", rank=3, init="orthogonal"), "needs an even rank"),
  "nothing": (dict(method="bitfit"), "trains none of the parameters"),
  "all_frozen": (dict(method="full", freeze=("*",)), "trains none of the parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFITTING)
def test_what_does_not_fit_the_model_is_named(name):
  settings, message = UNFITTING[name]
  model = dataclasses.replace(tiny.ROTARY, num_layers=4)
  config = tiny.config(model, peft=PeftConfig(**settings))
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(InputError) as error:
    build_program(config, mesh)
  assert message in str(error.value) and "\n" not in str(error.value)
