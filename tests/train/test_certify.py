"""Certificates: models of each family are what they are in Transformers, and a wrong one fails."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import model
from train.certify.cases import CASES, FAMILIES, family_of
from train.certify.documents import documents

pytest.importorskip("torch")
pytest.importorskip("transformers")

import train.certify.compare
from train.certify.compare import (
  GREEDY_TOKENS,
  Certificate,
  certify,
  compare,
  too_many_ties,
  worst,
)
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


EQUAL = Certificate(
  logits=0.0, log_probability=0.0, gradient=0.0, after_step=0.0, greedy=None, ties=0, same_bits=True
)


@pytest.mark.parametrize("name", ["log_probability", "gradient", "after_step"])
def test_what_is_no_number_fails(name):
  assert EQUAL.failures() == []
  wrong = dataclasses.replace(EQUAL, **{name: worst([0.0, float("nan"), 0.0])})
  assert wrong.failures()


BEST, SECOND, OTHER = 3, 4, 5  # Tokens: the best two tie.


@pytest.mark.parametrize(
  ("parts", "same", "ties"),
  [
    ((None, None), 128, 0), ((None, (10, SECOND)), 128, 1), (((0, SECOND), (10, OTHER)), 74, 1),
    ((None, (10, OTHER)), 74, 0),
  ],
)  # fmt: skip
def test_texts_may_part_only_where_the_best_two_tokens_tie(read, monkeypatch, parts, same, ties):
  scores = np.zeros((GREEDY_TOKENS, 97))
  scores[:, BEST], scores[:, SECOND] = 1.0, 1.0 - 1e-4
  written = []
  for part in parts:
    tokens = [BEST] * GREEDY_TOKENS
    if part is not None:
      tokens[part[0]] = part[1]
    written.append(SimpleNamespace(tokens=tokens))
  monkeypatch.setattr(train.certify.compare, "generate", lambda *_, **__: written)
  theirs = SimpleNamespace(two_sided=False, next_scores=lambda *_: scores)
  found = train.certify.compare._greedy(theirs, read[1], documents())
  assert found == (same, ties)
  failed = dataclasses.replace(EQUAL, greedy=found[0], ties=found[1]).failures()
  assert bool(failed) == (same < 128)


def test_ties_are_few():
  tied = dataclasses.replace(EQUAL, ties=1)
  assert too_many_ties([tied]) == too_many_ties([tied] * 2 + [EQUAL] * 98) == []
  assert too_many_ties([tied] * 2 + [EQUAL] * 97) == ["2 of 99 part at a tie, more than 2%"]


def test_a_weight_that_is_slightly_another_one_fails(read, tmp_path):
  theirs, m = read
  bent = jax.tree_util.tree_map_with_path(
    lambda path, p: p * (1 + 1e-6) if "down_proj" in str(path) else p, m.params
  )
  failures = compare(theirs, dataclasses.replace(m, params=bent), tmp_path).failures()
  assert "weights are not the same bits" in failures
