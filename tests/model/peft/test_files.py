"""Files of torch PEFT: what it writes loads here, what is written here loads there, equal logits."""

import warnings

import numpy as np
import pytest

import model
from model.peft.attach import is_adapted
from tests.model.peft import theirs

KINDS = ("lora", "rslora", "dora", "ia3", "patterns")
QUICK = {("llama", "patterns"), ("gpt2", "dora")}
CASES = [
  pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
  for name in theirs.TARGETS
  for kind in KINDS
]


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_adapters_of_peft_load_here_and_ours_load_there_with_equal_logits(tmp_path, name, kind):
  base = theirs.base(name, tmp_path / "base")
  plain = theirs.logits(base, name)
  pm = theirs.adapted(base, theirs.config(name, kind))
  want = theirs.logits(pm, name)
  assert np.abs(want - plain).max() > 1e-2
  pm.save_pretrained(tmp_path / "adapter")

  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  close(theirs.ours(m, name), want)
  merged = m.merged()
  assert not is_adapted(merged.params)
  close(theirs.ours(merged, name), want)
  model.save(merged, tmp_path / "merged", format="hf")
  there = type(base).from_pretrained(tmp_path / "merged").eval()
  close(theirs.logits(there, name), want)

  model.save(m, tmp_path / "ours", format="peft")
  fresh = type(base).from_pretrained(tmp_path / "base").eval()
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # PEFT warns of keys that are missing or surplus.
    for what in (DeprecationWarning, FutureWarning):
      warnings.filterwarnings("ignore", category=what)
    back = theirs.peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
  close(theirs.logits(back, name), want)
  again = model.load(tmp_path / "ours")  # The base is named in the file.
  close(theirs.ours(again, name), want)
