"""QLoRA: gradients through a base in fewer bits, which stays as it is, from disk to disk."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import model
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.peft.attach import KEY, apart
from model.peft.merge import merge
from model.quant_tree import dequantize_params, quantized_leaves, resident_bytes
from model.sharding import make_mesh
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests.train import tiny
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig, PeftConfig
from train.data.pipeline import load_data
from train.loop import train
from train.objectives import make_objective
from train.program import build_program, make_loss, put_batch
from train.resolve import resolved

WIDE = dataclasses.replace(
  tiny.ROTARY, num_layers=2, d_model=64, d_ff=128, head_dim=16, layer_pattern=("global",),
  window=None,
)  # fmt: skip
MODELS = {
  "plain": WIDE,
  "deep": dataclasses.replace(WIDE, num_layers=4),
  "experts": dataclasses.replace(
    WIDE, layer_pattern=("global+experts",), num_experts=4, balance_loss=0.0, router_z_loss=0.0,
    shared_experts=1,
  ),
  "latent": dataclasses.replace(
    tiny.MODELS["latent_grouped_experts"], d_model=64, d_ff=128, kv_latent_dim=64, v_head_dim=16
  ),
}  # fmt: skip
LORA = dict(method="lora", rank=2)
MIX = MeshConfig(data=2, fsdp=2, tensor=2)
slow = pytest.mark.slow


def started(peft, body="plain", mesh=None, **changes):
  """(config, program, mesh in use, the first state with an adapter that does something)."""
  settings = OptimizerConfig(warmup_steps=1, learning_rate=0.05)
  more = {} if mesh is None else dict(mesh=mesh)
  config = tiny.config(MODELS[body], peft=PeftConfig(**peft), optimizer=settings, **changes, **more)
  return config, *begun(config, 1 if mesh is None else 8)


def begun(config, devices):
  """(program, mesh in use, the first state with an adapter that does something)."""
  grid = make_mesh(**dataclasses.asdict(config.mesh), devices=jax.devices()[:devices])
  with jax.set_mesh(grid):
    program = build_program(config, grid)
    state = program.init()
    noise = lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape, a.dtype)
    moved = jax.jit(lambda tree: jax.tree.map(noise, tree))(state.params)
  return program, grid, dataclasses.replace(state, params=moved)


CASES = [
  (LORA, "nf4", "plain", None),
  (LORA, "nf4", "plain", MIX), (LORA, "int4", "plain", MIX), (LORA, "int8", "plain", MIX),
  (LORA, "int8", "plain", None), (LORA, "fp8", "plain", None), (LORA, "int4", "plain", None),
  (LORA, "int4", "plain", MeshConfig(data=8)),
  (LORA, "nf4", "plain", MeshConfig(data=1, fsdp=8)),
  (LORA, "nf4", "plain", MeshConfig(data=1, seq=4, tensor=2)),
  (LORA, "nf4", "deep", MeshConfig(data=2, slices=2, stage=2)),
  (LORA, "int8", "deep", MeshConfig(data=1, fsdp=2, stage=2, tensor=2)),
  (LORA, "int4", "experts", None), (LORA, "int8", "latent", None),
  (LORA, "int8", "experts", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
  (LORA, "nf4", "experts", MeshConfig(data=1, slices=2, expert=4)),
  (LORA | dict(method="dora"), "nf4", "plain", MIX), (dict(method="ia3"), "int4", "plain", MIX),
  (LORA | dict(init="pissa"), "nf4", "plain", None),
]  # fmt: skip


@slow
@pytest.mark.parametrize(("peft", "name", "body", "mesh"), CASES)
def test_gradients_are_those_through_the_dequantized_base(peft, name, body, mesh):
  config, program, grid, state = started(peft | dict(base_format=name), body, mesh)
  with jax.set_mesh(grid):
    batch = put_batch(program, tiny.random_batch(0))
  assert_right_gradients(config, program, grid, state, batch)


def assert_right_gradients(config, program, grid, state, batch):
  """Loss and gradients of adapters are those through the dequantized float base."""
  loss = make_loss(program.graphdef, make_objective(config), program.parts)

  def total(params, frozen, batch):
    return loss(params, frozen, batch, None).terms["loss"]

  formats = {w.format.name for w in quantized_leaves(state.frozen).values()}
  assert config.peft.base_format in formats
  with jax.set_mesh(grid):
    gradient = jax.jit(jax.value_and_grad(total))
    value, got = gradient(state.params, state.frozen, batch)
    plain = dequantize_params(state.frozen, jnp.float32)
    want_value, want = gradient(state.params, plain, batch)
  np.testing.assert_allclose(value, want_value, rtol=1e-5)
  most = max(np.abs(a).max() for a in jax.tree.leaves(want))
  assert most > 1e-2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * most), got, want)


@slow
@pytest.mark.parametrize(("shape", "name", "mesh"), [
  ("encoder", "nf4", MIX), ("encoder", "int8", None), ("encoder", "int4", MeshConfig(fsdp=4)),
  ("encoder_decoder", "nf4", MIX), ("encoder_decoder", "int4", None),
  ("encoder_decoder", "int8", MeshConfig(data=4, tensor=2)),
])  # fmt: skip
def test_models_with_an_encoder_learn_over_a_packed_base(tmp_path, shape, name, mesh):
  rng, words = np.random.default_rng(0), ["def", "return", "self", "in", "(x)", "= 1"]
  lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(200)]
  (tmp_path / "text.txt").write_text("\n".join(lines))
  config = tiny.shape_config(
    shape, str(tmp_path / "text.txt"), str(tmp_path / "cache"), d_model=64, d_ff=128,
    peft=PeftConfig(**LORA, base_format=name, also=()), mesh=mesh or MeshConfig(),
  )  # fmt: skip
  data = load_data(config)
  config = resolved(config, data)
  program, grid, state = begun(config, 1 if mesh is None else 8)
  with jax.set_mesh(grid):
    batch = put_batch(program, data.batch(0))
    assert_right_gradients(config, program, grid, state, batch)
    before = jax.device_get(state)
    after = jax.device_get(program.train_step(state, batch)[0])
  assert_frozen(before, after)


def assert_frozen(before, after):
  same = jax.tree.map(np.array_equal, before.frozen, after.frozen)
  assert all(jax.tree.leaves(same))
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("body", ["plain", "experts"])
@pytest.mark.parametrize(("name", "bits"), [("nf4", 4), ("int4", 4), ("int8", 8)])
def test_a_state_has_moments_of_adapters_alone_and_matrices_of_few_bits(name, bits, body):
  config = tiny.config(MODELS[body], peft=PeftConfig(**LORA, base_format=name))
  grid = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(grid):
    state = build_program(config, grid).state
  size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
  trained = flatten_dict(state.params)
  assert all(KEY in path and a.dtype == jnp.float32 for path, a in trained.items())
  assert size([a for a in jax.tree.leaves(state.opt_state) if a.ndim]) == 2 * size(state.params)
  packed = quantized_leaves(state.frozen)
  matrices = {path: w for path, w in packed.items() if "table" not in path}
  assert {path[-2] for path in matrices} >= {"q_proj", "o_proj", "up_proj", "down_proj"}
  for w in matrices.values():
    assert w.format.name == name and w.values.size * w.values.dtype.itemsize == w.size * bits // 8
    assert w.nbytes <= w.size * bits // 8 * {"nf4": 1.05, "int4": 1.125, "int8": 1.1}[name]
  floats = [a for p, a in flatten_dict(state.frozen).items() if p not in packed]
  assert size(floats) < 0.05 * 4 * sum(w.size for w in packed.values())


def steps(peft, mesh=None, **changes):
  _, program, grid, state = started(peft, mesh=mesh, **changes)
  before, losses = jax.device_get(state), []
  with jax.set_mesh(grid):
    for i in range(3):
      state, metrics = program.train_step(state, put_batch(program, tiny.random_batch(i)))
      losses.append(float(metrics["loss"]))
  return before, jax.device_get(state), losses


@slow
@pytest.mark.parametrize(("name", "mesh"), [
  ("nf4", MIX), ("int4", MeshConfig(data=2, stage=2, fsdp=2)),
  ("int8", MeshConfig(data=1, slices=2, seq=2, tensor=2)),
])  # fmt: skip
def test_the_base_keeps_its_bits_on_eight_devices_as_on_one_and_has_no_state(name, mesh):
  peft = LORA | dict(base_format=name)
  before, after, losses = steps(peft, body="deep")
  _, other, other_losses = steps(peft, mesh=mesh, body="deep")
  assert_frozen(before, after)
  assert len(set(losses)) == 3
  np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), other.params, after.params)


BODY = ModelConfig(
  vocab_size=259, vocab_multiple=8, num_layers=2, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2,
  max_positions=64,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


@slow
@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_a_run_begins_from_float_goes_on_and_is_loaded_over_the_base_that_it_saw(tmp_path, format):
  tokenizer = build_tokenizer("bytes", None, [])
  body = dataclasses.replace(BODY, vocab_size=tokenizer.vocab_size)
  base = Model(body, init_params(body, jax.random.key(5)), tokenizer)
  model.save(base, tmp_path / "base", format=format)
  (tmp_path / "text.txt").write_text("\n".join(f"{i} is {i * 7} is {i * 3}" for i in range(300)))
  told = {} if format == "orbax" else dict(vocab_multiple=128)
  config = Config(
    steps=4, batch_size=4, seq_len=32, checkpoint_every=2, eval_every=4, keep_checkpoints=4,
    init_from=str(tmp_path / "base"), cache_dir=str(tmp_path / "cache"),
    model=dataclasses.replace(BODY, vocab_size=None, **told), mesh=MIX,
    data=DataConfig(source=str(tmp_path / "text.txt"), documents="line"),
    optimizer=OptimizerConfig(warmup_steps=1, learning_rate=0.03),
    peft=PeftConfig(**LORA, alpha=4.0, base_format="nf4"),
  )  # fmt: skip
  assert train(config, tmp_path / "run") == 0
  shutil.copytree(tmp_path / "run", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
  assert train(config, tmp_path / "again") == 0
  m, again = model.load(tmp_path / "run"), model.load(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, m.params, again.params)
  kept = model.load(tmp_path / "base", quantize="nf4")
  jax.tree.map(np.testing.assert_array_equal, apart(m.params)[0], kept.params)
  assert np.abs(m(TOKENS) - kept(TOKENS)).max() > 1e-3
  packed, lost = merge(m)
  assert lost is not None and lost.format == "nf4" and 0 < lost.mean <= lost.largest[1]
  assert quantized_leaves(packed.params).keys() == quantized_leaves(kept.params).keys()
  over_floats = model.load(tmp_path / "base", adapter=tmp_path / "run")
  assert not quantized_leaves(over_floats.params)
  np.testing.assert_allclose(over_floats.merged()(TOKENS), over_floats(TOKENS), atol=1e-4)
  rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert any("validation_loss" in row for row in rows)
  folder = tmp_path / "run" / "checkpoints" / "4"
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  adapter = resident_bytes(
    {".".join(map(str, p)): a for p, a in flatten_dict(m.params).items() if KEY in p}
  )
  assert size < 3 * adapter + 200_000


def test_matrices_of_which_some_layers_are_trained_stay_in_float_and_are_loaded_so(tmp_path):
  tokenizer = build_tokenizer("bytes", None, [])
  body = dataclasses.replace(BODY, vocab_size=tokenizer.vocab_size)
  model.save(Model(body, init_params(body, jax.random.key(5)), tokenizer), tmp_path / "base")
  (tmp_path / "text.txt").write_text("\n".join(f"{i} is {i * 7}" for i in range(100)))
  also = "decoder.layers.1.mlp.up_proj"
  config = Config(
    steps=1, batch_size=4, seq_len=16, checkpoint_every=1, init_from=str(tmp_path / "base"),
    cache_dir=str(tmp_path / "cache"), mesh=MIX,
    data=DataConfig(source=str(tmp_path / "text.txt"), documents="line"),
    optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.03),
    peft=PeftConfig(**LORA, base_format="int8", targets=("q_proj",), also=(also,)),
  )  # fmt: skip
  assert train(config, tmp_path / "run") == 0
  shutil.copytree(tmp_path / "base", tmp_path / "moved")
  base, m = model.load(tmp_path / "base"), model.load(tmp_path / "run", base=tmp_path / "moved")
  assert m.adapted is not None and m.adapted.base == str(tmp_path / "moved" / "checkpoints" / "0")
  plain = model.load(tmp_path / "base", adapter=tmp_path / "run")
  up = lambda one, name="up_proj": one.params["decoder"]["layers"][0]["mlp"][name]["w"]
  np.testing.assert_array_equal(up(m), up(plain))
  np.testing.assert_array_equal(up(m)[0], up(base)[0])
  assert np.abs(up(m)[1] - up(base)[1]).max() > 1e-3
  assert ("decoder", "layers", 0, "mlp", "down_proj", "w") in quantized_leaves(m.params)
  assert m(TOKENS).shape == plain(TOKENS).shape


def test_formats_that_let_no_gradient_through_or_are_not_known_are_refused():
  cases = {
    "peft.base_format='int3' is not known": dict(method="lora", base_format="int3"),
    "peft.base_format='int8_dynamic' rounds": dict(method="lora", base_format="int8_dynamic"),
    "peft.base_format='nf4' has no effect": dict(method="bitfit", base_format="nf4"),
  }
  for words, settings in cases.items():
    with pytest.raises(InputError) as error:
      PeftConfig(**settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_group_that_does_not_divide_is_told_by_the_setting_that_asked_for_it():
  with pytest.raises(InputError, match=r"^peft\.base_format='int4:48': groups of 48 do not divide"):
    started(LORA | dict(base_format="int4:48"))
