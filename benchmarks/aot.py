"""Our compiled training step beside what it cannot do without, on TPU topologies without a TPU.

    python -m benchmarks.aot [--cases=8b,70b] [--write]

TPU's own compiler (extra `tpu`) makes the step of `python -m train` for a slice. From that program:

* FLOPs without remat over model FLOPs. Programs of 2 and 4 layers are compiled and the line through
  them is followed to the depth of the model: without remat all layers would not fit.
* Bytes that leave a device in the collectives of the whole step, over the textbook's count for the
  same mesh (`textbook`).
* Bytes of activations that are gathered, beside those that the mesh asks for.
* Bytes of memory traffic beside the least: each parameter and moment read and written once.

Three programs a case, one to five minutes each on two idle cores.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import math
from typing import Any

import jax
from absl import app, flags
from jax.sharding import Mesh

from benchmarks.measure import RESULTS, commit
from launch.topologies import devices_of
from model.layers import ParamInfo
from model.sharding import make_mesh, mesh_parts
from train.analysis.attention_masks import visited
from train.analysis.collectives import Collective, collectives
from train.analysis.described import described
from train.analysis.hlo import Module, parse
from train.analysis.loops import Run, runs
from train.analysis.memory import state_bytes
from train.analysis.model_work import model_flops
from train.analysis.work import Work, work
from train.config import Config, MeshConfig, checked
from train.program import Program, build_program

DEPTHS = (2, 4)  # Layers of the programs without remat.
WIDTH = 2  # Bytes of an element that crosses the network: bfloat16.


@dataclasses.dataclass(frozen=True)
class Case:
  """A config, the slice that it is compiled for, and the mesh."""

  config: str
  topology: str
  mesh: MeshConfig


CASES = {
  "8b": Case("llama3_8b", "v5e:16x16", MeshConfig(data=16, fsdp=16)),
  "70b": Case("llama3_70b", "v5p:8x8x8", MeshConfig(data=8, fsdp=8, tensor=8)),
}
_CASES = flags.DEFINE_list("cases", [*CASES], "Cases to compile, a comma between them.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")


def main(_: list[str]) -> None:
  path = RESULTS / "aot.json"
  kept = json.loads(path.read_text())["rows"] if path.exists() else {}
  for name in _CASES.value:
    kept[name] = row = compared(CASES[name])
    print("\n".join(table(row)), flush=True)
    if _WRITE.value:
      versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
      path.write_text(json.dumps(dict(commit=commit(), **versions, rows=kept), indent=2) + "\n")
      print(f"written: {path}")


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step and what is read from it; FLOPs and bytes are those of one device."""

  program: Program
  mesh: Mesh
  module: Module
  runs: list[Run]
  done: Work
  crossing: list[Collective]


def compiled(config: Config, case: Case) -> Step:
  """The step of a config on a case's mesh."""
  mesh = make_mesh(**dataclasses.asdict(case.mesh), devices=devices_of(case.topology, 1))
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    executable = program.train_step
  module = parse(executable.as_text() or "")
  found, _ = runs(module)
  done = work(module, found, visited(executable, module))
  return Step(program, mesh, module, found, done, collectives(module, found, mesh))


def compared(case: Case) -> dict[str, Any]:
  """A row of the report."""
  config = importlib.import_module(f"configs.{case.config}").get_config()
  config = described(checked(dataclasses.replace(config, mesh=case.mesh)))
  step = compiled(config, case)
  with jax.set_mesh(step.mesh):
    dtype = config.model.compute_dtype
  counted = textbook(config, step)
  sent = sum(c.bytes for c in step.crossing)
  ours, least = flops_without_remat(config, case), model_flops(config)
  state = state_bytes(step.program)
  return dict(
    what=f"{case.config}, {case.topology}, batch {config.batch_size} x {config.seq_len}, "
    f"{dtype}",
    mesh={axis: size for axis, size in step.mesh.shape.items() if size > 1},
    accumulation=config.accumulation, remat=config.model.remat,
    flops=dict(without_remat=ours, model=least, ratio=ours / least),
    collectives=[dataclasses.asdict(c) for c in step.crossing],
    sent=dict(ours=sent, textbook=counted, ratio=sent / sum(counted.values())),
    activations_gathered=dict(
      ours=activations_gathered(step),
      textbook=sum(size for kind, size in counted.items() if kind.startswith("activations")),
    ),
    memory=dict(ours=step.done.bytes, least=2 * (state.parameters + state.optimizer)),
  )  # fmt: skip


def flops_without_remat(config: Config, case: Case) -> float:
  """FLOPs of the step on all devices, from two shallow programs: they are affine in the layers."""
  found = []
  for depth in DEPTHS:
    model = dataclasses.replace(config.model, num_layers=depth, remat="none")
    step = compiled(dataclasses.replace(config, model=model), case)
    found.append(step.done.flops * step.mesh.size)
  each = (found[1] - found[0]) / (DEPTHS[1] - DEPTHS[0])
  return found[0] + (config.model.num_layers - DEPTHS[0]) * each


