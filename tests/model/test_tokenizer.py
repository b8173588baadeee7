"""Tokenizers: exact round trips, exact special tokens, and the ids of the reference libraries."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from model import documents
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer, parse_spec

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "</s>", "<unk>", "[PAD]", "[CLS]", "[SEP]", "[UNK]"]
LINES = [
  "The quick brown fox jumps over the lazy dog, again and again; who would stop it?",
  "def encode(self, text):\n  return [self.table[c] for c in text]  # One id for each.\n",
  "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve café.",
  f"spelled: {' '.join(SPECIAL)} {''.join(SPECIAL)}",
]
STRINGS = [
  *LINES, "", " ", "a", "  two  spaces  ", "\ttab\r\nline\n\n", "日本語 mixed 😀 text",
  "ﬁ ½ ＡＢ é", "12345 67.89%", "x" * 300, "▁already marked▁", "e\u0301 combined",
  "don't I'll we've",
]  # fmt: skip
SPECS = ["bytes", "char", "bpe:300", "unigram:120", "wordpiece:200"]


@pytest.fixture(scope="module")
def built() -> dict[str, Tokenizer]:
  return {spec: build_tokenizer(*parse_spec(spec), LINES * 20) for spec in SPECS}


def test_bytes_are_their_own_ids_between_begin_and_end(built):
  data = bytes(range(128)).decode() + "é日😀"
  assert built["bytes"].encode(data) == [257, *data.encode(), 258]
  assert [built["bytes"].pad_id, built["bytes"].mask_id, built["bytes"].vocab_size] == [
    256, 259, 260,
  ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_bytes_and_bpe_give_back_any_text(text):
  for spec in ("bytes", "bpe:300"):
    t = _once(spec)
    ids = t.encode_document(text)
    assert t.decode(ids) == text
    assert [i for i in ids if i in t.special_ids] == [t.bos_id, t.eos_id]


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=sorted(set("".join(LINES))), max_size=60))
def test_characters_give_back_any_text_of_theirs(text):
  t = _once("char")
  assert t.encode_document(text) == [sorted(set("".join(LINES))).index(c) for c in text]
  assert t.decode(t.encode(text)) == text


_KEPT: dict[str, Tokenizer] = {}


def _once(spec: str) -> Tokenizer:
  if spec not in _KEPT:
    _KEPT[spec] = build_tokenizer(*parse_spec(spec), LINES)
  return _KEPT[spec]


@pytest.mark.parametrize("spec", SPECS)
def test_special_tokens_spelled_in_a_document_are_ordinary_text(built, spec):
  t = built[spec]
  prefix, suffix = t.affixes
  for text in LINES:
    ids = t.encode_document(text)
    inside = ids[len(prefix) : len(ids) - len(suffix)]
    assert ids == prefix + inside + suffix
    unknown = {t.backend.token_to_id(t.special["unk"])} if "unk" in t.special else set()
    assert not (t.special_ids - unknown) & set(inside)
  marked = t.special.get("eos") or t.special.get("sep")
  if marked:  # A prompt, in contrast, may hold them.
    assert t.backend.token_to_id(marked) in t.encode(f"a{marked}b", add_special_tokens=False)


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_has_no_closing_special_token(built, spec):
  t = built[spec]
  text = "the lazy dog"
  assert t.encode_prompt(text) + t.affixes[1] == t.encode(text)


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_folder_is_the_same_tokenizer_and_opens_in_transformers(built, spec, tmp_path):
  t = built[spec]
  t.save(tmp_path)
  again = Tokenizer.load(tmp_path)
  assert again.fingerprint == t.fingerprint
  strings = LINES if spec == "char" else STRINGS
  assert again.encode_batch(strings) == t.encode_batch(strings)
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  for text in strings:
    assert theirs(text)["input_ids"] == t.encode(text)
    assert theirs.decode(t.encode(text), skip_special_tokens=True) == t.decode(t.encode(text))
  roles = ("pad", "bos", "eos", "mask")
  assert [getattr(theirs, f"{r}_token_id") for r in roles] == [getattr(t, f"{r}_id") for r in roles]


def test_the_same_corpus_gives_the_same_tokenizer_in_another_process(built):
  program = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from test_tokenizer import LINES, SPECS\n"
    "from model.vocabulary import build_tokenizer, parse_spec\n"
    "print([build_tokenizer(*parse_spec(s), LINES * 20).fingerprint for s in SPECS])\n"
  )
  for _ in range(2):
    run = subprocess.run(
      [sys.executable, "-c", program, str(Path(__file__).parent)],
      cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == str([built[s].fingerprint for s in SPECS])


SENTENCEPIECE = {
  "t5": dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=150),
  "llama": dict(model_type="bpe", byte_fallback=True, vocab_size=400,
                remove_extra_whitespaces=False, normalization_rule_name="identity",
                split_digits=True),
  "bpe": dict(model_type="bpe", vocab_size=150),
  "plain": dict(model_type="unigram", vocab_size=150, normalization_rule_name="identity",
                add_dummy_prefix=False, user_defined_symbols=["<sep>"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_sentencepiece_model_gives_the_ids_that_it_gives_by_itself(kind, tmp_path):
  import sentencepiece

  target = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES * 20), model_writer=target, minloglevel=2, hard_vocab_limit=False,
    **SENTENCEPIECE[kind],
  )  # fmt: skip
  file = tmp_path / "spiece.model"
  file.write_bytes(target.getvalue())
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
  ours = Tokenizer.load(file)
  known = lambda i: i if i >= 0 else None
  assert ours.vocab_size == theirs.vocab_size()
  assert (ours.bos_id, ours.eos_id) == (known(theirs.bos_id()), known(theirs.eos_id()))
  ends = [[i] if i is not None else [] for i in (ours.bos_id, ours.eos_id)]
  for text in (*STRINGS, "a<sep>b"):
    ids = theirs.encode(text)
    assert ours.encode_document(text) == [*ends[0], *ids, *ends[1]], text
    if theirs.unk_id() not in ids:  # Which SentencePiece shows and Transformers leaves out.
      assert ours.decode(ids) == theirs.decode(ids), text
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": False}))
  assert Tokenizer.load(tmp_path).encode_document("a dog")[-1] != theirs.eos_id()


def test_gpt2_files_give_the_published_ids():
  if not SHARED.is_dir():
    pytest.skip(f"{SHARED} is not there")
  t = Tokenizer.load(SHARED / "gpt2_bpe")
  assert t.vocab_size == 50_257
  assert t.encode("Hello world, this is GPT-2!")[:4] == [15496, 995, 11, 428]
  assert t.eos_id == t.bos_id == 50_256
  text = "<|endoftext|> is text in a document"
  assert 50_256 not in t.encode_document(text)
  assert t.decode(t.encode_document(text)) == text


def test_tinyshakespeare_has_65_characters():
  file = SHARED / "tinyshakespeare" / "input.txt"
  if not file.is_file():
    pytest.skip(f"{file} is not there")
  t = build_tokenizer("char", None, [file.read_text()])
  assert t.vocab_size == 65
  assert t.special == {}


def test_a_tokenizer_file_is_used_with_its_own_template_and_never_truncates(tmp_path):
  words = {"<unk>": 0, "<s>": 1, "[END]": 2, "a": 3, "b": 4}
  backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<unk>", "<s>", "[END]"])
  backend.post_processor = processors.TemplateProcessing(
    single="<s> <s> $A [END]", special_tokens=[("<s>", 1), ("[END]", 2)]
  )
  backend.enable_truncation(3)
  backend.enable_padding(length=8)
  file = tmp_path / "tokenizer.json"
  backend.save(str(file))
  t = Tokenizer.load(file)
  assert t.encode_document("a b a [END] b") == [1, 1, 3, 4, 3, 0, 4, 2]
  assert t.encode_prompt("a b") == [1, 1, 3, 4]
  assert (t.bos_id, t.eos_id, t.pad_id) == (1, None, None)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[END]"}}))
  assert Tokenizer.load(tmp_path).eos_id == 2


@pytest.mark.parametrize("spec", ["bytes", "bpe:300", "wordpiece:200", "unigram:120"])
def test_a_long_document_encodes_as_a_whole_although_it_is_cut(built, spec, monkeypatch):
  t = built[spec]
  text = "\n".join(LINES * 30)
  whole = t.encode_document(text)
  monkeypatch.setattr(documents, "LONG", 2000)
  monkeypatch.setattr(documents, "GROUP", 5000)
  assert len(documents.parts_of(text, lambda some: t._encode(t._literal, some, False))) > 3
  assert t.encode_document(text) == whole


def test_wrong_input_is_named(built, tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "x.model").write_bytes(b"nothing")
  (tmp_path / "empty").mkdir()
  cases = [
    (lambda: built["char"].encode("日"), "'日'"),
    (lambda: built["char"].encode_document("日"), "'日'"),
    (lambda: built["bytes"].encode("\ud800"), "Unicode"),
    (lambda: Tokenizer.load(tmp_path / "none"), "does not exist"),
    (lambda: Tokenizer.load(tmp_path / "tokenizer.json"), "tokenizer.json is not"),
    (lambda: Tokenizer.load(tmp_path / "x.model"), "not a SentencePiece"),
    (lambda: Tokenizer.load(tmp_path / "empty"), "holds no tokenizer"),
    (lambda: build_tokenizer("bpe", 258, LINES), "need 259"),
    (lambda: build_tokenizer("wordpiece", 20, LINES), "too small"),
    (lambda: build_tokenizer("unigram", 5, LINES), "cannot be trained"),
    (lambda: build_tokenizer("char", None, []), "empty"),
    (lambda: parse_spec("bpe"), "bpe:N"),
    (lambda: parse_spec("char:5"), "without a number"),
    (lambda: parse_spec("bpe:x"), "whole number"),
  ]
  for call, words in cases:
    with pytest.raises(InputError, match=words):
      call()


@pytest.mark.parametrize("spec", SPECS)
def test_pairs_hold_the_tokens_of_both_texts_and_their_characters(built, spec):
  t, a, b = built[spec], LINES[0], LINES[2]
  one, two = t.encode_pairs([a])[0], t.encode_pairs([a], [b])[0]
  assert one.ids == t.encode(a)
  bodies = [t.encode(text, add_special_tokens=False) for text in (a, b)]
  for number, (text, body) in enumerate(zip((a, b), bodies, strict=True)):
    own = [i for i, s in enumerate(two.sequence) if s == number]
    assert [two.ids[i] for i in own] == body
    covered = {c for i in own for c in range(*two.offsets[i])}
    assert {c for c, letter in enumerate(text) if letter != " "} <= covered <= set(range(len(text)))
    assert {two.types[i] for i in own} == {number}
  special = [i for i, s in zip(two.ids, two.sequence, strict=True) if s is None]
  assert set(special) <= t.special_ids and bool(special) == (spec != "char")


def test_pairs_take_spelled_special_tokens_for_text_where_asked_to(built):
  t, spelled = built["wordpiece:200"], "stop [SEP] it"
  ids = lambda literal: t.encode_pairs(["the"], [spelled], literal=literal)[0].ids
  assert ids(False).count(t.encode("")[-1]) == 3 and ids(True).count(t.encode("")[-1]) == 2
  assert t.encode_pairs([spelled], literal=True)[0].ids == t.encode_document(spelled)
  with pytest.raises(InputError, match="2 texts and 1 second texts"):
    t.encode_pairs(["a", "b"], ["c"])
