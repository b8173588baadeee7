"""Instruction tuning: what is learned of a conversation, by a reference that counts characters."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import InputError
from model.layers import noisy
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer
from tests.commands import ROOT, run
from tests.train.objectives import tasks
from tests.train.objectives.chat_templates import TEMPLATES
from train.data import conversations
from train.data.pipeline import load_data
from train.data.turns import rendered
from train.objectives import make_objective

LOOP = "{% for m in messages %}"
NONE: dict[str, Any] = dict.fromkeys(conversations.COLUMNS)
SYSTEM = {"role": "system", "content": "You answer."}
TURNS = [
  {"role": "user", "content": "What is two and two?"},
  {"role": "assistant", "content": "It is four."},
  {"role": "user", "content": "And it is four, why?"},
  {"role": "assistant", "content": "assistant: by\ncounting."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  """A token for each character, but for two that are special."""
  return build_tokenizer("bytes", None, (), extra=("<|im_end|>", "</s>"))


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
  config = tokenizer.config | {"chat_template": template, "eos_token": "</s>"}
  return Tokenizer(tokenizer.backend, config)


def by_characters(text: str, messages: list[dict], closing: str) -> list[tuple[int, int]]:
  """Where the answers stand in a text, from the left, and what ends them."""
  spans, at = [], 0
  for message in messages:
    shown = next(s for s in (message["content"], message["content"].replace("\n", " "))
                 if text.find(s, at) >= 0)  # fmt: skip
    begin = text.index(shown, at)
    at = begin + len(shown)
    if message["role"] == "assistant":
      at += len(closing) * text.startswith(closing, at)
      spans.append((begin, at))
  return spans


@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_tokens_are_those_that_a_reference_finds_by_characters(tokenizer, name):
  template, closing = TEMPLATES[name]
  own = with_template(tokenizer, template)
  for messages in (TURNS, TURNS[:2], [SYSTEM, *TURNS]):
    text, spans = rendered(own, messages)
    assert text == own.apply_chat_template(messages, tokenize=False)
    want = by_characters(text, messages, closing)
    if name == "llama2":  # A space belongs to the content's token, not to the prompt's.
      assert all(text[b - 1] == " " for b, _ in want)
    assert [text[b:e] for b, e in spans] == [text[b:e] for b, e in want]

    found = conversations.encode(NONE | {"messages": messages}, own, "row 1")
    offsets = own.backend.encode(text, add_special_tokens=False).offsets
    inside = [any(a < e and b < z for b, e in want) for a, z in offsets]
    assert [t > 0 for t in found.turns] == inside
    assert found.ids == own.apply_chat_template(messages)


def test_thoughts_that_a_template_keeps_are_learned(tokenizer):
  own = with_template(tokenizer, TEMPLATES["thinking"][0])
  thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour."}
  text, [span] = rendered(own, [TURNS[0], thought])
  assert text[slice(*span)] == "hm\n</think>\n\nFour.<|im_end|>"
  text, [first, _] = rendered(own, [TURNS[0], thought, TURNS[2], TURNS[3]])
  assert text[slice(*first)] == "Four.<|im_end|>"


@pytest.mark.parametrize(
  "template",
  [
    LOOP + "{{ m.content }}{{ m.content }}{% endfor %}",
    LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    LOOP + "{{ m.content | length }}: {{ m.content }}{% endfor %}",
    LOOP + "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}",
  ],
  ids=["twice", "left out", "length", "one mark"],
)
def test_a_template_that_does_not_tell_is_refused_with_an_example(tokenizer, template):
  with pytest.raises(InputError, match="generation"):
    rendered(with_template(tokenizer, template), TURNS)


def test_each_form_and_choice_of_turns_learns_what_it_says(tokenizer):
  own = with_template(tokenizer, TEMPLATES["chatml"][0])
  say = lambda **values: conversations.encode(NONE | values, own, "r")
  text = lambda e, k=None: own.backend.decode(
    [i for i, t in zip(e.ids, e.turns, strict=True) if (t > 0 if k is None else t == k)],
    skip_special_tokens=False,
  )
  whole = say(messages=TURNS)
  assert text(whole, 2) == "assistant: by\ncounting.<|im_end|>"
  assert own.backend.decode(whole.ids[: whole.ends[0]], skip_special_tokens=False).endswith(
    "four.<|im_end|>"
  )
  skipped = say(messages=[*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS[2:]])
  assert skipped.ids == whole.ids and text(skipped) == text(whole, 2)
  filled = [{"weight": None} | turn for turn in TURNS]  # As tables fill up what some messages have.
  assert say(messages=[*filled[:1], TURNS[1] | {"weight": 0}, *filled[2:]]) == skipped
  pair = say(prompt="What is two and two?", completion="It is four.")
  assert pair == say(messages=TURNS[:2]) == say(prompt=TURNS[:1], completion=TURNS[1:2])
  assert pair == say(conversations=[{"from": "human", "value": TURNS[0]["content"]},
                                    {"from": "gpt", "value": "It is four."}])  # fmt: skip
  assert pair == say(instruction="What is two and two?", output="It is four.", input="")
  more = say(instruction="Add.", input="2, 2", output="4")
  assert more == say(prompt="Add.\n\n2, 2", completion="4")

  plain = conversations.encode(NONE | dict(prompt="2+2=", completion="4"), tokenizer, "r")
  assert plain.ids == tokenizer.encode("2+2=4")
  assert plain.turns == [0] * 5 + [1, 1]


@pytest.mark.parametrize(
  "values, words",
  [
    (dict(text="x"), "no column of a conversation"),
    (dict(prompt="a", completion="b", output="c", instruction="d"), "give one of"),
    (dict(messages=[{"role": "user", "content": "a"}]), "nothing in this conversation is learned"),
    (dict(messages=[TURNS[0], TURNS[1] | {"weight": 0}]), "nothing in this conversation"),
    (dict(messages=[TURNS[0], TURNS[1] | {"weight": 2}]), "weight 2"),
    (dict(messages="hello"), "a list of messages"),
    (dict(messages=[{"text": "a"}]), "'role'"),
    (dict(prompt="a", completion=" "), "completion is empty"),
    (dict(prompt=[TURNS[0]], completion="b"), "both"),
    (dict(conversations=[{"from": "who", "value": "a"}]), "'from'"),
  ],
  ids=str,
)
def test_rows_that_teach_nothing_are_refused_with_their_place(tokenizer, values, words):
  own = with_template(tokenizer, TEMPLATES["chatml"][0])
  with pytest.raises(InputError, match=f"line 3.*{words}"):
    conversations.encode(NONE | values, own, "file, line 3")


def chats(folder, **changes):
  """A run on three conversations of 1, 2 and 3 exchanges, in a template of a file."""
  template = folder / "chat.jinja"
  template.write_text(TEMPLATES["chatml"][0])
  ask = lambda i: {"role": "user", "content": f"q{i}"}
  say = lambda i: {"role": "assistant", "content": f"a{i}"}
  lines = [{"messages": [m for i in range(n) for m in (ask(i), say(i))]} for n in (1, 2, 3)]
  tasks.write(folder / "rows.jsonl", lines)
  return tasks.config(folder, "sft", "decoder", chat_template=str(template), **changes)


def test_what_is_too_long_is_an_error_dropped_or_cut_behind_an_answer_and_counted(tmp_path):
  room = dict(seq_len=170, max_positions=512)
  with pytest.raises(InputError, match=r"line 3: the conversation has 195 tokens .*1 of 3"):
    load_data(chats(tmp_path, **room))
  dropped = load_data(chats(tmp_path, too_long="drop", **room))
  assert (dropped.dropped_documents, dropped.truncated_documents) == (1, 0)
  cut = load_data(chats(tmp_path, too_long="truncate", **room))
  assert (cut.dropped_documents, cut.truncated_documents) == (0, 1)
  batches = [cut.batch(i) for i in range(cut.rows_per_epoch)]
  assert sum(int((b["weights"] > 0).sum()) for b in batches) == 5 * len("a0<|im_end|>")
  with pytest.raises(InputError, match="all 3 conversations are too long"):
    load_data(chats(tmp_path, too_long="truncate", seq_len=20))


def test_the_last_answer_alone_is_learned_where_that_is_asked_for(tmp_path):
  everything = tasks.epoch(chats(tmp_path, seq_len=256, max_positions=512))[2]
  last = tasks.epoch(chats(tmp_path, seq_len=256, max_positions=512, turns="last"))[2]
  assert everything["weights"].sum() == 6 * len("a0<|im_end|>")
  assert last["weights"].sum() == 3 * len("a0<|im_end|>")


def test_noise_is_even_and_as_large_as_the_length_of_its_text_says():
  seg = jnp.array([[1] * 100 + [2] * 300 + [0] * 112])
  x = jnp.zeros((1, 512, 64))
  noise = np.asarray(noisy(x, seg, 5.0, jax.random.key(0)))
  for number, length in ((1, 100), (2, 300)):
    part, most = noise[np.asarray(seg == number)], 5.0 / np.sqrt(length * 64)
    assert 0.99 * most < np.abs(part).max() <= most
    assert np.std(part) == pytest.approx(most / np.sqrt(3), rel=0.02)


def test_noise_is_drawn_in_training_alone(tmp_path):
  config, _, batch = tasks.epoch(chats(tmp_path, seq_len=256, max_positions=512, noise=5.0))
  objective, params = make_objective(config), tasks.fresh(config)
  assert objective.samples
  net = tasks.network(config, params)
  of = lambda objective, key: float(objective.loss(net, batch, key).terms["loss"])
  loss = lambda key: of(objective, key)
  without = dataclasses.replace(config.objective, noise=0.0)
  quiet = make_objective(dataclasses.replace(config, objective=without))
  assert loss(None) == of(quiet, jax.random.key(1))
  assert loss(jax.random.key(1)) != loss(None)
  assert loss(jax.random.key(1)) != loss(jax.random.key(2))


def test_an_encoder_decoder_is_sent_to_seq2seq(tmp_path):
  with pytest.raises(InputError, match=r"sft.*trains model.shape decoder.*objective.name=seq2seq"):
    tasks.config(tmp_path, "sft", "encoder_decoder")


@pytest.mark.slow
def test_the_command_tunes_and_a_tuned_model_chats(tmp_path):
  chats(tmp_path)
  shared = [f"--config.data.source={tmp_path / 'rows.jsonl'}", "--config.data.tokenizer=bytes",
            f"--config.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
  done = run(
    "train", f"--config={ROOT / 'tests' / 'train' / 'run_config.py'}",
    f"--workdir={tmp_path / 'run'}", "--config.objective.name=sft", "--config.seq_len=256",
    "--config.model.max_positions=256", "--config.data.documents=file",
    f"--config.data.chat_template={tmp_path / 'chat.jinja'}", "--config.objective.noise=5.0",
    "--config.steps=120", "--config.data.validation_fraction=0.0", *shared,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  question, arrow, answer = done.stdout.partition("sample: ")[2].partition(" -> ")
  assert question == "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n" and arrow
  assert answer.startswith("a"), answer
  asked = run(
    "infer", f"--checkpoint={tmp_path / 'run'}", "--chat", "--prompt=q0", "--json",
    "--max_new_tokens=8",
  )  # fmt: skip
  assert asked.returncode == 0, asked.stderr
  assert json.loads(asked.stdout)["text"]
