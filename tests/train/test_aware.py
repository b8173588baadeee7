"""Quantization-aware training learns what the quantized model is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model as models
from model import quant
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.quant import Format
from model.quant_tree import dequantize_params, quantize_params
from model.sharding import make_mesh
from model.trained import Model
from tests.train import run_config, tiny
from tests.train.test_run import Bench
from tests.train.test_sharding import text  # noqa: F401  (a fixture)
from tests.train.test_step import born, close, gradient, params_of, run
from train.aware import Rounding
from train.config import (
  DataConfig,
  MeshConfig,
  ObjectiveConfig,
  OptimizerConfig,
  PeftConfig,
  QuantizeConfig,
  checked,
)
from train.data.pipeline import load_data
from train.objectives.causal_lm import CausalLM
from train.program import build_program, make_loss, put_batch
from train.resolve import resolved
from train.workdir import check_workdir, write_config

slow = pytest.mark.slow
WIDE = dataclasses.replace(
  tiny.ROTARY, num_layers=2, d_model=64, d_ff=128, head_dim=16, layer_pattern=("global",),
  window=None,
)  # fmt: skip
FORMATS = ("int8", "int4", "int4:16", "nf4", "fp8", "int8_dynamic", "fp8_dynamic")
SGD = OptimizerConfig(
  name="sgd", b1=0.0, learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0,
  clip_norm=None,
)  # fmt: skip


def aware(format, model=WIDE, *, start_step=0, **changes):
  settings = QuantizeConfig(format=format, start_step=start_step)
  return tiny.config(model, quantize=settings, **changes)


def rounding_of(cfg, format) -> Rounding:
  return Rounding(Format.parse(format), param_info(abstract(cfg)))


def quantized(cfg, params, format):
  return quantize_params(params, param_info(abstract(cfg)), format)


def nats_of(cfg, params, batches):
  """Nats a token of a model over `batches`, without the code under test."""
  objective = CausalLM(ObjectiveConfig(), cfg, batches[0]["tokens"].shape[1])
  loss = jax.jit(make_loss(nnx.split(abstract(cfg), nnx.Param)[0], objective))
  sums = [loss(params, {}, batch, None).means["loss"] for batch in batches]
  total, weight = np.sum(np.asarray(sums), axis=0)
  return total / weight


@slow
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_trained_says_what_the_quantized_model_says(format):
  params, tokens = params_of(WIDE), jax.random.randint(jax.random.key(1), (2, 12), 0, tiny.VOCAB)
  rounding, net = rounding_of(WIDE, format), abstract(WIDE)
  rounding.mark(net, params)
  trained = Model(WIDE, rounding(params))
  trained.__dict__["graphdef"] = nnx.split(net, nnx.Param)[0]
  want = Model(WIDE, quantized(WIDE, params, format))(tokens)
  off = np.abs(np.asarray(trained(tokens) - want)).max(axis=-1)
  # An activation half way between two codes may fall either way, in few tokens.
  assert (off > 2e-5).mean() <= (0.1 if "dynamic" in format else 0) and off.max() < 1e-3
  assert np.median(np.abs(np.asarray(Model(WIDE, params)(tokens) - want)).max(axis=-1)) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_activations_are_what_is_multiplied_and_gradients_pass_straight_through(kind):
  x = jax.random.normal(jax.random.key(0), (3, 2, 8)) * jnp.array([1.0, 0.0, 9.0])[:, None, None]
  w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (2, 8, 5)), (2, (3, 5))))
  product = lambda x, w: jnp.sum(jnp.tensordot(quant.rounded(x, 2, kind), w, 2) * g)
  got = jax.grad(product, argnums=(0, 1))(x, w)
  most = 127 if kind == "int8" else 448
  scale = np.abs(x).max(axis=(1, 2), keepdims=True) / most
  parts = np.asarray(x) / np.where(scale == 0, 1, scale)
  small = np.round(parts) if kind == "int8" else parts.astype(jnp.float8_e4m3fn).astype(np.float32)
  close(got, (np.einsum("ro,dho->rdh", g, w), np.einsum("rdh,ro->dho", small * scale, g)), 1e-5)


def test_a_step_applies_the_gradient_at_the_quantized_parameters_to_the_float_ones():
  config, batch = aware("int4", optimizer=SGD), tiny.random_batch(0)
  params = params_of(WIDE)
  at = dequantize_params(quantized(WIDE, params, "int4"), jnp.float32)
  nats, weight, grads = gradient(WIDE, batch, at)
  state, losses = run(config, [batch])
  close(state.params, jax.tree.map(lambda p, g: p - g / weight, params, grads), 1e-5)
  assert losses == [pytest.approx(nats / weight, rel=1e-5)]


def same_in_float64(format, batches, one, other, devices):
  """Two runs are the same; in float32 what lies between two codes could fall either way."""
  wide = dict(dtype="float64", param_dtype="float64")
  config = lambda model, changes: aware(
    format, dataclasses.replace(WIDE, **wide, **model), optimizer=SGD, **changes
  )
  with jax.enable_x64(True):
    want, want_losses = run(config(*one), batches, 1)
    state, losses = run(config(*other), batches, devices)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-6)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
  jax.tree.map(near, state.params, want.params)


@slow
@pytest.mark.parametrize("format", ["int4", "int8_dynamic"])
def test_accumulation_loop_and_remat_change_nothing(format):
  batches = [tiny.random_batch(seed) for seed in range(2)]
  other = (dict(scan_layers=False, remat="full"), dict(accumulation=4))
  same_in_float64(format, batches, ({}, {}), other, 1)


# No group of inputs that share a scale lies on several devices: sums of its errors, and so the
# choice between two scales that are as good, hang on their order.
MESHES = {
  "data fsdp tensor": MeshConfig(data=2, fsdp=2, tensor=2),
  "fsdp": MeshConfig(data=4, fsdp=2),
  "tensor": MeshConfig(data=2, tensor=4),
  "seq": MeshConfig(data=2, seq=4),
  "stage": MeshConfig(data=2, stage=2, tensor=2),
}


CASES = [
  ("data fsdp tensor", "int4"),
  *(("data fsdp tensor", format) for format in ("nf4", "int8_dynamic")),
  *((mesh, "int4") for mesh in ("fsdp", "tensor", "seq", "stage")),
  ("stage", "int8_dynamic"),
]  # fmt: skip


@slow
@pytest.mark.parametrize(("mesh", "format"), CASES)
def test_eight_devices_equal_one_in_float64(mesh, format):
  model = dict(num_kv_heads=4, head_dim=32) if mesh == "tensor" else {}
  batches = [tiny.random_batch(seed) for seed in range(2)]
  same_in_float64(format, batches, (model, {}), (model, dict(mesh=MESHES[mesh])), 8)


@slow
@pytest.mark.parametrize("format", ["int4", "int8_dynamic"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_kind_of_model_learns_at_its_quantized_parameters(name, format):
  model, batch = tiny.MODELS[name], tiny.random_batch(3)
  state, losses = run(aware(format, model, optimizer=SGD), [batch])
  want = nats_of(model, quantized(model, params_of(model), format), [batch])
  assert losses == [pytest.approx(want, rel=1e-4)]
  changed = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, state.params, params_of(model))
  assert np.mean(jax.tree.leaves(changed)) > 0.7, "gradients reach the float parameters"


@slow
@pytest.mark.parametrize("format", ["int4", "int8_dynamic"])
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_models_with_an_encoder_learn_and_equal_one_device(text, shape, format):  # noqa: F811
  changes = dict(quantize=QuantizeConfig(format=format), optimizer=SGD)
  one = tiny.shape_config(shape, str(text / "text.txt"), str(text / "cache"), **changes)
  data = load_data(one)
  one, batches = resolved(one, data), [data.batch(step) for step in range(2)]
  _, want_losses = run(one, batches, 1)
  mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  _, losses = run(dataclasses.replace(one, mesh=mesh), batches, 8)
  np.testing.assert_allclose(losses, want_losses, rtol=1e-4)
  plain = dataclasses.replace(one, quantize=QuantizeConfig())
  assert abs(run(plain, batches, 1)[1][0] - want_losses[0]) > 1e-6


@slow
def test_steps_before_start_step_are_those_of_an_ordinary_run():
  batches = [tiny.random_batch(seed) for seed in range(4)]
  for format in ("int4", "int8_dynamic"):
    _, losses = run(aware(format, start_step=2), batches)
    _, plain = run(tiny.config(WIDE), batches)
    np.testing.assert_allclose(losses[:2], plain[:2], rtol=1e-6)
    assert np.abs(np.subtract(losses, plain))[2:].max() > 1e-5
    before, _ = run(tiny.config(WIDE), batches[:2])
    at = quantized(WIDE, before.params, format)
    assert losses[2] == pytest.approx(nats_of(WIDE, at, batches[2:3]), rel=1e-4)


def validation(config, params, batches):
  """Nats a token over `batches`, as a run's own validation has them."""
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    sums = [program.eval_step(params, {}, put_batch(program, b))["loss"] for b in batches]
    total, weight = np.sum(np.asarray(sums), axis=0)
  return total / weight


