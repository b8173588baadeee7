"""Tokenizers of GGUF files: ids and offsets of the libraries that made them."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.model.hf.gguf_writing import write_file

transformers = pytest.importorskip("transformers")

LINES = Path(io.__file__).read_text(encoding="utf-8").splitlines() * 2
LINES += ["Größe, naïve café — 日本語 😀 ½ Ⅷ", "a  b   c\t\td", "in 1984 and 12345.678"] * 9
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PARTS = ["hello", " world", "  ", " ", "\n", "\r\n", "\t", "1", "23", "4567", "'ll", "'T", "don't",
         "Größe", "é", "e\u0301", "日本語", "😀", "👩‍👩‍👧", "½", "Ⅷ", "٣", "…", "--", "(", ")",
         "<|im_start|>", "<think>", "</s>", "_x", "CamelCase", "ﬁ", "\u00a0", "\u200b", "АБВ",
         "def f(self):", "\x00", "\u3000", "!!!", "▁"]  # fmt: skip


def texts(n: int) -> list[str]:
  """Varied ones."""
  rng = random.Random(0)
  return ["".join(rng.choices(PARTS, k=rng.randint(0, 12))) for _ in range(n)]


def metadata(given: dict, **more) -> dict:
  values = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
  values |= given | more
  found = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
  return {"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE, **found}


def write(path: Path, values: dict) -> Path:
  return write_file(path, values, {"x": np.zeros(4, np.float32)}, {"x": "F32"})


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
  """(tokens, merges) of a byte-level vocabulary; the last tokens are none of text."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.train_from_iterator(LINES, trainers.BpeTrainer(
    vocab_size=1500, special_tokens=SPECIAL, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
  model = json.loads(backend.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  return [*tokens, "<think>", "[PAD]"], [" ".join(pair) for pair in model["merges"]]


def byte_level(trained: tuple[list[str], list[str]], **more) -> dict:
  tokens, pairs = trained
  types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 2) + [4, 5]
  given = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": pairs}
  return metadata(given, **more)


def same(ours: Tokenizer, theirs: tokenizers.Tokenizer, inputs: list[str]) -> None:
  want = theirs.encode_batch(inputs)
  for text, got, one in zip(inputs, ours.encode_pairs(inputs), want, strict=True):
    assert got.ids == one.ids and got.offsets == one.offsets, text
    assert ours.decode(got.ids) == theirs.decode(one.ids, skip_special_tokens=True), text


@pytest.mark.parametrize(
  "pre", ["default", "llama-bpe", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "smollm"]
)
def test_byte_level_is_as_transformers_reads_it(pre, trained, tmp_path):
  path = write(tmp_path / "x.gguf", byte_level(trained, pre=pre, add_bos_token=False))
  ours = Tokenizer.load(path)
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path, gguf_file="x.gguf"
  ).backend_tokenizer
  inputs = texts(300)
  if pre == "smollm":  # They do not know it: this is what is published with SmolLM.
    digits, words = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
  if pre == "qwen2":  # Published with a normalizer that they leave out.
    theirs.normalizer = normalizers.NFC()
  if pre in ("llama-bpe", "tekken"):  # As published.
    theirs.model.ignore_merges = True
  same(ours, theirs, inputs)
  assert ours.special == {"pad": "</s>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
  assert ours.config["chat_template"] == TEMPLATE
  assert ours.vocab_size == len(trained[0])


def test_texts_begin_and_end_as_the_file_says(trained, tmp_path):
  def ids(pre: str, **flags) -> tuple[list[int], list[int]]:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
    return Tokenizer.load(write(path, byte_level(trained, pre=pre, **flags))).affixes

  assert ids("qwen2") == ids("default") == ([], [])
  assert ids("llama-bpe") == ids("tekken") == ([1], [])
  assert ids("llama-bpe", add_bos_token=False, add_eos_token=True) == ([], [2])
  assert ids("qwen2", add_bos_token=True) == ([1], [])


def test_saved_it_is_what_transformers_opens(trained, tmp_path):
  ours = Tokenizer.load(write(tmp_path / "x.gguf", byte_level(trained, pre="llama-bpe")))
  ours.save(tmp_path / "saved")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  for text in texts(50):
    assert theirs(text)["input_ids"] == ours.encode(text) == Tokenizer.load(
      tmp_path / "saved").encode(text)  # fmt: skip
  assert theirs.chat_template == TEMPLATE and theirs.eos_token_id == ours.eos_id == 2


def sentencepiece_model(path: Path, **more):
  import sentencepiece

  target = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES), model_writer=target, minloglevel=2, hard_vocab_limit=False,
    vocab_size=700, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, **more,
  )  # fmt: skip
  path.write_bytes(target.getvalue())
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def of_pieces(theirs, users: tuple[str, ...] = (), **more) -> dict:
  """As the converter writes a SentencePiece model."""
  ids = range(theirs.vocab_size())
  kinds = [
    (theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_unused, 5), (theirs.is_byte, 6)
  ]  # fmt: skip
  types = [next((kind for test, kind in kinds if test(i)), 1) for i in ids]
  tokens, scores = [theirs.id_to_piece(i) for i in ids], [theirs.get_score(i) for i in ids]
  for i, token in enumerate(tokens):
    if token in users:  # Spelled with spaces, and of no rank.
      types[i], scores[i], tokens[i] = 4, -1000.0, token.replace("▁", " ")
  given = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
  return metadata(given, pre="default", padding_token_id=None, **more)


