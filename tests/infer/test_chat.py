"""Chats on the command line and the tokens that end an answer, as a folder names them."""

import dataclasses
import json

import pytest

import infer
import model
from infer.chat import as_messages, turn_ends
from infer.requests import end_ids
from infer.settings import Settings
from model.errors import InputError
from tests import commands
from tests.infer import tiny

TEMPLATE = (
  "{% for m in messages %}{{ '<bos>' ~ m.role ~ ': ' ~ m.content ~ '<mask>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chatty():
  m = tiny.model(layer_pattern=("global",), window=None)
  m.tokenizer.config["chat_template"] = TEMPLATE
  return m


PROMPTS = [[257, *f"user: {text}".encode(), 259, 10, 257, *b"assistant: "] for text in ("Hi", "é?")]


def test_a_chat_is_what_the_template_makes_of_it_and_ends_where_a_turn_does(chatty):
  assert as_messages(chatty, ["Hi", "é?"]) == PROMPTS
  assert turn_ends(chatty) == [259]


@pytest.mark.slow
def test_the_command_answers_messages(chatty, tmp_path):
  model.save(chatty, tmp_path / "run")
  done = commands.run(
    "infer", f"--checkpoint={tmp_path / 'run'}", "--chat", "--prompt=Hi", "--prompt=é?", "--json",
    "--max_new_tokens=30", "--temperature=0.9", "--stop=zz", f"--cache_dir={tmp_path / 'cache'}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  want = infer.generate(chatty, PROMPTS, max_new_tokens=30, temperature=0.9, stop=["zz", 259])
  got = [json.loads(line) for line in done.stdout.splitlines()]
  assert [values["tokens"] for values in got] == [c.tokens for c in want]


def test_a_chat_without_a_template_says_so(tmp_path):
  m = tiny.model()
  with pytest.raises(InputError, match="no chat template"):
    as_messages(m, ["Hi"])
  with pytest.raises(InputError, match="has none"):
    as_messages(dataclasses.replace(m, tokenizer=None), ["Hi"])
  model.save(m, tmp_path / "run")
  done = commands.run("infer", f"--checkpoint={tmp_path / 'run'}", "--chat", "--prompt=Hi")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("error: the tokenizer has no chat template")


def test_the_tokens_that_a_folder_names_end_an_answer_in_place_of_the_tokenizers(chatty, tmp_path):
  assert end_ids(chatty, Settings()) == {258}
  m = dataclasses.replace(chatty, end_ids=(10, 259))
  model.save(m, tmp_path / "orbax")
  model.save(m, tmp_path / "hf", format="hf")
  told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
  assert told == {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": [10, 259]}
  for path in (tmp_path / "orbax", tmp_path / "hf"):
    loaded = model.load(path)
    assert loaded.end_ids == (10, 259)
    assert end_ids(loaded, Settings(stop=[65])) == {10, 65, 259}
  (tmp_path / "hf" / "generation_config.json").unlink()
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
  assert model.load(tmp_path / "hf").end_ids == (7,)


@pytest.mark.slow
def test_transformers_reads_the_end_tokens_the_template_and_the_tokenizer(chatty, tmp_path):
  m, ends = dataclasses.replace(chatty, end_ids=(258, 259)), [258, 259]
  model.save(m, tmp_path / "hf", format="hf")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  assert theirs.generation_config.eos_token_id == ends
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  chat = [{"role": "user", "content": "Hi"}]
  assert tokenizer.apply_chat_template(chat, return_dict=False) == m.tokenizer.apply_chat_template(
    chat
  )
  assert set(tokenizer("Hi")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("value", ["x", [1, "x"], True])
def test_end_tokens_that_are_no_ids_are_refused(chatty, tmp_path, value):
  model.save(chatty, tmp_path / "hf", format="hf")
  (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
  with pytest.raises(InputError, match="eos_token_id="):
    model.load(tmp_path / "hf")
