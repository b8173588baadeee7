"""A model of any config is one of a family, or none, and that is said."""

import dataclasses
import importlib

import pytest

from model import hf
from model.architecture import architecture
from model.errors import InputError
from tests.model import test_shapes
from tests.test_house import config_files
from tests.train import tiny


def published(name):
  cfg = importlib.import_module(f"configs.{name}").get_config().model
  return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 96, num_labels=cfg.num_labels or 2)


CONFIGS = {**tiny.MODELS, **test_shapes.SMALL, **{n: published(n) for n in config_files()}}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_ours_is_a_familys_or_none_is_named(name):
  try:
    family, values, _ = hf._written(CONFIGS[name], None)
  except InputError as error:
    assert "is this model. The nearest: " in str(error)
  else:
    assert architecture(family.read(values)[1]) == architecture(CONFIGS[name])


@pytest.mark.parametrize(
  ("name", "family"),
  [("gpt_small", "gpt2"), ("llama3_8b", "llama"), ("mixtral_8x7b", "mixtral"),
   ("bert_base", "bert"), ("modernbert_base", "modernbert"), ("t5_small", "t5"),
   ("t5_1_1_base", "t5"), ("bart_base", "bart")],
)  # fmt: skip
def test_the_published_shapes_are_their_families(name, family):
  found, _, _ = hf._written(CONFIGS[name], family)
  assert found.model_type == family
