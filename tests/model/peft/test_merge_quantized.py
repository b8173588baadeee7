"""Adapters merged into quantized matrices, and what rounding takes of them."""

import dataclasses

import numpy as np
import pytest

import model
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.peft.attach import apart
from model.peft.merge import merge, unmerged
from model.quant import Quantized, quantize
from model.quant_tree import quantize_params
from tests import commands
from tests.infer import tiny

TOKENS = np.random.default_rng(0).integers(5, 250, (2, 12))
Q_PROJ = ("decoder", "layers", 0, "attn", "q_proj")


def in_bits(format: str, pattern: str = "global", **changes) -> model.Model:
  m = tiny.model(d_model=64, d_ff=64, layer_pattern=(pattern,), window=None, **changes)
  params = quantize_params(m.params, param_info(abstract(m.config)), format)
  return dataclasses.replace(m, params=params)


def at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


CASES = ["int8", *(pytest.param(f, marks=pytest.mark.slow)
                   for f in ("int4", "nf4", "fp8", "int8_dynamic"))]  # fmt: skip


@pytest.mark.parametrize("format", CASES)
def test_an_update_is_added_to_the_dequantized_matrix_and_rounded_again(format, capsys):
  base = in_bits(format)
  m = tiny.adapted(base, 1, rank=3, targets=("q_proj", "down_proj"))
  made, lost = merge(m)
  assert lost is not None and len(lost.parts) == 4  # Two matrices of two layers.
  own = at(m.params, Q_PROJ)
  a, b, scale = (np.asarray(own["adapter"][name], np.float64) for name in ("a", "b", "scale"))
  before = np.asarray(own["w"].dequantize(), np.float64)
  update = np.einsum("LDR,LRNH,L->LDNH", a, b, scale)
  want = before + update
  new = at(made.params, Q_PROJ)["w"]
  assert isinstance(new, Quantized) and new.format == own["w"].format
  plain = quantize(want.astype(np.float32), own["w"].format, lead=1)
  step = np.abs(want).max() / (100 if "8" in format else 6)
  assert np.abs(np.asarray(new.dequantize() - plain.dequantize())).max() <= 2 * step
  assert np.mean(np.asarray(new.values != plain.values)) < 1e-3  # Both round alike.
  wrong = np.linalg.norm(np.asarray(new.dequantize())[1] - want[1]) / np.linalg.norm(update[1])
  assert lost.parts["decoder.layers.1.attn.q_proj"] == pytest.approx(wrong, rel=1e-3)
  assert lost.largest[1] == max(lost.parts.values()) >= lost.mean
  applied, rounded, plain = (np.asarray(one(TOKENS)) for one in (m, made, base))
  apart_by = lambda one: np.linalg.norm(one - applied)
  assert apart_by(rounded) < apart_by(plain) * (0.7 if "8" in format else 1)
  assert m.merged().adapted is None
  told = capsys.readouterr().err
  assert f"merged into {format}: rounding took {lost.mean:.1%} of the update" in told
  assert "warning" not in told
  with pytest.raises(InputError, match=r"cannot be computed back\. Keep the model"):
    unmerged(made, m)


@pytest.mark.slow
def test_an_update_that_drowns_in_rounding_is_told(capsys):
  m = tiny.adapted(in_bits("int4"), 1, noise=1e-4, rank=2, targets=("attn",))
  m.merged()
  told = capsys.readouterr().err
  assert "warning: in 8 of 8 matrices the update is smaller than what rounding to int4" in told
  assert "decoder.layers.0.attn" in told


@pytest.mark.slow
def test_experts_and_tables_are_merged_in_their_bits_too():
  experts = dict(pattern="global+experts", num_experts=2, experts_per_token=1)
  m = tiny.adapted(in_bits("int8", **experts), 1, rank=2, targets=("embed", "mlp"))
  made, lost = merge(m)
  assert lost is not None and len(lost.parts) == 1 + 3 * 2
  assert lost.largest[1] < 0.2
  assert isinstance(made.params["head"]["proj"]["w"], Quantized)  # Scores saw no adapter.
  table, score = made.params["embed"]["table"], made.params["head"]["proj"]["w"]
  old = m.params["embed"]["table"].dequantize()
  np.testing.assert_array_equal(score.dequantize(), old.T)
  assert np.abs(np.asarray(table.dequantize() - old)).max() > 1e-2
  base = dataclasses.replace(m, params=apart(m.params)[0])
  applied, rounded, plain = (np.asarray(one(TOKENS)) for one in (m, made, base))
  assert np.linalg.norm(rounded - applied) < np.linalg.norm(plain - applied) * 0.3


@pytest.mark.slow
def test_the_command_merges_into_floats_and_into_fewer_bits(tmp_path):
  base = tiny.model(d_model=64, d_ff=64, layer_pattern=("global",), window=None)
  model.save(base, tmp_path / "base", format="hf")
  loaded = model.load(tmp_path / "base")
  m = tiny.adapted(loaded, 1, rank=2, targets=("q_proj",))
  model.save(m, tmp_path / "adapter", format="peft")
  both = f"--source={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}"
  done = commands.run("model.hf", *both, f"--target={tmp_path / 'whole'}")
  assert done.returncode == 0, done.stderr
  whole = model.load(tmp_path / "whole")
  np.testing.assert_allclose(whole(TOKENS), m(TOKENS), rtol=1e-4, atol=1e-4)
  done = commands.run("model.hf", *both, f"--target={tmp_path / 'small'}", "--format=orbax",
                      "--quantize=int8")  # fmt: skip
  assert done.returncode == 0 and "merged into int8: rounding took" in done.stderr
  small = model.load(tmp_path / "small")
  assert np.linalg.norm(small(TOKENS) - m(TOKENS)) < np.linalg.norm(loaded(TOKENS) - m(TOKENS))
  done = commands.run("model.hf", *both, f"--target={tmp_path / 'x'}", "--quantize=int8")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("error: quantize='int8'")
