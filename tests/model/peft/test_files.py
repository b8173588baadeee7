"""Files of torch PEFT: its adapters load here and ours load there, with equal logits."""

import json
import shutil
import warnings

import numpy as np
import pytest

import model
from model.errors import InputError
from model.hf.safetensors_files import open_file, write_file
from model.peft.attach import is_adapted
from model.peft.files import CONFIG, WEIGHTS
from tests.model.peft import theirs

KINDS = ("lora", "rslora", "dora", "ia3", "patterns", "pissa", "olora")
QUICK = {("llama", "patterns"), ("llama", "pissa")}
CASES = [
  pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
  for name in theirs.TARGETS
  for kind in KINDS
  if (name, kind) != ("gpt2", "olora")  # PEFT takes QR of the matrix that GPT-2 keeps transposed.
]


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bias"), [("gpt2", "all"), ("bert", "lora_only")])
def test_biases_that_were_trained_with_an_adapter_are_read_and_written(tmp_path, name, bias):
  base = theirs.base(name, tmp_path / "base")
  pm = theirs.adapted(base, theirs.config(name, "lora", bias=bias))
  generator, plain = theirs.torch.Generator().manual_seed(3), theirs.logits(pm, name)
  for one, p in pm.named_parameters():
    if one.endswith("bias") and p.requires_grad:
      p.data += 0.3 * theirs.torch.randn(p.shape, generator=generator)
  want = theirs.logits(pm, name)
  assert np.abs(want - plain).max() > 1e-1
  pm.save_pretrained(tmp_path / "adapter")
  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  close(theirs.ours(m, name), want)
  model.save(m, tmp_path / "ours", format="peft")
  fresh = type(base).from_pretrained(tmp_path / "base").eval()
  back = theirs.peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
  close(theirs.logits(back, name), want)


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


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "problem"), [(3, "single_label"), (1, "regression")])
def test_a_classifier_of_peft_brings_its_head_and_goes_back(tmp_path, labels, problem):
  torch, transformers = theirs.torch, theirs.transformers
  theirs.base("llama", tmp_path / "base")
  kind = transformers.AutoModelForSequenceClassification
  torch.manual_seed(3)
  base = kind.from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0).eval()
  settings = theirs.config("llama", "lora", task_type="SEQ_CLS")
  pm = theirs.adapted(base, settings)
  pm.save_pretrained(tmp_path / "adapter")
  rows = theirs.tokens()
  with torch.no_grad():
    want = pm(input_ids=torch.tensor(rows)).logits.numpy()
  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  assert (m.config.num_labels, m.config.problem) == (labels, problem)
  close(m(rows), want)
  model.save(m, tmp_path / "ours", format="peft")
  fresh = kind.from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0).eval()
  back = theirs.peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
  with torch.no_grad():
    close(back(input_ids=torch.tensor(rows)).logits.numpy(), want)


@pytest.mark.slow
def test_tables_of_tokens_are_adapted_as_peft_adapts_them(tmp_path):
  base = theirs.base("llama", tmp_path / "base")
  pm = theirs.adapted(
    base, theirs.config("llama", "lora", target_modules=["embed_tokens", "q_proj"])
  )
  want = theirs.logits(pm, "llama")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pm.save_pretrained(tmp_path / "adapter")
  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  close(theirs.ours(m, "llama"), want)
  close(theirs.ours(m.merged(), "llama"), want)
  model.save(m, tmp_path / "ours", format="peft")
  close(theirs.ours(model.load(tmp_path / "ours"), "llama"), want)


