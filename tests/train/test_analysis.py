"""What is read from compiled programs is what they were written to do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ModelConfig
from model.errors import Stop
from model.sharding import make_mesh
from tests.train import tiny
from train import loop
from train.analysis import hlo
from train.analysis.attempt import attempt
from train.analysis.collectives import axis_name, collectives, device_groups
from train.analysis.exhausted import explained
from train.analysis.loops import runs
from train.analysis.memory import state_bytes
from train.analysis.model_work import model_flops
from train.analysis.report import allocations
from train.analysis.variants import parts_of
from train.analysis.work import instruction_flops, work
from train.config import DataConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, PeftConfig
from train.program import build_program

DENSE = ModelConfig(
  vocab_size=64, vocab_multiple=64, num_layers=2, d_model=32, d_ff=64, num_heads=4, head_dim=8,
  max_positions=16, tie_embeddings=False, shape="decoder",
)  # fmt: skip


def instruction(text: str) -> hlo.Instruction:
  """One instruction in a program of its own."""
  module = hlo.parse(f"HloModule m\n\nENTRY %e (p: f32[]) -> f32[] {{\n  ROOT {text}\n}}\n")
  return module.computations["e"].root


@functools.cache
def report(
  layers: int = 2, *, scan: bool = True, remat: str = "none", mesh=(1, 1, 1), rows=8, **peft
):
  data, fsdp, tensor = mesh
  model = dataclasses.replace(DENSE, num_layers=layers, scan_layers=scan, remat=remat)
  config = tiny.config(
    model, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor), batch_size=rows, seq_len=16,
    peft=PeftConfig(**peft),
  )  # fmt: skip
  return attempt(config, jax.devices()[: data * fsdp * tensor], None)


def test_flops_are_affine_in_layers_the_same_unrolled_and_those_of_a_hand_count():
  two, four, eight = (report(n).done.flops for n in (2, 4, 8))
  assert four - two == (eight - four) / 2
  assert report(4, scan=False).done.flops == four
  rows, length, width, hidden, vocab = 8, 16, 32, 64, 64
  tokens = rows * length
  layer = 4 * width * width + 3 * width * hidden  # Four of attention, three of a gated MLP.
  scores = 2 * tokens * length * width  # Queries and keys, weights and values; nothing is skipped.
  head = width * vocab
  assert four == 6 * tokens * (4 * layer + head) + 3 * 2 * 4 * scores
  assert report(4).done.remat_flops == 0


@pytest.mark.slow
def test_remat_is_told_apart_and_sharded_programs_do_the_same_work():
  plain, full = report(4).done, report(4, remat="full").done
  assert full.remat_flops == full.flops - plain.flops > 0
  split = report(4, mesh=(2, 2, 2))
  assert split.done.flops * split.devices == plain.flops


def test_model_flops_are_six_per_parameter_and_token_and_the_pairs_that_are_seen():
  config = tiny.config(DENSE, batch_size=8, seq_len=16)
  weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 64
  pairs = 8 * 16 * 17 / 2
  assert model_flops(config) == 6 * 8 * 16 * weights + 3 * 2 * (2 * 2 * pairs * 32)


@pytest.mark.parametrize("peft", [
  dict(method="lora", rank=2, alpha=2.0, targets=("attn", "mlp", "head")),
  dict(method="full", targets=("attn", "head")),
  pytest.param(dict(method="pfeiffer", bottleneck=4), marks=pytest.mark.slow),
])  # fmt: skip
def test_model_flops_of_a_part_that_is_trained_are_what_its_program_saves(peft):
  whole, part = report(), report(**peft)
  # The compiled attention computes pairs that are masked too, the same ones in both.
  assert whole.done.flops - part.done.flops == whole.model_flops_total - part.model_flops_total > 0


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_bytes_of_state_are_those_of_the_arrays_that_training_holds(optimizer):
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  config = tiny.config(
    mesh=mesh_config, ema_decay=0.9, optimizer=OptimizerConfig(name=optimizer, warmup_steps=1)
  )
  mesh = make_mesh(**dataclasses.asdict(mesh_config))
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    made, state = state_bytes(program), program.init()
  held = lambda tree: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))
  assert (made.parameters, made.optimizer) == (held(state.params), held(state.opt_state))
  assert made.average == held(state.ema) == made.parameters


MESH = dict(slices=1, stage=1, data=2, fsdp=2, expert=1, seq=1, tensor=2)


def test_collectives_of_a_known_program_are_counted_with_nested_loops_and_axes():
  mesh = make_mesh(**MESH)
  n = 64  # Floats that a device holds.

  def inner(x, _):
    x = jax.lax.psum(x, "tensor") * 0.5  # 15 times
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None  # 15 times

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x, None, length=3)
    whole = jax.lax.all_gather(jnp.sin(x), "fsdp", tiled=True)  # 5 times
    x = jax.lax.psum_scatter(jnp.cos(whole), "fsdp", tiled=True)  # 5 times
    x = jax.lax.all_to_all(x.reshape(4, n // 4), ("data", "fsdp"), 0, 0, tiled=True)  # 5 times
    return x.reshape(n), None

  def program(x):
    x, _ = jax.lax.scan(outer, x, None, length=5)
    return jax.lax.psum(jnp.tanh(x), ("data", "fsdp", "tensor"))  # once

  place = P(("data", "fsdp", "tensor"))
  mapped = jax.shard_map(program, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)
  x = jax.ShapeDtypeStruct((8 * n,), jnp.float32, sharding=NamedSharding(mesh, place))
  module = hlo.parse(jax.jit(mapped).lower(x).compile().as_text())
  found, unknown = runs(module)
  assert not unknown
  made = {(c.kind, c.axis): (c.count, c.bytes) for c in collectives(module, found, mesh)}
  held = 4 * n
  assert made == {
    ("all-reduce", "tensor"): (15, 15 * held),  # 2 (n - 1) / n
    ("collective-permute", "data"): (15, 15 * held),
    ("all-gather", "fsdp"): (5, 5 * held),
    ("reduce-scatter", "fsdp"): (5, 5 * held),
    ("all-to-all", "data+fsdp"): (5, 5 * held * 3 / 4),
    ("all-reduce", "data+fsdp+tensor"): (1, held * 2 * 7 / 8),
  }


GROUPS = {
  "replica_groups={{0,2},{1,3},{4,6},{5,7}}": "fsdp",
  "replica_groups={}": "data+fsdp+tensor",
  "replica_groups=[4,2]<=[8]": "tensor",
  "replica_groups=[2,4]<=[8]": "fsdp+tensor",
  "replica_groups=[4,2]<=[2,4]T(1,0)": "data",
  "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": "fsdp",
  "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}": "fsdp",
  "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": "fsdp",
  "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": "tensor",
  "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": "data",
  "replica_groups=mesh['a'=4,'b'=2] {'a','b'}": "data+fsdp+tensor",
}


@pytest.mark.parametrize(("text", "axis"), GROUPS.items())
def test_every_way_to_write_groups_gives_the_mesh_axes(text, axis):
  mesh = make_mesh(**MESH)
  i = instruction(f"%r = f32[8]{{0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add")
  groups = device_groups(i, 8)
  assert sorted(d for group in groups for d in group) == list(range(8))
  assert axis_name(groups, mesh) == axis


def test_a_permute_names_the_axis_that_it_goes_along():
  pairs = "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}"
  i = instruction(f"%r = f32[8]{{0}} collective-permute(%p), channel_id=1, {pairs}")
  assert axis_name(device_groups(i, 8), make_mesh(**MESH)) == "data"


def test_what_goes_between_tpu_slices_is_a_collective_of_the_slices_axis():
  text = """HloModule m, is_scheduled=true, num_partitions=4

