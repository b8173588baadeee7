"""Chat templates: rendered as Transformers does, and refused where they do what none may."""

import json
import time

import pytest

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer

CHATML = (
  "{% for message in messages %}\n"
  "    {% if loop.first and message.role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}\n"
  "  {{- '<s>' ~ message['role'] + '\n' }}\n"
  "  {% if message.role == 'assistant' %}\n"
  "{% generation %}{{ message['content'] | trim }}</s>{% endgeneration %}\n"
  "  {% else %}{{ message.content }}</s>{% endif %}\n"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
STRICT = (
  "{{ bos_token }}{% set ns = namespace(turn=0) %}{% for m in messages %}"
  "{% if (m['role'] == 'user') != (ns.turn % 2 == 0) %}"
  "{{ raise_exception('Roles must alternate: user, assistant, …') }}{% endif %}"
  "{% set ns.turn = ns.turn + 1 %}"
  "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
  "{% else %} {{ m['content'].strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
  "{%- if tools %}Tools, {{ strftime_now('%Y') }}:\n{%- for t in tools %}\n"
  "{{ t | tojson(indent=2) }}"
  "{% if loop.index >= 2 %}{% break %}{% endif %}{%- endfor %}{%- endif %}"
  "{%- macro shown(m, sep=': ') %}{{ m.role|upper }}{{ sep }}{{ m.content }}{% endmacro %}"
  "{%- for m in messages[::-1] if m.content is string %}\n{{ shown(m) }}{{ mask_token }}"
  "{%- for c in m.calls or [] %} {{ '%s(%d)' % (c.name, c.n) }} {{ c | tojson }}{%- endfor %}"
  "{%- endfor %}{% set kept %}{{ wish | default('none') }}{% endset %}\n{{ kept * 2 }}"
)
USER, ANSWER = (
  {"role": "user", "content": " Hi <é> & 日本? "},
  {"role": "assistant", "content": " Yes. "},
)
CHATS = [
  [USER], [USER, ANSWER], [USER, ANSWER, {"role": "user", "content": "Why?"}, ANSWER],
  [{"role": "system", "content": "Short."}, USER, {**ANSWER, "calls": [{"name": "f", "n": 2}]}],
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return build_tokenizer("bpe", 300, ["Hi, why? Yes. user assistant"], extra=("<s>", "</s>"))


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("saved")
  tokenizer.save(folder)
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", [CHATML, STRICT, TOOLS], ids=["chatml", "strict", "tools"])
def test_templates_are_rendered_as_transformers_does(tokenizer, theirs, template):
  tools = [{"name": f"t{i}", "text": "<é>"} for i in range(3)]
  for chat in CHATS:
    for more in ({}, {"add_generation_prompt": True}, {"tools": tools, "wish": "x"}):
      settings = dict(chat_template=template, **more)
      try:
        want = theirs.apply_chat_template(chat, tokenize=False, **settings)
      except Exception as error:
        with pytest.raises(InputError, match=str(error)[:20]):
          tokenizer.apply_chat_template(chat, **settings)
        continue
      assert tokenizer.apply_chat_template(chat, tokenize=False, **settings) == want
      ids = theirs.apply_chat_template(chat, return_dict=False, **settings)
      assert tokenizer.apply_chat_template(chat, **settings) == ids


def test_what_the_assistant_wrote_is_marked_as_transformers_does(tokenizer, theirs):
  for chat in CHATS:
    settings = dict(chat_template=CHATML, return_assistant_tokens_mask=True)
    want = theirs.apply_chat_template(chat, return_dict=True, **settings)
    got = tokenizer.apply_chat_template(chat, **settings)
    assert got == {name: want[name] for name in ("input_ids", "assistant_masks")}
    written = [i for i, own in zip(*got.values(), strict=True) if own]
    answers = [m["content"].strip() for m in chat if m["role"] == "assistant"]
    assert tokenizer.backend.decode(written, skip_special_tokens=False) == "".join(
      f"{answer}</s>" for answer in answers
    )
  with pytest.raises(InputError, match="does not mark"):
    tokenizer.apply_chat_template(CHATS[1], chat_template=STRICT, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("template", [CHATML, STRICT], ids=["chatml", "strict"])
def test_a_last_message_goes_on_as_in_transformers(tokenizer, theirs, template):
  settings = dict(chat_template=template, continue_final_message=True, tokenize=False)
  got = tokenizer.apply_chat_template(CHATS[1], **settings)
  assert got == theirs.apply_chat_template(CHATS[1], **settings)
  assert got.rstrip().endswith("Yes.")


def test_the_template_comes_from_the_folder(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  render = lambda **kwargs: Tokenizer.load(tmp_path).apply_chat_template(
    [USER], tokenize=False, **kwargs
  )
  with pytest.raises(InputError, match="no chat template"):
    render()
  several = [
    {"name": n, "template": f"{n}: {{{{ messages[0].role }}}}"} for n in ("tool_use", "rag")
  ]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
  assert render(tools=[]) == render(chat_template="tool_use") == "tool_use: user"
  assert render(chat_template="own {{ pad_token }}") == "own <pad>"
  with pytest.raises(InputError, match="name one of tool_use, rag"):
    render()
  (tmp_path / "chat_template.jinja").write_text("from a file")
  assert render() == "from a file"
  Tokenizer.load(tmp_path).save(tmp_path / "again")
  assert Tokenizer.load(tmp_path / "again").config["chat_template"] == "from a file"


REFUSED = {
  "{{ messages.__class__.__mro__ }}": "may not read '__class__'",
  "{{ ''|attr('__class__') }}": "may not read",
  "{{ raise_exception.__globals__ }}": "may not read",
  "{{ messages.append(1) }}": "may not read 'append'",
  "{% set ns = namespace(__class__=1) %}": "__class__",
  "{{ '{0.__class__}'.format(1) }}": "may not read",
  "{% for i in range(10**9) %}{% endfor %}": "Range too big",
  "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}": "steps",
  "{% for i in range(900) %}" + "x" * 9000 + "{% endfor %}": "characters",
  "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "without end",
  "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}":
    "characters",
  "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
  "{% set n.x = y %}{% endfor %}": "characters",
  "{{ 'x' * 10**9 }}": "characters", "{{ 10**10**10 }}": "counts",
  "{{ '%999999999d' % 1 }}": "pads", "{{ '{:999999999}'.format(1) }}": "pads",
  "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}": "replace",
  "{% include '/etc/passwd' %}": "loader", "{% for %}": "cannot be read",
  "{{ nothing.there }}": "undefined", "{{ raise_exception('no\nsuch role') }}": "no such role",
}  # fmt: skip


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_does_harm_or_fails_is_refused_in_one_line(tokenizer, template):
  start = time.monotonic()
  with pytest.raises(InputError, match=REFUSED[template]) as caught:
    tokenizer.apply_chat_template([USER], chat_template=template)
  assert "\n" not in str(caught.value) and time.monotonic() - start < 5


def test_large_numbers_and_long_texts_are_no_harm_by_themselves(tokenizer):
  template = (
    "{% macro f(x) %}{{ x }}{% endmacro %}{% set n = namespace(t=messages[0].time) %}"
    "{{ n.t | tojson }} {{ f(n.t) }} {{ n.t | string }} {{ nothing | default(9999999) }} "
    "{{ n.t + 1 }}{{ '%s: {} {}'.strip() }}"
    "{{ messages[0].content.split('x')[-1] | replace('b', 'cc') | trim }}"
  )
  chat = [{"role": "user", "content": "2024 * x" + "b" * 400_000, "time": 1_700_000_000}]
  got = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
  assert got == "1700000000 1700000000 1700000000 9999999 1700000001%s: {} {}" + "cc" * 400_000


def test_messages_that_are_none_are_named(tokenizer):
  for chat, words in (
    ([], "empty"), ("Hi", "list of messages"), ([{"content": "x"}], "message 0"),
    ([USER, "x"], "message 1"), ([{"role": "user", "content": b"x"}], "bytes"),
    ([{"role": "user", "content": object()}], "object"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=words):
      tokenizer.apply_chat_template(chat, chat_template=CHATML)
  for more, words in (
    (dict(continue_final_message=True, add_generation_prompt=True), "exclude each other"),
    (dict(return_assistant_tokens_mask=True, tokenize=False), "leave out tokenize=False"),
  ):
    with pytest.raises(InputError, match=words):
      tokenizer.apply_chat_template([USER], chat_template=CHATML, **more)
