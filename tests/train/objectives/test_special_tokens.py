"""Vocabularies have the special tokens that an objective needs, behind their own."""

import dataclasses

import pytest

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer, parse_spec
from train.config import Config, DataConfig, ObjectiveConfig
from train.data.pipeline import load_data
from train.objectives import extra_tokens

TEXTS = [
  "def encode(self, text):\n  return [self.table[c] for c in text]  # One id for each.\n" * 9,
  "The quick brown fox jumps over the lazy dog, again and again; who would stop it?" * 9,
]
SPECS = ("bytes", "char", "bpe:440", "unigram:150", "wordpiece:240")


def _extra(objective: str, spec: str) -> tuple[str, ...]:
  config = Config(objective=ObjectiveConfig(name=objective), data=DataConfig(tokenizer=spec))
  return extra_tokens(config)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("objective", ["masked_lm", "span_corruption", "ul2", "causal_lm"])
def test_extra_tokens_come_last_and_survive_saving(objective, spec, tmp_path):
  extra = _extra(objective, spec)
  plain = build_tokenizer(*parse_spec(spec), TEXTS)
  kind, size = parse_spec(spec)
  built = build_tokenizer(kind, None if size is None else size + len(extra), TEXTS, extra)
  built.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  assert loaded.fingerprint == built.fingerprint
  assert built.vocab_size == plain.vocab_size + len(extra)
  text = TEXTS[0] + "<mask> <extra_id_0>"  # Spelled in a text they are text.
  if kind != "char":
    assert loaded.encode_document(text) == plain.encode_document(text)
  ids = [built.backend.token_to_id(token) for token in extra]
  assert ids == list(range(plain.vocab_size, built.vocab_size))
  assert loaded.special_ids == plain.special_ids | set(ids)
  if objective == "masked_lm":
    assert loaded.mask_id == (plain.mask_id if plain.mask_id is not None else ids[0])
  sentinels = 100 if objective in ("span_corruption", "ul2") else 0
  assert loaded.sentinel_ids == tuple(range(built.vocab_size - 1, -1, -1)[:sentinels])


def test_a_corpus_that_is_big_enough_gives_exactly_the_asked_entries():
  texts = [" ".join(f"word{i * j % 977}x{i}" for j in range(40)) for i in range(200)]
  for spec in ("bpe:600", "wordpiece:600"):
    assert build_tokenizer(*parse_spec(spec), texts, _extra("ul2", spec)).vocab_size == 600
  with pytest.raises(InputError, match="106 special tokens need 362"):
    build_tokenizer("bpe", 358, texts, _extra("ul2", "bpe:358"))


def test_t5_vocabularies_have_their_sentinels_where_t5_has_them(tmp_path):
  """T5 publishes a SentencePiece model without them; its class adds 100, the last one first."""
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS * 9), model_writer=model, model_type="unigram", vocab_size=60,
    hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  (tmp_path / "spiece.model").write_bytes(model.getvalue())
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
  t = Tokenizer.load(tmp_path)
  assert t.sentinel_ids == tuple(range(t.vocab_size - 1, t.vocab_size - 101, -1))
  assert t.encode("<extra_id_1>")[0] == t.sentinel_ids[1]


def test_a_workdir_does_not_take_the_tokenizer_of_another_objective(tmp_path):
  (tmp_path / "text.txt").write_text("\n".join(TEXTS * 3))
  config = Config(
    cache_dir=str(tmp_path / "cache"), seq_len=32,
    data=DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bpe:400", documents="line"),
  )  # fmt: skip
  workdir = tmp_path / "run"
  workdir.mkdir()
  load_data(config, workdir=workdir)
  other = dataclasses.replace(config, objective=ObjectiveConfig(name="masked_lm"))
  with pytest.raises(InputError, match="special tokens differ in '<mask>'"):
    load_data(other, workdir=workdir)
