"""A pipeline over stages computes what one device computes, and holds a share of it."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.attention import Where
from model.config import ModelConfig
from model.errors import InputError
from model.heads import build
from model.pipeline import Plan, pipelined
from model.sharding import make_mesh
from tests.train import tiny
from tests.train.test_sharding import shape_run, text  # noqa: F401 (a fixture)
from tests.train.test_step import run
from train.config import MeshConfig, OptimizerConfig
from train.program import build_program

slow = pytest.mark.slow
EXACT = dict(dtype="float64", param_dtype="float64")
MESHES = {
  "stage2 fsdp2 tensor2": MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
  "stage2 data4": MeshConfig(data=4, stage=2),
  "stage4 data2": MeshConfig(data=2, stage=4),
  "stage4 tensor2": MeshConfig(data=1, stage=4, tensor=2),
  "stage4 fsdp2": MeshConfig(data=1, stage=4, fsdp=2),
  "stage8": MeshConfig(data=1, stage=8),
  "slices2 data4": MeshConfig(data=4, slices=2),
  "slices2 fsdp2 tensor2": MeshConfig(data=1, slices=2, fsdp=2, tensor=2),
  "slices2 stage2 fsdp2": MeshConfig(data=1, slices=2, stage=2, fsdp=2),
}


def deep(model: ModelConfig, mesh: MeshConfig, rounds: int = 1) -> ModelConfig:
  """The model with as many layers as the stages can share."""
  layers = len(model.layer_pattern) * (mesh.stage or 1) * rounds
  return dataclasses.replace(
    model, num_layers=max(layers, 2), layer_prefix=(), layer_sets=None, **EXACT
  )


def compared(model: ModelConfig, mesh: MeshConfig, *, steps=3, optimizer="adamw", rows=8, **only):
  """Runs `model` on one device, and with the settings `only` on eight; compares all of the state.

  The first moments of AdamW are the gradients of the steps, weighted.
  """
  settings = OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.01)
  batches = [tiny.random_batch(seed, rows=rows) for seed in range(steps)]
  shared = {k: only.pop(k) for k in ("accumulation", "ema_decay") if k in only}
  shared |= dict(optimizer=settings, batch_size=rows)
  piped = dataclasses.replace(model, **only)
  with jax.enable_x64(True):
    want, want_losses = run(tiny.config(model, **shared), batches)
    got, losses = run(tiny.config(piped, mesh=mesh, **shared), batches, 8)
  same(got, want, losses, want_losses)


def same(got, want, losses, want_losses):
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, got.params, want.params)
  jax.tree.map(near, got.opt_state, want.opt_state)
  jax.tree.map(near, got.ema, want.ema)


def test_stages_in_rounds_equal_one_device_in_float64():
  mesh = MESHES["stage2 fsdp2 tensor2"]
  compared(deep(tiny.ROTARY, mesh, 2), mesh, stage_rounds=2, micro_batches=4, ema_decay=0.9)


@slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device_in_float64(mesh):
  compared(deep(tiny.ROTARY, MESHES[mesh]), MESHES[mesh])


@slow
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_equals_one_device_in_float64(name, mesh):
  model = tiny.MODELS[name]
  if model.num_experts:  # Sums for the routers' losses are those of the whole batch.
    model = dataclasses.replace(model, balance_loss=0.1, router_z_loss=0.01)
  compared(deep(model, MESHES[mesh]), MESHES[mesh])


@slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon", "sgd"])
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2"])
def test_every_optimizer_equals_one_device_in_float64(optimizer, mesh):
  compared(deep(tiny.ROTARY, MESHES[mesh]), MESHES[mesh], optimizer=optimizer)


CHANGES = {
  "loop": dict(scan_layers=False),
  "remat": dict(remat="full"),
  "remat dots in rounds": dict(remat="dots", stage_rounds=2),
  "remat attention": dict(remat="attention"),
  "remat offload": dict(remat="offload"),
  "remat loop in rounds": dict(remat="full", scan_layers=False, stage_rounds=2),
  "rounds": dict(stage_rounds=2),
  "four rounds": dict(stage_rounds=4),
  "few": dict(micro_batches=2),
  "accumulation": dict(accumulation=2, rows=16),
}


@slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_equals_one_device_in_float64(change):
  mesh, only = MESHES["stage2 fsdp2 tensor2"], CHANGES[change]
  compared(deep(tiny.ROTARY, mesh, 4), mesh, **only)


SHAPE_CASES = [
  ("encoder_decoder", "stage2 fsdp2 tensor2", 1), ("encoder_decoder", "stage4 data2", 1),
  ("encoder_decoder", "stage2 data4", 2), ("encoder", "stage2 fsdp2 tensor2", 1),
  ("encoder", "stage4 data2", 1), ("encoder", "slices2 stage2 fsdp2", 2),
]  # fmt: skip


@slow
@pytest.mark.parametrize(("shape", "mesh", "rounds"), SHAPE_CASES)
def test_shapes_with_an_encoder_equal_one_device_in_float64(text, shape, mesh, rounds):  # noqa: F811
  layers = MESHES[mesh].stage * rounds
  shared = dict(num_layers=layers, layer_sets=None, batch_size=8, **EXACT)
  if shape == "encoder_decoder":
    shared["num_decoder_layers"] = 2 * layers
  with jax.enable_x64(True):
    want, want_losses = shape_run(text, shape, 1, 3, **shared)
    got, losses = shape_run(
      text, shape, 8, 3, mesh=MESHES[mesh], stage_rounds=rounds, **shared
    )  # fmt: skip
  same(got, want, losses, want_losses)


@slow
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2", "slices2 stage2 fsdp2"])
def test_twenty_losses_in_float32_equal_those_of_one_device(mesh):
  batches = [tiny.random_batch(seed) for seed in range(20)]
  settings = OptimizerConfig(warmup_steps=1, learning_rate=1e-3)
  model = dataclasses.replace(
    deep(tiny.ROTARY, MESHES[mesh]), dtype="float32", param_dtype="float32"
  )
  want = run(tiny.config(model, optimizer=settings), batches)[1]
  got = run(tiny.config(model, optimizer=settings, mesh=MESHES[mesh]), batches, 8)[1]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


PLANS = [Plan(2, 1, 2), Plan(4, 2, 4), Plan(4, 2, 12)]
MORE_PLANS = [Plan(2, 3, 4), Plan(4, 1, 8), Plan(4, 6, 4), Plan(8, 2, 8), Plan(8, 3, 8)]


@pytest.mark.parametrize(
  "plan", [*PLANS, *(pytest.param(plan, marks=slow) for plan in MORE_PLANS)], ids=str
)
def test_each_micro_batch_goes_through_all_layers_in_order_once(plan):
  mesh = make_mesh(stage=plan.stages, data=8 // plan.stages)
  rows, depth = 2 * plan.parts * 8 // plan.stages, 3 * plan.stages * plan.rounds
  x = jnp.arange(rows * 2.0).reshape(rows, 2, 1)

  def stage(layers, x, where, turn, part):
    layers = layers[:, turn]
    step = lambda x, layer: ((3.0 * x + layer) % 101.0, jnp.sum(x))
    x, sums = jax.lax.scan(step, x, layers)
    return x + 0 * where[..., None], (sums, jnp.ones_like(layers) * 2.0**part)

  layers = jnp.arange(1.0, depth + 1)
  with jax.set_mesh(mesh):
    got, (sums, parts) = jax.jit(functools.partial(pipelined, stage, plan=plan))(
      layers, x, x[..., 0]
    )
  want = []
  for layer in layers:
    want.append(jnp.sum(x))
    x = (3.0 * x + layer) % 101.0
  np.testing.assert_allclose(got, x, rtol=1e-5)
  np.testing.assert_allclose(sums, jnp.stack(want), rtol=1e-5)
  np.testing.assert_array_equal(parts, 2.0**plan.parts - 1)  # Each layer: every part once.


@slow
def test_micro_batches_and_layers_have_random_numbers_of_their_own():
  cfg = dataclasses.replace(
    tiny.ROTARY, dropout=0.5, num_layers=8, layer_pattern=("global",), window=None
  )
  graphdef, params = nnx.split(build(cfg, nnx.Rngs(0)), nnx.Param)
  tokens = jnp.ones((8, 6), jnp.int32)
  pos = jnp.broadcast_to(jnp.arange(6), tokens.shape)

  @jax.jit
  def hidden(params, x, key):
    stack = nnx.merge(graphdef, params).decoder
    return stack._run_stacked(x, stack._derived(Where(pos, None), cached=False), None, key)[0]

  x = jax.random.normal(jax.random.key(1), (1, 6, cfg.d_model))
  x = jnp.broadcast_to(x, (8, *x.shape[1:]))
  with jax.set_mesh(make_mesh(stage=4, data=2)):
    once, again = (hidden(params, x, jax.random.key(2)) for _ in range(2))
    other, plain = hidden(params, x, jax.random.key(3)), hidden(params, x, None)
  np.testing.assert_array_equal(once, again)
  assert not np.allclose(once, other) and np.allclose(plain, plain[:1])
  for a in range(8):
    for b in range(a):
      assert not np.allclose(once[a], once[b]), f"rows {a} and {b} lost the same elements"


def wide(mesh: MeshConfig, **changes):
  """A program, and its step before it is compiled."""
  sizes = dict(num_layers=8, d_model=24, d_ff=40, vocab_size=520, layer_pattern=("global",))
  model = dataclasses.replace(tiny.ROTARY, window=None, **{**sizes, **changes})
  grid = make_mesh(**dataclasses.asdict(mesh))
  with jax.set_mesh(grid):
    program = build_program(tiny.config(model, mesh=mesh), grid)
    return program, program._train.lower(program.state, program.batch)


@slow
@pytest.mark.parametrize("rounds", [1, 2], ids=lambda n: f"{n} rounds")
def test_no_device_holds_layers_of_other_stages_or_scores_their_rows(rounds):
  program, lowered = wide(MESHES["stage2 data4"], stage_rounds=rounds)
  step = lowered.compile()
  state = (program.state.params, program.state.opt_state)
  written, shard = step.as_text(), lambda a: a.sharding.shard_shape(a.shape)
  layers = [a for a in jax.tree.leaves(state) if a.ndim > 1 and a.shape[0] == 8]
  assert len(layers) == 27 and all(shard(a) == (4, *a.shape[1:]) for a in layers)
  for a in layers:
    for stacked in ((8,), (2, 4), (rounds, 2, 4 // rounds), (2, rounds, 4 // rounds)):
      shape = ",".join(map(str, (*stacked, *a.shape[1:])))
      assert not re.search(rf"\[{shape}\]", written), f"all layers of {shape}"
  held = sum(np.prod(shard(a), dtype=int) * a.dtype.itemsize for a in jax.tree.leaves(state))
  assert held <= step.memory_analysis().argument_size_in_bytes < 1.05 * held + 4096
  assert re.search(r"f32\[(1,16|16),520\]", written), "each device scores one of eight rows"
  assert not re.search(r"f32\[(2,16|32|8,16|128),520\]", written)


@slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_remat_keeps_of_each_tick_what_it_says(rounds):
  ticks = Plan(2, rounds, 2).ticks

  def kept(remat, *shape):
    written = wide(MESHES["stage2 data4"], remat=remat, stage_rounds=rounds)[1].as_text()
    return re.search(rf"tensor<{ticks}x(\d+x)+{'x'.join(map(str, shape))}xf32>", written)

  hidden, weights = (16, 40), (24, 40)
  assert kept("none", *hidden) and kept("dots", *hidden) and not kept("full", *hidden)
  assert not kept("dots", *weights) and not kept("full", *weights)


@slow
def test_a_run_goes_on_with_other_axes_and_comes_back(tmp_path):
  from model.checkpoint import Checkpoints
  from tests.train.test_step import born
  from train.program import put_batch

  model, batches = (
    deep(tiny.ROTARY, MESHES["stage4 data2"]),
    [tiny.random_batch(s) for s in range(6)],
  )

  def continued(mesh, steps, **only):
    config = tiny.config(dataclasses.replace(model, **only), mesh=mesh, ema_decay=0.9)
    grid = make_mesh(**dataclasses.asdict(mesh))
    checkpoints = Checkpoints(tmp_path, keep=2)
    with jax.set_mesh(grid):
      program = build_program(config, grid)
      found = checkpoints.restore_latest(program.state)
      state = born(config, program) if found is None else found.state
      losses = []
      for i in steps:
        state, metrics = program.train_step(state, put_batch(program, batches[i]))
        losses.append(float(metrics["loss"]))
      checkpoints.save(steps[-1] + 1, state, {})
      checkpoints.close()
    return jax.device_get(state), losses

  with jax.enable_x64(True):
    want, want_losses = run(tiny.config(model, ema_decay=0.9), batches)
    losses = continued(MESHES["stage4 data2"], (0, 1))[1]
    losses += continued(MeshConfig(data=1, fsdp=8), (2, 3))[1]
    got, last = continued(MESHES["stage2 fsdp2 tensor2"], (4, 5), stage_rounds=2)
  same(got, want, losses + last, want_losses)


@slow
def test_a_run_on_stages_evaluates_samples_and_goes_on_without(tmp_path):
  from tests.train.test_run import Bench

  bench = Bench(tmp_path)
  stages = ("--config.mesh.stage=2", "--config.mesh.fsdp=2", "--config.model.micro_batches=2")
  status, out, err = bench.run(tmp_path / "run", "--config.steps=10", *stages, devices=4)
  assert status == 0 and out.strip(), err
  assert "2 stages, 2 micro-batches, 3 ticks, of which a stage is idle 33%" in err
  status, out, err = bench.run(tmp_path / "run", "--config.steps=12", devices=2)
  assert status == 0 and "10 of 12 done" in err and out.strip(), err


@slow
def test_what_stages_hold_generates_what_one_device_does():
  import infer
  from model.trained import Model

  cfg = dataclasses.replace(
    deep(tiny.ROTARY, MESHES["stage4 data2"]), **dict.fromkeys(EXACT, "float32")
  )
  mesh = MESHES["stage4 data2"]
  grid = make_mesh(**dataclasses.asdict(mesh))
  alone = jax.device_get(run(tiny.config(cfg), [tiny.random_batch(0)])[0].params)
  with jax.set_mesh(grid):
    program = build_program(tiny.config(cfg, mesh=mesh), grid)
    split = jax.device_put(alone, jax.tree.map(lambda a: a.sharding, program.state.params))
    there = infer.generate(Model(cfg, split), [[1, 2, 3], [4, 5]], max_new_tokens=8)
    scores = Model(cfg, split)(np.asarray([[1, 2, 3]]))
  here = infer.generate(Model(cfg, alone), [[1, 2, 3], [4, 5]], max_new_tokens=8)
  assert [c.tokens for c in there] == [c.tokens for c in here]
  np.testing.assert_allclose(scores, Model(cfg, alone)(np.asarray([[1, 2, 3]])), atol=1e-5)


REFUSED = [
  (MeshConfig(), dict(micro_batches=4), {}, "micro_batches=4 has no effect with mesh.stage=1"),
  (MeshConfig(), dict(stage_rounds=2), {}, "stage_rounds=2 has no effect with mesh.stage=1"),
  (MESHES["stage2 data4"], dict(num_layers=6), {}, "6 layers, .*3 repeats of 2 layers.*stage=2"),
  (MESHES["stage2 data4"], dict(num_layers=4, stage_rounds=2), {}, "stage=2 x model.stage_r"),
  (MESHES["stage2 data4"], dict(num_layers=5), {}, "1 repeat of 1 layer,.*layer_prefix"),
  (MESHES["stage2 data4"], dict(num_layers=5, layer_prefix=("global",)), {}, "layer_prefix"),
  (MESHES["stage2 data4"],
   dict(num_layers=4, layer_sets=2, layer_pattern=("global",), window=None), {}, "layer_sets=2"),
  (MESHES["stage2 data4"], dict(num_layers=4, micro_batches=3), {}, "micro_batches=3 is not a mul"),
  (MESHES["stage2 data4"], dict(num_layers=4, micro_batches=4), {}, "leaves 2 to each .*data=4"),
  (MESHES["stage4 data2"], dict(num_layers=8), dict(batch_size=4), "mesh.stage=4 micro-batches"),
  (MESHES["stage2 data4"], dict(num_layers=4), dict(accumulation=2), "of 4 sequences leaves 1"),
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "model", "settings", "said"), REFUSED)
def test_what_stages_cannot_share_is_refused(mesh, model, settings, said):
  config = tiny.config(dataclasses.replace(tiny.ROTARY, **model), mesh=mesh, **settings)
  with pytest.raises(InputError, match=said):
    run(config, [], 8)


def test_numbers_that_are_none_are_refused():
  for name in ("micro_batches", "stage_rounds"):
    with pytest.raises(InputError, match=f"model.{name}=0 must be"):
      ModelConfig(**{name: 0})


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a TPU says of itself."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def test_slices_are_the_outermost_axis_and_neighbours_are_near():
  chips = [Chip(2 * i + s, s, (i % 4, i // 4, 0)) for i in range(16) for s in (1, 0)]
  grid = make_mesh(slices=2, fsdp=4, tensor=4, devices=chips).devices.reshape(2, 4, 4)
  assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
  for rows in grid.reshape(8, 4):
    for a, b in itertools.pairwise(rows):
      assert sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1
  for slices, devices, said in ((1, chips, "lie in 2 slices: set mesh.slices=2"),
                                (2, chips[1::2], "lie in 1 slice: set mesh.slices=1")):  # fmt: skip
    with pytest.raises(InputError, match=said):
      make_mesh(slices=slices, data=None, devices=devices)
    make_mesh(slices=3 - slices, data=None, devices=devices)


@slow
@pytest.mark.parametrize(
  ("axes", "mixed"),
  [(dict(slices=2, fsdp=4), "send"), (dict(slices=2, stage=2, tensor=2), "collective-permute")],
)
def test_the_step_is_compiled_for_real_slices(axes, mixed):
  libtpu = pytest.importorskip("libtpu", reason="needs the extra [tpu]")
  if not hasattr(libtpu, "get_library_path"):
    pytest.skip("needs the extra [tpu]")
  from jax.experimental import topologies

  described = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2)
  grid = make_mesh(**axes, devices=list(described.devices))
  mesh = MeshConfig(**{"data": 1, **axes})
  model = dataclasses.replace(tiny.ROTARY, num_layers=4, dtype="bfloat16")
  with jax.set_mesh(grid):
    text = build_program(tiny.config(model, mesh=mesh), grid).train_step.as_text()
  assert "_xla_megascale" in text or "megascale" in text, "something crosses the network"
  assert re.search(rf" {mixed}(-start)?\(", text)
