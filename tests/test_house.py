"""The house stays as it was designed: who imports whom, and no setting without an effect."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from model.config import ModelConfig
from model.sharding import make_mesh
from train.config import Config, checked
from train.config_optimizer import OPTIMIZER_MOMENTS
from train.data.roles import TASKS

ROOT = Path(__file__).parents[1]
FOLDERS = ("model", "infer", "train", "configs", "launch")
MAY_IMPORT = {
  "model": {"model"},
  "infer": {"infer", "model"},
  "train": {"train", "infer", "model"},
  "configs": {"configs", "model.config", "train.config"},
  "launch": {"launch", "train", "model"},
}
NNX_NAMES = {
  "Module", "Param", "LoRAParam", "Rngs", "List", "State", "GraphDef", "split", "merge", "state",
  "eval_shape", "to_pure_dict",
}  # fmt: skip
PUBLISHED = {
  "gpt_small": 124_439_808,
  "llama3_8b": 8_030_261_248,
  "lora_llama3_8b": 8_030_261_248,
  "qlora_llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_405b": 405_853_388_800,
  "mixtral_8x7b": 46_702_792_704,
  "bert_base": 109_514_298,
  "bert_large": 335_174_458,
  "modernbert_base": 149_655_232,
  "t5_small": 60_506_624,
  "t5_base": 222_903_552,
  "t5_1_1_base": 247_577_856,
  "bart_base": 139_420_416,
  "sft_smollm2": 134_515_008,
  "ul2_base": 247_577_856,
}


def sources(folder: str) -> list[Path]:
  return sorted((ROOT / folder).rglob("*.py"))


def config_files() -> list[str]:
  return [path.stem for path in sources("configs") if path.stem != "__init__"]


def imports(tree: ast.AST) -> set[str]:
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
  return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
  for path in sources(folder):
    for name in imports(ast.parse(path.read_text())):
      if name.split(".")[0] in FOLDERS:
        allowed = MAY_IMPORT[folder]
        ok = any(name == a or name.startswith(a + ".") or a.startswith(name + ".") for a in allowed)
        assert ok, f"{path.relative_to(ROOT)} imports {name}"


def test_every_config_field_is_read_somewhere():
  paths = [p for f in ("model", "infer", "train") for p in sources(f)]
  text = "\n".join(p.read_text() for p in paths)
  read = {name for defaults in OPTIMIZER_MOMENTS.values() for name in defaults}
  read |= set(inspect.signature(make_mesh).parameters)  # Both are passed on whole.
  read |= {name for roles in TASKS.values() for name in roles}  # Read by name in train.data.roles.
  owner = r"\b(?:\w*config|cfg|data|optimizer|objective|own|model|self)"
  for name in set(fields(Config)) - read:
    assert re.search(rf"{owner}\.{name}\b", text), f"no code reads the field {name}"


def fields(cls):
  for field in dataclasses.fields(cls):
    yield field.name
    if dataclasses.is_dataclass(field.type):
      yield from fields(field.type)


def test_only_these_names_of_nnx_are_used():
  for folder in FOLDERS:
    for path in sources(folder):
      used = set(re.findall(r"\bnnx\.(\w+)", path.read_text()))
      assert used <= NNX_NAMES, f"{path.relative_to(ROOT)}: {used - NNX_NAMES}"


def test_no_assert_outside_of_tests():
  for folder in FOLDERS:
    for path in sources(folder):
      nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
      assert not nodes, f"{path.relative_to(ROOT)}:{nodes[0].lineno}"


@pytest.mark.parametrize("name", config_files())
def test_config_files_are_valid_and_have_the_published_parameter_count(name):
  module = importlib.import_module(f"configs.{name}")
  config = checked(module.get_config())
  assert f"configs/{name}.py" in (module.__doc__ or ""), "the docstring gives the command"
  if name in PUBLISHED:
    assert config.model.num_params() == PUBLISHED[name]
  elif config.model.vocab_size is None:
    sized = dataclasses.replace(config.model, vocab_size=1000)
    assert sized.num_params() > 0


@pytest.mark.parametrize(
  ("name", "count"), [("bert_base", 109_482_240), ("bert_large", 335_141_888)]
)
def test_bert_with_its_pooler_and_no_head_has_the_published_count(name, count):
  config = importlib.import_module(f"configs.{name}").get_config().model
  pooled = dict(head="embedding", head_activation="tanh", head_norm=False, logit_bias=False)
  assert dataclasses.replace(config, **pooled).num_params() == count


def test_a_config_survives_json():
  config = ModelConfig(layer_pattern=("local", "global"), window=4, vocab_size=7)
  assert ModelConfig.from_dict(config.to_dict()) == config
