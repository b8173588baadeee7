"""Several adapters of torch PEFT at once: named by row, and summed with weights."""

import functools
import warnings

import numpy as np
import pytest

import infer
import model
from model.peft.combine import combined
from tests.infer.test_cache_programs import counted
from tests.model.peft import theirs

torch = theirs.torch


def several(name: str, folder, other: dict):
  """(a model of PEFT's with the adapters `default` and `other`, saved in `folder`; their PATHs)."""
  base = theirs.base(name, folder / "base")
  pm = theirs.adapted(base, theirs.config(name, "lora"))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pm.add_adapter("other", theirs.config(name, "lora", **other))
  generator = torch.Generator().manual_seed(7)
  for key, p in pm.named_parameters():
    if ".other." in key:
      p.data += 0.3 * torch.randn(p.shape, generator=generator)
  pm.save_pretrained(folder / "adapters")
  pm.eval()
  return pm, {"default": folder / "adapters", "other": folder / "adapters" / "other"}


NAMED = ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "phi3", "t5"))]


@pytest.mark.parametrize("name", NAMED)
def test_rows_have_the_adapters_that_peft_gives_them(tmp_path, name):
  targets = theirs.TARGETS[name][1:2]
  other = dict(r=3, lora_alpha=11, use_rslora=True, target_modules=targets)
  pm, paths = several(name, tmp_path, other)
  m = model.load(tmp_path / "base", adapter=paths)
  rows = np.random.default_rng(0).integers(1, theirs.VOCAB, (4, 9))
  names = ["other", None, "default", "other"]
  of_peft = ["__base__" if one is None else one for one in names]
  told = torch.tensor(rows)
  more = dict(decoder_input_ids=told[:, :5]) if name == "t5" else {}
  with torch.no_grad():
    want = pm(input_ids=told, adapter_names=of_peft, **more).logits.numpy()
    said = pm.generate(input_ids=told, attention_mask=torch.ones_like(told), do_sample=False,
                       adapter_names=of_peft, max_new_tokens=6, min_new_tokens=6,
                       pad_token_id=0).numpy()  # fmt: skip
  ours = dict(decoder_tokens=rows[:, :5]) if name == "t5" else {}
  np.testing.assert_allclose(m.using(names)(rows, **ours), want, rtol=1e-4, atol=1e-4)
  ask = functools.partial(infer.generate, max_new_tokens=6, min_new_tokens=6)
  made = ask(m, rows.tolist(), adapter=names)
  assert [c.tokens for c in made] == said[:, -6:].tolist()
  with counted() as programs:  # One gives way to another, from its folder.
    swapped = m.with_adapter("default", paths["other"])
    newer = ask(swapped, rows.tolist(), adapter="default")
    logits = swapped.using(names)(rows, **ours)
  assert programs == []
  assert [c.tokens for c in newer] == [c.tokens for c in ask(m, rows.tolist(), adapter="other")]
  assert newer[2].tokens != made[2].tokens
  third = m.using("other")(rows, **ours)[2]
  np.testing.assert_allclose(logits[2], third, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "how"),
  [("llama", "cat"), ("llama", "linear"), ("llama", "svd"), ("gpt2", "cat"), ("gpt2", "linear")],
)
def test_weighted_adapters_are_those_of_peft(tmp_path, name, how):
  pm, paths = several(name, tmp_path, dict(r=4 if how == "linear" else 3, lora_alpha=11))
  given = [1.5, -0.4]
  extra = dict(svd_rank=2) if how == "svd" else {}
  pm.add_weighted_adapter([*paths], given, "sum", combination_type=how, **extra)
  pm.set_adapter("sum")
  models = [model.load(tmp_path / "base", adapter=path) for path in paths.values()]
  ours = combined(models, given, how=how, rank=extra.get("svd_rank"))
  want = theirs.logits(pm, name)
  np.testing.assert_allclose(theirs.ours(ours, name), want, rtol=1e-3, atol=1e-3)
  assert np.abs(theirs.ours(models[0], name) - want).max() > 0.1
