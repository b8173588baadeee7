"""QLoRA in several processes: each reads its part of the base, and all learn what one learns."""

import jax
import numpy as np
import pytest

import model
from model.quant_tree import quantized_leaves
from tests.train.test_processes import alone, assert_near, together
from tests.train.test_run import Bench

WIDE = (
  "--config.model.d_model=64", "--config.model.d_ff=128", "--config.model.dropout=0",
  "--config.model.vocab_multiple=128",
)  # fmt: skip
MESHES = {
  "data": ("--config.mesh.data=None",),
  "fsdp": ("--config.mesh.data=1", "--config.mesh.fsdp=None"),
  "tensor": ("--config.mesh.data=1", "--config.mesh.tensor=None"),
  "data_fsdp": ("--config.mesh.data=2", "--config.mesh.fsdp=2"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  return Bench(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def bases(bench):
  """A float run of one process, and the same as a folder of Hugging Face's."""
  run = alone(bench, "base", *WIDE, "--config.steps=10")
  folder = bench.folder / "hf"
  model.save(model.load(run), folder, format="hf")
  return {"orbax": run, "hf": folder}


def begun(base, format: str) -> tuple[str, ...]:
  """The flags of a run of an adapter."""
  return (
    *WIDE, f"--config.init_from={base}", "--config.peft.method=lora", "--config.peft.rank=2",
    f"--config.peft.base_format={format}", "--config.steps=8", "--config.eval_every=4",
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("form", "format", "count", "mesh"), [
  ("orbax", "nf4", 2, "fsdp"), ("hf", "nf4", 2, "data"), ("orbax", "int4", 4, "data_fsdp"),
  ("hf", "int8", 4, "fsdp"), ("orbax", "nf4", 4, "tensor"),
])  # fmt: skip
def test_processes_learn_what_one_learns_over_a_packed_base(
  bench, bases, form, format, count, mesh
):
  flags = begun(bases[form], format)
  reference = alone(bench, f"one_{count}_{mesh}_{form}_{format}", *flags)
  workdir = together(bench, f"{count}_{mesh}_{form}_{format}", count, *flags, *MESHES[mesh])
  assert_near(workdir, reference)
  # Going on reads the base once more, onto the mesh of then.
  longer = ("--config.steps=12", *MESHES[mesh])
  assert together(bench, workdir.name, count, *flags, *longer) == workdir
  alone(bench, reference.name, *flags, "--config.steps=12")
  assert_near(workdir, reference)
  m, whole = model.load(workdir), model.load(reference)
  assert quantized_leaves(m.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), m.params, whole.params)
