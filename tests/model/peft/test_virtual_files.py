"""Virtual tokens in PEFT's files: its load here and ours load there, with equal logits."""

import warnings

import numpy as np
import pytest

import model
from tests.model.peft import theirs, theirs_virtual

QUICK = {("llama", "prefix")}
CASES = [
  pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
  for name in ("llama", "gpt2", "phi3", "t5")
  for kind in theirs_virtual.KINDS
]


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def there(folder, base):
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # PEFT warns of keys that are missing or surplus.
    for what in (DeprecationWarning, FutureWarning):
      warnings.filterwarnings("ignore", category=what)
    return theirs.peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_virtual_tokens_of_peft_load_here_and_ours_load_there_with_equal_logits(
  tmp_path, name, kind
):
  base = theirs.base(name, tmp_path / "base")
  plain = theirs.logits(base, name)
  pm = theirs_virtual.adapted(base, theirs_virtual.config(name, kind))
  want = theirs_virtual.say(pm, name).numpy()
  assert np.abs(want - plain).max() > 1e-2
  pm.save_pretrained(tmp_path / "adapter")
  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  close(theirs.ours(m, name), want)

  model.save(m, tmp_path / "ours", format="peft")
  back = there(tmp_path / "ours", type(base).from_pretrained(tmp_path / "base").eval())
  close(theirs_virtual.say(back, name).numpy(), want)
  close(theirs.ours(model.load(tmp_path / "ours"), name), want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("task", theirs_virtual.CLASSES)
def test_classifiers_of_peft_with_virtual_tokens_bring_their_head_and_go_back(tmp_path, task, kind):
  theirs.base("bert", tmp_path / "base")
  made = getattr(theirs.transformers, theirs_virtual.CLASSES[task][1])
  theirs.torch.manual_seed(3)
  base = made.from_pretrained(tmp_path / "base", num_labels=3).eval()
  base.save_pretrained(tmp_path / "labels")
  pm = theirs_virtual.adapted(base, theirs_virtual.config(task, kind))
  for name, p in pm.named_parameters():
    if "modules_to_save" in name:
      p.data += 0.3
  want = theirs_virtual.say(pm, task).numpy()
  pm.save_pretrained(tmp_path / "adapter")
  # Of BERT's classifiers PEFT trains the last layer only: the pooler is the base's.
  m = model.load(tmp_path / "labels", adapter=tmp_path / "adapter")
  rows = theirs.tokens()
  close(m(rows), want)
  model.save(m, tmp_path / "ours", format="peft")
  back = there(tmp_path / "ours", made.from_pretrained(tmp_path / "labels").eval())
  close(theirs_virtual.say(back, task).numpy(), want)
  again = model.load(tmp_path / "labels", adapter=tmp_path / "ours")
  close(again(rows), want)
