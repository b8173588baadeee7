"""Axes of a mesh that meet: pipelines, lengths and experts on the same eight devices."""

import dataclasses

import pytest

from tests.train import tiny
from tests.train.test_pipeline import compared, deep
from train.config import MeshConfig

pytestmark = pytest.mark.slow
MESHES = {
  "stage seq tensor": MeshConfig(data=1, stage=2, seq=2, tensor=2),
  "slices fsdp seq": MeshConfig(data=1, slices=2, fsdp=2, seq=2),
  "stage data expert": MeshConfig(data=2, stage=2, expert=2),
  "stage expert tensor": MeshConfig(data=1, stage=2, expert=2, tensor=2),
  "expert seq tensor": MeshConfig(data=1, expert=2, seq=2, tensor=2),
  "fsdp expert seq": MeshConfig(data=1, fsdp=2, expert=2, seq=2),
  "stage expert seq": MeshConfig(data=1, stage=2, expert=2, seq=2),
}


@pytest.mark.parametrize("context", ["gather", "ring"])
@pytest.mark.parametrize("mesh", ["stage seq tensor", "slices fsdp seq"])
def test_dense_models_equal_one_device(mesh, context):
  compared(deep(tiny.ROTARY, MESHES[mesh]), MESHES[mesh], context_attention=context)


@pytest.mark.parametrize("name", [name for name, cfg in tiny.MODELS.items() if cfg.num_experts])
@pytest.mark.parametrize("mesh", [name for name in MESHES if "expert" in name])
def test_models_with_experts_equal_one_device(name, mesh):
  model = dataclasses.replace(tiny.MODELS[name], balance_loss=0.1, router_z_loss=0.01)
  compared(deep(model, MESHES[mesh]), MESHES[mesh])