ENTRY %e (p: f32[100]) -> token[] {
  %p = f32[100] parameter(0)
  %t = token[] after-all()
  %r = f32[100] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %s = (f32[100], u32[], token[]) send(%r, %t), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), channel_id=3, is_host_transfer=true
}
"""
  module = hlo.parse(text)
  mesh = make_mesh(slices=2, data=1, fsdp=4)
  made = collectives(module, runs(module)[0], mesh)
  assert [(c.kind, c.axis, c.count, c.bytes) for c in made] == [
    ("all-reduce", "fsdp", 1, 600),
    ("all-reduce", "slices", 1, 400),
  ]
  four = hlo.parse(text.replace("{1,2}x", "{1:4}x"))
  assert collectives(four, runs(four)[0], mesh)[1].bytes == 600


def test_an_unknown_way_to_write_groups_is_an_error():
  i = instruction("%r = f32[8]{0} all-reduce(%p), replica_groups=<new>, to_apply=%add")
  with pytest.raises(ValueError, match="unknown way"):
    device_groups(i, 8)


LOOP = """HloModule m, is_scheduled=true

%inside (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%condition (c: (s32[], f32[16,1,8])) -> pred[] {
  %c = (s32[], f32[16,1,8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(13)
  ROOT %f = pred[] fusion(%i, %limit), kind=kLoop, calls=%inside
}

%body (s: (s32[], f32[16,1,8])) -> (s32[], f32[16,1,8]) {
  %s = (s32[], f32[16,1,8]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %x = f32[16,1,8] get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %w = f32[4,8,8] constant({...})
  %y = f32[16,4,8] convolution(%x, %w), window={size=4 pad=3_3}, dim_labels=b0f_0io->b0f
  ROOT %t = (s32[], f32[16,1,8]) tuple(%next, %x)
}

ENTRY %main (p: f32[16,1,8]) -> f32[16,1,8] {
  %p = f32[16,1,8] parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[16,1,8]) tuple(%one, %p)
  %loop = (s32[], f32[16,1,8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[16,1,8] get-tuple-element(%loop), index=1
}
"""


def test_the_length_of_a_loop_follows_from_its_condition_start_and_step():
  found, unknown = runs(hlo.parse(LOOP))
  assert not unknown
  assert {run.computation.name: run.times for run in found}["body"] == 6  # 1, 3, … 11
  _, unknown = runs(hlo.parse(LOOP.replace("%next = s32[] add", "%next = s32[] multiply")))
  assert unknown == ["loop"]


def test_padding_of_a_convolution_is_not_multiplied():
  module = hlo.parse(LOOP)
  body = module.computations["body"]
  # One element meets each of the four places of the kernel once; 8 inputs, 8 outputs, 16 rows.
  assert instruction_flops(body, body.instructions["y"]) == 2 * 16 * 8 * 8 * 4
  found, _ = runs(module)
  assert work(module, found, {}).flops == 6 * 2 * 16 * 8 * 8 * 4


def test_traffic_of_an_unlooped_program_is_close_to_the_compilers():
  x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
  compiled = jax.jit(lambda x, w: jnp.sum(jnp.tanh(x @ w) @ w.T, 0)).lower(x, w).compile()
  module = hlo.parse(compiled.as_text())
  found, _ = runs(module)
  ours = work(module, found, {})
  theirs = compiled.cost_analysis()
  assert ours.flops == 2 * 2 * 64 * 128 * 256
  assert ours.bytes == pytest.approx(theirs["bytes accessed"], rel=0.1)


def test_tiles_of_a_layout_count_their_padding():
  padded = lambda text: next(hlo.shapes_of(text)).padded_size
  assert padded("bf16[3,130]{1,0:T(8,128)(2,1)}") == 8 * 256 * 2
  assert padded("bf16[3,130]{0,1:T(8,128)(2,1)S(1)}") == 136 * 128 * 2
  assert padded("f32[5]{0:T(128)}") == 128 * 4
  assert padded("s4[6,2]{1,0}") == 6


def test_a_run_out_of_memory_ends_with_a_report_and_the_flag_to_change(capsys):
  config = tiny.config(dataclasses.replace(DENSE, num_layers=1), mesh=MeshConfig(data=8))
  mesh = make_mesh(data=8)
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    with pytest.raises(Stop) as stopped, explained(config, mesh, program):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
    other = pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL")
    with other, explained(config, mesh, program):
      raise jax.errors.JaxRuntimeError("INTERNAL: something else")
  assert stopped.value.status == 1
  assert "--config.model.remat=full" in stopped.value.message
  told = capsys.readouterr().err
  assert "params.embed.table" in told or "opt_state" in told
  assert "try --config.model.remat=full" in told and "--config.mesh.fsdp=8" in told


CONTRASTIVE = dict(objective=ObjectiveConfig(name="contrastive"), data=DataConfig(text_pair="pair"))


@pytest.mark.parametrize(
  ("mesh", "settings", "parts"),
  [
    (MeshConfig(data=4), {}, [1, 2, 4, 8]),
    (MeshConfig(data=2, stage=2), {}, [1, 2, 4, 8]),
    (MeshConfig(data=2, stage=2), dict(micro_batches=4), [1, 2, 4]),
    (MeshConfig(data=4), CONTRASTIVE, [1]),
  ],
)
def test_only_parts_that_training_would_take_are_suggested(mesh, settings, parts):
  own = dict(settings)
  model = dataclasses.replace(DENSE, micro_batches=own.pop("micro_batches", None))
  config = tiny.config(model, mesh=mesh, batch_size=32, **own)
  assert parts_of(config, jax.devices()[:4]) == parts


def test_arrays_that_the_compiler_names_are_read_from_its_message():
  message = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.7G hbm.
    Largest program allocations in hbm:

    1. Size: 6.00G
       Operator: op_name="jit(train_step)/jvp(Head)/dot_general"
       Shape: f32[32,1024,50304]{2,1,0:T(8,128)}
    2. Size: 512.5M
       Shape: bf16[4,8]{1,0}
  """
  first, second = allocations(message)
  assert (first.name, first.bytes) == (
    "jit(train_step)/jvp(Head)/dot_general f32[32,1024,50304]", 6 * 2**30,
  )  # fmt: skip
  assert (second.name, second.bytes) == ("bf16[4,8]", round(512.5 * 2**20))


@pytest.mark.slow
def test_buffers_of_a_loop_are_named_by_the_module_that_fills_them():
  names = [b.name for b in report(8, rows=512).buffers]
  assert any(n.startswith("MLP, forward: f32[8,512,16,64]") for n in names), names[:20]
  assert np.all(np.diff([b.bytes for b in report(8).buffers]) <= 0)


@pytest.mark.slow
def test_the_training_loop_ends_so_when_a_step_finds_no_memory(tmp_path, monkeypatch, capsys):
  text = tmp_path / "text.txt"
  text.write_text("a line of words\n" * 400)
  data = DataConfig(source=str(text), tokenizer="bytes", documents="line")
  model = dataclasses.replace(DENSE, vocab_size=None, num_layers=1)
  config = tiny.config(model, data=data, cache_dir=str(tmp_path / "cache"), sample_prompt="a")

  def no_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

  monkeypatch.setattr(loop, "put_batch", no_memory)  # In the place of the device's own error.
  with pytest.raises(Stop) as stopped:
    loop.train(config, tmp_path / "run")
  assert stopped.value.status == 1 and "--config." in stopped.value.message
  assert "memory of a device" in capsys.readouterr().err