@slow
def test_training_for_it_loses_less_than_quantizing_afterwards():
  """Each token is a function of the one before; of large random matrices little was learned."""
  rng = np.random.default_rng(0)
  table = rng.permutation(tiny.VOCAB)

  def batch():
    docs = [[rng.integers(tiny.VOCAB)] for _ in range(16)]
    for doc in docs:
      while len(doc) < 17:
        doc.append(table[doc[-1]])
    return tiny.batch_of([tiny.row([np.array(doc, np.int32)], 16) for doc in docs])

  format = "int4:64"
  model = dataclasses.replace(WIDE, init_std=0.5, init_residual_scale=False)
  train, held = [batch() for _ in range(150)], [batch() for _ in range(8)]
  settings: dict = dict(
    batch_size=16, steps=150, optimizer=OptimizerConfig(learning_rate=0.003, warmup_steps=10)
  )
  ordinary, trained_for = tiny.config(model, **settings), aware(format, model, **settings)
  plain, _ = run(ordinary, train)
  learned, _ = run(trained_for, train)
  after = nats_of(model, quantized(model, plain.params, format), held)
  own = nats_of(model, quantized(model, learned.params, format), held)
  assert validation(trained_for, learned.params, held) == pytest.approx(own, rel=1e-3)
  assert validation(trained_for, plain.params, held) == pytest.approx(after, rel=1e-3)
  assert after > 2 * nats_of(model, plain.params, held)
  assert own < after / 2