def textbook(config: Config, step: Step) -> dict[str, float]:
  """Bytes that leave a device in a step of a dense decoder, by what they are for.

  Rings are used: n devices gather or scatter an array of S bytes by sending S (n - 1) / n each, and
  sum one by sending twice that. bfloat16 crosses the network. Sources:

  weights, gradients   ZeRO stage 3 (arXiv:1910.02054, section 7.2): each part of a batch gathers
                       all weights for the forward and for the backward pass, and scatters the
                       gradients; copies of the whole are then summed once a step.
  activations          Tensor parallelism with the residual stream split along the sequence
                       (arXiv:2205.05198, sections 4.2.2 and 5; without that split, a sum in the
                       place of each pair: arXiv:2104.04473, section 3.2): a layer gathers twice and
                       scatters twice in each direction. Inputs that were kept in parts are gathered
                       again for the gradients; where all is computed again, so is all but the last
                       scatter. The table and the head: once in each direction.
  """
  mesh, model = step.mesh, config.model
  n, t = mesh.shape["fsdp"], mesh.shape["tensor"]
  copies = mesh.shape["slices"] * mesh.shape["data"]
  weights = WIDTH * sum(whole_sizes(step.program, mesh))
  tokens = config.batch_size * config.seq_len / (copies * n)
  stream = WIDTH * tokens * model.d_model * (t - 1) / t
  layer = 11 if model.remat == "full" else 10
  ring = lambda size, devices: size * (devices - 1) / devices
  return {
    "weights gathered": config.accumulation * 2 * ring(weights, n),
    "gradients scattered": config.accumulation * ring(weights, n),
    "gradients of copies summed": 2 * ring(weights / n, copies),
    "activations between tensor's devices": stream * (layer * model.num_layers + 4),
  }


def whole_sizes(program: Program, mesh: Mesh) -> list[float]:
  """Elements of each parameter, all layers, that a device has once they are gathered over fsdp."""
  infos = jax.tree.leaves(program.info, is_leaf=lambda i: isinstance(i, ParamInfo))
  shapes = [leaf.shape for leaf in jax.tree.leaves(program.state.params)]
  split = lambda axis: 1 if axis == "embed" else mesh_parts(axis, mesh)
  return [
    math.prod(size / split(axis) for axis, size in zip(info.axes, shape, strict=True))
    for info, shape in zip(infos, shapes, strict=True)
  ]


def activations_gathered(step: Step) -> float:
  """Bytes of gathers over axes that split activations in the place of weights.

  Weights are gathered over fsdp, activations over tensor; a gather over fsdp whose result is no
  parameter's size is one of activations too.
  """
  layers = {"layers"}
  infos = jax.tree.leaves(step.program.info, is_leaf=lambda i: isinstance(i, ParamInfo))
  shapes = [leaf.shape for leaf in jax.tree.leaves(step.program.state.params)]
  sizes = whole_sizes(step.program, step.mesh)
  known = {
    round(size / (shape[0] if layers & set(info.axes) else 1))
    for size, info, shape in zip(sizes, infos, shapes, strict=True)
  }
  total = 0.0
  for run in step.runs:
    own = {
      name: i for name, i in run.computation.instructions.items()
      if not i.opcode.startswith("all-gather") or any(s.elements not in known for s in i.shapes)
    }  # fmt: skip
    kept = dataclasses.replace(run.computation, instructions=own)
    part = collectives(step.module, [dataclasses.replace(run, computation=kept)], step.mesh)
    total += sum(c.bytes for c in part if c.kind == "all-gather")
  return total


def table(row: dict[str, Any]) -> list[str]:
  """A row for a person."""
  gib = lambda size: f"{size / 2**30:10.2f} GiB"
  mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
  flops, sent, gathered = row["flops"], row["sent"], row["activations_gathered"]
  lines = [f"{row['what']}, mesh {mesh}, {row['accumulation']} parts, remat {row['remat']}"]
  lines += [f"  FLOPs without remat     {flops['without_remat']:.4g}, model {flops['model']:.4g}: "
            f"{flops['ratio']:.3f}"]  # fmt: skip
  lines += [f"  {c['kind']:<20}{c['axis']:<16}{c['count']:>7,.0f}{gib(c['bytes'])}"
            for c in row["collectives"]]  # fmt: skip
  lines += [f"  textbook: {what:<41}{gib(size)}" for what, size in sent["textbook"].items()]
  lines += [f"  sent by a device        {gib(sent['ours'])}, {sent['ratio']:.3f} of the textbook's"]
  lines += [f"  activations gathered    {gib(gathered['ours'])}, textbook "
            f"{gib(gathered['textbook']).strip()} with what is scattered"]  # fmt: skip
  lines += [f"  memory traffic          {gib(row['memory']['ours'])}, state read and written once "
            f"{gib(row['memory']['least']).strip()}"]  # fmt: skip
  return lines


if __name__ == "__main__":
  app.run(main)