def test_sentencepiece_gives_the_ids_that_it_gives_by_itself(tmp_path):
  theirs = sentencepiece_model(tmp_path / "x.model")
  ours = Tokenizer.load(write(tmp_path / "x.gguf", of_pieces(theirs)))
  read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
  for text in texts(300):
    if "\0" in text:  # Which ends a text in SentencePiece's own library.
      continue
    assert ours.encode_document(text) == [1, *theirs.encode(text)], text
    spelled = text.startswith((" ", "▁")) or any(token in text for token in SPECIAL)
    if text and not spelled:  # Where theirs is no SentencePiece.
      assert read(text)["input_ids"] == ours.encode(text), text
  assert ours.special == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def test_gemmas_runs_of_spaces_come_first(tmp_path):
  runs = ["▁" * n for n in range(2, 9)]
  theirs = sentencepiece_model(
    tmp_path / "x.model", add_dummy_prefix=False, user_defined_symbols=[*runs, "\t", "<table>"]
  )
  values = of_pieces(theirs, add_space_prefix=False, users=(*runs, "\t", "<table>"))
  values["general.architecture"] = "gemma2"
  ours = Tokenizer.load(write(tmp_path / "x.gguf", values))
  read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
  for text in [*texts(300), "a        b", "   x", "<table> \t  y", "       "]:
    ids = ours.encode(text)
    if text:
      assert read(text)["input_ids"] == ids, text
    if "\0" not in text:
      assert ours.encode_document(text) == [1, *theirs.encode(text)], text
      assert ours.decode(ids[1:]) == theirs.decode(ids[1:]), text


DAMAGES = {
  "no tokens": (dict(tokens=None), "has no tokenizer.ggml.tokens"),
  "tokens twice": (lambda v: dict(tokens=v[:-1] + v[:1]), "holds a token twice"),
  "tokens are numbers": (dict(tokens=[1, 2]), "is no array of texts"),
  "types": (dict(token_type=[1, 1]), "token_type is not"),
  "unknown pre": (dict(pre="spiral"), "pre='spiral' is not known"),
  "unknown kind": (dict(model="bert"), "model='bert' is not known"),
  "pre is an array": (dict(pre=["a", "b"]), "pre is an array of 2"),
  "unknown key": (dict(lower=True), "tokenizer.ggml.lower is not known"),
  "id": (dict(bos_token_id=1 << 20), "the id of bos, 1048576, is none of"),
  "no merges": (dict(merges=None), "merges are not pairs"),
  "merges": (dict(merges=["a b c"]), "merges are not pairs"),
  "merges of nothing": (dict(merges=["日 本"]), "merges do not fit"),
  "flag": (dict(add_bos_token="yes"), "add_bos_token is 'yes'"),
  "no id": (dict(add_eos_token=True, eos_token_id=None), "adds eos to texts and has no id"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_in_one_line(name, trained, tmp_path):
  changes, said = DAMAGES[name]
  changes = changes if isinstance(changes, dict) else changes(trained[0])
  path = write(tmp_path / "x.gguf", byte_level(trained, **changes))
  with pytest.raises(InputError, match=said) as error:
    Tokenizer.load(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)