def test_wrong_values_are_one_error_that_names_them():
  with pytest.raises(InputError, match=r"quantize\.format='int5' is not known"):
    QuantizeConfig(format="int5")
  with pytest.raises(InputError, match=r"quantize\.start_step=-1 must be at least 0"):
    QuantizeConfig(format="int4", start_step=-1)
  with pytest.raises(InputError, match=r"start_step=3 has no effect without quantize\.format"):
    QuantizeConfig(start_step=3)
  with pytest.raises(InputError, match=r"quantize\.start_step=50 is not below steps=50"):
    aware("int4", start_step=50)
  with pytest.raises(InputError, match=r"quantize\.format='int4' learns .* peft\.method='lora'"):
    aware("int4", peft=PeftConfig(method="lora"))
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(InputError, match="groups of 48 do not divide"):
    build_program(aware("int4:48"), mesh)
  config = aware("int4")
  setattr(config.quantize, "format", 3)  # noqa: B010
  with pytest.raises(InputError, match=r"quantize\.format=3 is a int"):
    checked(config)


def test_a_run_continues_with_the_same_format_only(tmp_path):
  config = checked(aware("int4"))
  write_config(tmp_path, config)
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  assert json.loads((tmp_path / "config.json").read_text())["quantize"]["format"] == "int4"
  check_workdir(tmp_path, config)
  with pytest.raises(InputError, match=r'quantize\.format: checkpoint "int4", config "nf4"'):
    check_workdir(tmp_path, aware("nf4"))


@slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
  from model.checkpoint import Checkpoints

  config, batches = aware("int4", start_step=1), [tiny.random_batch(seed) for seed in range(4)]
  want, _ = run(config, batches)
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state = born(config, program)
    for batch in batches[:2]:
      state, _ = program.train_step(state, put_batch(program, batch))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state, {"config": {}, "data": {}}, blocking=True)
    restored = checkpoints.restore_latest(program.state)
    assert restored is not None
    state = restored.state
    checkpoints.close()
    for batch in batches[2:]:
      state, _ = program.train_step(state, put_batch(program, batch))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state).params, want.params)


@slow
def test_the_command_trains_stores_continues_and_the_loaded_model_is_what_was_validated(tmp_path):
  bench, workdir = Bench(tmp_path), tmp_path / "run"
  form = ("--config.quantize.format=int4", "--config.quantize.start_step=2",
          "--config.checkpoint_every=6", "--config.ema_decay=None")  # fmt: skip
  status, _, said = bench.run(workdir, "--config.steps=6", *form)
  assert status == 0, said
  status, _, said = bench.run(workdir, "--config.steps=9", *form, devices=2)
  assert status == 0, said
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [*range(1, 10)]
  status, _, said = bench.run(workdir, "--config.steps=9", *form[1:])
  assert status == 2 and "quantize.start_step=2 has no effect without" in said
  status, _, said = bench.run(workdir, "--config.steps=9")
  assert status == 2 and 'quantize.format: checkpoint "int4", config null' in said

  m = models.load(workdir)
  assert {a.dtype for a in jax.tree.leaves(m.params)} == {np.dtype("float32")}
  saved = json.loads((workdir / "config.json").read_text())
  config = dataclasses.replace(
    run_config.get_config(), model=m.config, ema_decay=None,
    data=DataConfig(source=str(bench.text), tokenizer="bytes", documents="line",
                    validation_fraction=0.1),
    cache_dir=saved["cache_dir"],
  )  # fmt: skip
  held = list(load_data(config).validation_batches())
  quant_loss = nats_of(m.config, models.load(workdir, quantize="int4").params, held)
  last = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
  assert last == pytest.approx(quant_loss, rel=1e-4)
  assert abs(nats_of(m.config, m.params, held) - last) > 1e-5
