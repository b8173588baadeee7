"""What the certificate does not try: token types, biases of untied heads, folders of older code."""

import dataclasses
import json

import numpy as np
import pytest

import model
from model import hf
from model.errors import InputError
from model.vocabulary import build_tokenizer
from tests.model.hf.test_folders import change_config, change_tensors
from train.certify.cases.encoders import ALBERT, BERT, NARROW, ROBERTA

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(5, 97, (1, 40))


def written(name, folder, **settings):
  """(a random model of theirs, the folder that it wrote)."""
  kind = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**settings)).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      torch.nn.init.normal_(p, std=0.2)
  theirs.save_pretrained(folder)
  return theirs, folder


def their_scores(theirs, **more):
  with torch.no_grad():
    return theirs(input_ids=torch.tensor(TOKENS), **more).logits.numpy()


def near(got, want):
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("BertForTokenClassification", {**BERT, "type_vocab_size": 3}),
    ("ElectraForTokenClassification", NARROW),
    ("AlbertForMaskedLM", ALBERT),
    ("NomicBertForMaskedLM", BERT),
  ],
)
def test_token_types_are_those_of_theirs(tmp_path, name, settings):
  theirs, folder = written(name, tmp_path, **settings)
  types = (np.arange(40) // 14 % settings.get("type_vocab_size", 2))[None]
  got = model.load(folder)(TOKENS, token_types=types)
  near(got, their_scores(theirs, token_type_ids=torch.tensor(types)))


def test_a_regression_without_a_number_of_labels_is_written_with_one(tmp_path):
  """As rerankers are published: one label, and no `problem_type`."""
  theirs, folder = written("BertForSequenceClassification", tmp_path, **BERT, num_labels=1)
  change_config(folder, problem_type=...)
  m = model.load(folder)
  near(m(TOKENS), their_scores(theirs))
  assert (m.config.problem, m.labels) == ("regression", ("LABEL_0",))
  unset = dataclasses.replace(m, config=dataclasses.replace(m.config, num_labels=None))
  model.save(unset, tmp_path / "back", format="hf")
  again = type(theirs).from_pretrained(tmp_path / "back").eval()
  assert again.config.problem_type == "regression"
  near(their_scores(again), m(TOKENS))


LABELS = {  # What is wrong of a classifier's labels, and what is said.
  "no such problem": (dict(problem_type="ranking"), "problem_type='ranking' is not known"),
  "no text": (dict(problem_type=["regression"]), r"problem_type=\['regression'\] is not known"),
  "one is always true": (
    dict(id2label={"0": "x"}, problem_type="single_label_classification"), "num_labels=1: one label"
  ),
  "a name by a word": (dict(id2label={"a": "x"}), "id2label="),
  "a name left out": (dict(id2label={"0": "x", "2": "y"}), "id2label="),
  "a number for a name": (dict(id2label={"0": "x", "1": 3}), "id2label="),
  "a list": (dict(id2label=["x", "y"]), "id2label="),
}  # fmt: skip


@pytest.mark.parametrize("wrong", LABELS)
def test_labels_that_make_no_classifier_are_refused_by_their_field(wrong):
  changes, said = LABELS[wrong]
  with pytest.raises(InputError, match=said):
    hf.FAMILIES["bert"].read(
      {**BERT, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
      | changes
    )


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("BertForMaskedLM", BERT), ("XLMRobertaForMaskedLM", ROBERTA), ("AlbertForMaskedLM", ALBERT),
    ("MPNetForMaskedLM", ROBERTA), ("NomicBertForMaskedLM", BERT),
  ],
)  # fmt: skip
def test_of_an_untied_head_the_bias_of_the_decoder_computes(tmp_path, name, settings):
  theirs, folder = written(name, tmp_path / "theirs", **settings, tie_word_embeddings=False)
  m, want = model.load(folder), their_scores(theirs)
  near(m(TOKENS), want)
  model.save(m, tmp_path / "back", format="hf")
  near(their_scores(type(theirs).from_pretrained(tmp_path / "back").eval()), want)


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert"])
def test_an_id_of_padding_from_which_positions_would_begin_elsewhere_is_refused(tmp_path, family):
  _, folder = written(f"{family}Model", tmp_path / "theirs", **ROBERTA)
  m = dataclasses.replace(model.load(folder), tokenizer=build_tokenizer("bytes", None, []))
  with pytest.raises(InputError, match=f"pads with id {m.tokenizer.pad_id}, and a .* 1 for this"):
    model.save(m, tmp_path / "back", format="hf")
  model.save(dataclasses.replace(m, tokenizer=None), tmp_path / "back", format="hf")
  assert json.loads((tmp_path / "back" / "config.json").read_text())["pad_token_id"] == 1
  change_config(folder, pad_token_id=0)
  with pytest.raises(InputError, match="pad_token_id=0 is not supported"):
    model.load(folder)


def test_biases_of_a_tied_head_that_differ_are_refused(tmp_path):
  theirs, folder = written("BertForMaskedLM", tmp_path, **BERT)
  ours, name = "cls.predictions.bias", "cls.predictions.decoder.bias"
  change_tensors(folder, lambda t: t | {name: t[ours]})
  near(model.load(folder)(TOKENS), their_scores(theirs))
  change_tensors(folder, lambda t: t | {name: t[ours] + 1})
  with pytest.raises(InputError, match=r"decoder\.bias differs from cls.predictions.bias"):
    model.load(folder)


def test_a_folder_of_nomic_code_has_older_names_of_fields(tmp_path):
  theirs, folder = written("NomicBertModel", tmp_path, **BERT)
  want = theirs(input_ids=torch.tensor(TOKENS)).last_hidden_state.detach().numpy()
  (folder / "config.json").write_text(json.dumps({
    "model_type": "nomic_bert", "architectures": ["NomicBertModel"], "vocab_size": 97, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 640, "layer_norm_epsilon": 1e-12,
    "activation_function": "swiglu", "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_scaling_factor": None, "qkv_proj_bias": False, "prenorm": False, "resid_pdrop": 0.0,
    "type_vocab_size": 2, "use_flash_attn": True, "max_trained_positions": 2048,
  }))  # fmt: skip
  m = model.load(folder)
  near(m.hidden(TOKENS), want)
  assert m.config.rope_theta == 1000 and m.config.max_positions == 640
  change_config(folder, rotary_scaling_factor=2)
  with pytest.raises(InputError, match="rotary_scaling_factor=2 is not supported"):
    model.load(folder)
