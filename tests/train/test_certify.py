"""Certificates: models of each family are what they are in Transformers, and a wrong one fails."""

import dataclasses

import jax
import pytest

import model
from train.certify.cases import CASES, FAMILIES, family_of

pytest.importorskip("torch")
pytest.importorskip("transformers")

from train.certify.compare import certify, compare
from train.certify.theirs import Theirs

FIRST = [next(name for name in CASES if family_of(name) == family) for family in FAMILIES]


@pytest.mark.parametrize("name", FIRST)
def test_a_model_of_each_family_is_what_it_is_in_transformers(name):
  certificate = certify(CASES[name])
  assert certificate.failures() == [], certificate


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FIRST])
def test_so_is_every_configuration(name):
  certificate = certify(CASES[name])
  assert certificate.failures() == [], certificate


def test_every_family_has_a_case():
  assert set(FAMILIES) == set(model.hf.FAMILIES)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
  """Theirs, with windows, and ours."""
  theirs = Theirs(CASES["mistral"])
  folder = tmp_path_factory.mktemp("theirs")
  theirs.save(folder)
  return theirs, model.load(folder)


@pytest.mark.parametrize(
  "change",
  [dict(window=17), dict(rope_theta=10_100.0), dict(norm_eps=1e-4), dict(window=None)],
  ids=str,
)
def test_a_model_that_is_slightly_another_one_fails(read, change, tmp_path):
  theirs, m = read
  if "window" in change and change["window"] is None:
    change = dict(layer_pattern=("global",), window=None)
  wrong = dataclasses.replace(m, config=dataclasses.replace(m.config, **change))
  failures = compare(theirs, wrong, tmp_path).failures()
  assert any("log-probabilities differ" in words for words in failures), failures


def test_a_weight_that_is_slightly_another_one_fails(read, tmp_path):
  theirs, m = read
  bent = jax.tree_util.tree_map_with_path(
    lambda path, p: p * (1 + 1e-6) if "down_proj" in str(path) else p, m.params
  )
  failures = compare(theirs, dataclasses.replace(m, params=bent), tmp_path).failures()
  assert "weights are not the same bits" in failures