# What PEFT is told of a tied model's table and head: more settings, and whether they stay tied.
TIED = {
  "table": (dict(modules_to_save=["embed_tokens"]), False),
  "both": (dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
  "apart": (dict(modules_to_save=["embed_tokens", "lm_head"]), False),
  "head": (dict(modules_to_save=["lm_head"]), False),
  "adapted head": (dict(target_modules=["q_proj", "lm_head"]), False),
  "adapted both": (
    dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), False
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  "case", [c if c in ("table", "both") else pytest.param(c, marks=pytest.mark.slow) for c in TIED]
)
def test_a_table_that_scores_words_is_trained_with_an_adapter_as_in_peft(tmp_path, case):
  settings, stays = TIED[case]
  base = theirs.base("tied", tmp_path / "base")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    own = dict(target_modules=["q_proj"]) | settings
    pm = theirs.adapted(base, theirs.peft.LoraConfig(r=4, task_type="CAUSAL_LM", **own))
    pm.save_pretrained(tmp_path / "adapter")
  want = theirs.logits(pm, "tied")
  m = model.load(tmp_path / "base", adapter=tmp_path / "adapter")
  assert m.config.tie_embeddings == stays
  close(theirs.ours(m, "tied"), want)
  close(theirs.ours(m.merged(), "tied"), want)
  model.save(m, tmp_path / "ours", format="peft")
  fresh = type(base).from_pretrained(tmp_path / "base").eval()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    back = theirs.peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
  close(theirs.logits(back, "tied"), want)
  close(theirs.ours(model.load(tmp_path / "ours"), "tied"), want)


def test_adapters_that_are_wrong_or_of_another_base_are_refused(tmp_path):
  base = theirs.base("llama", tmp_path / "base")
  pm = theirs.adapted(base, theirs.config("llama", "lora"))
  good = tmp_path / "good"
  pm.save_pretrained(good)
  values = json.loads((good / CONFIG).read_text())

  def changed(name, tensors=None, **fields):
    folder = tmp_path / name
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(values | fields))
    if tensors is None:
      shutil.copy(good / WEIGHTS, folder / WEIGHTS)
    elif tensors:
      write_file(folder / WEIGHTS, tensors)
    return folder

  read = {name: np.array(array) for name, array in open_file(good / WEIGHTS).items()}
  renamed = {name.replace("q_proj", "c_attn"): array for name, array in read.items()}
  half = {
    name: array for name, array in read.items() if "layers.0.self_attn.q_proj.lora_B" not in name
  }
  name = "base_model.model.model.embed_tokens.lora_{}"
  of_table = {name.format("embedding_A"): np.ones((4, 61), np.float32),
              name.format("embedding_B"): np.ones((16, 4), np.float32),
              name.format("magnitude_vector"): np.ones(16, np.float32)}  # fmt: skip
  narrow = {name: array[..., :3] if "lora_A" in name else array for name, array in read.items()}
  cases = {
    "peft_type='LOHA' is not known": changed("kind", peft_type="LOHA"),
    "rank 5 and alpha 6": changed("rank", r=5),
    "bias='some' is not supported": changed("bias", bias="some"),
    "init_lora_weights='pissa_niter_4' changes": changed("fast", init_lora_weights="pissa_niter_4"),
    "init_lora_weights='loftq' changes": changed("loftq", init_lora_weights="loftq"),
    "use_dora=True is supported for": changed("dora", of_table),
    "which this model does not have": changed("names", renamed),
    "both are needed": changed("half", half),
    "do not fit this model": changed("narrow", narrow),
    "has neither": changed("empty", {}),
    "has no adapter": changed("whole", {"base_model.model.lm_head.weight": np.zeros((61, 16))}),
  }
  for words, folder in cases.items():
    with pytest.raises(InputError) as error:
      model.load(tmp_path / "base", adapter=folder)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
  (tmp_path / "kind" / CONFIG).write_text("{")
  with pytest.raises(InputError, match="cannot be read"):
    model.load(tmp_path / "base", adapter=tmp_path / "kind")
  nowhere = changed("nowhere", base_model_name_or_path="some/hub-name")
  with pytest.raises(InputError, match="no folder of this machine: name the base with base="):
    model.load(nowhere)
  m = model.load(nowhere, base=tmp_path / "base")
  close(theirs.ours(m, "llama"), theirs.logits(pm, "llama"))
