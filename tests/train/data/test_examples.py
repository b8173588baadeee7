"""Examples of tasks: what a batch holds of tables and parallel files, and what is refused."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.template import Template
from tests.train.objectives import tasks
from train.data.arrays import Column, Corpus
from train.data.encode import first_tokens
from train.data.pipeline import load_data
from train.data.windows import window_starts, windows


def texts_of(batch, data, side="") -> list[str]:
  """The text of each segment of a side, without special tokens."""
  out = []
  for tokens, segments in zip(batch[f"{side}tokens"], batch[f"{side}segments"], strict=True):
    for number in range(1, segments.max() + 1):
      out.append(data.tokenizer.decode(tokens[segments == number]))
  return out


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet"])
def test_every_table_gives_the_same_texts_and_labels(tmp_path, ending):
  lines = [dict(text=r["text"], label=r["label"]) for r in tasks.rows(9)]
  path, columns = tmp_path / f"table{ending}", {}
  if ending.startswith(".jsonl"):
    packed = gzip.open if ending.endswith("gz") else open
    with packed(path, "wt") as f:
      f.writelines(json.dumps(line) + "\n" for line in lines)
  elif ending == ".parquet":
    import pyarrow
    from pyarrow import parquet

    table = {"text": [r["text"] for r in lines], "label": [str(r["label"]) for r in lines]}
    parquet.write_table(pyarrow.table(table), path)
  else:
    separator = "," if ending == ".csv" else "\t"
    path.write_text("".join(f"{r['label']}{separator}{r['text']}\n" for r in lines))
    columns = dict(text="1", label="0")
  made = tasks.config(tmp_path, "classification", source=str(path), **columns)
  _, data, batch = tasks.epoch(made)
  assert data.labels == ("7", "no", "yes")
  there = batch["text_weights"] > 0
  found = zip(texts_of(batch, data), batch["text_labels"][there], strict=True)
  want = [(r["text"], data.labels.index(str(r["label"]))) for r in lines]
  assert sorted(found) == sorted(want)


def test_labels_are_sorted_as_numbers_or_as_data_labels_says(tmp_path):
  lines = [dict(text="a", label=label) for label in (10, 9.0, "-1", 9, True)]
  tasks.write(tmp_path / "rows.jsonl", lines[:4])
  assert load_data(tasks.config(tmp_path, "classification")).labels == ("-1", "9", "10")
  tasks.write(tmp_path / "rows.jsonl", lines)
  assert load_data(tasks.config(tmp_path, "classification")).labels == ("-1", "10", "9", "true")
  order = ("true", "9", "10", "-1", "never")
  _, data, batch = tasks.epoch(tasks.config(tmp_path, "classification", labels=order))
  assert data.labels == order
  assert sorted(batch["text_labels"][batch["text_weights"] > 0]) == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("value", [["x", "z"], "x|z", "z, x", "x|z|"])
def test_several_labels_are_a_list_or_separated_text(tmp_path, value):
  lines = [dict(text="a", labels="y"), dict(text="b", labels=[]), dict(text="c", labels=value)]
  tasks.write(tmp_path / "rows.jsonl", lines)
  made = tasks.config(tmp_path, "classification", problem="multi_label", label="labels")
  _, data, batch = tasks.epoch(made)
  assert data.labels == ("x", "y", "z")
  found = dict(zip(texts_of(batch, data), batch["text_labels"][0].tolist(), strict=False))
  assert found == {"a": [0, 1, 0], "b": [0, 0, 0], "c": [1, 0, 1]}


def parallel(folder: Path, lines: int, target_lines: int, name="train") -> dict[str, str]:
  paths = [folder / f"{name}.{language}.gz" for language in ("en", "de")]
  for path, count in zip(paths, (lines, target_lines), strict=True):
    with gzip.open(path, "wt") as f:
      f.writelines(f"{path.name[-5:-3]} {i}\r\n" for i in range(count))
  return dict(source=str(paths[0]), target=str(paths[1]))


def test_parallel_files_give_pairs_line_by_line(tmp_path):
  held_out = parallel(tmp_path, 3, 3, "val")
  made = tasks.config(
    tmp_path, "seq2seq", "encoder_decoder", **parallel(tmp_path, 20, 20),
    validation_source=held_out["source"], validation_target=held_out["target"],
  )  # fmt: skip
  _, data, batch = tasks.epoch(made)
  pairs = zip(texts_of(batch, data), texts_of(batch, data, "decoder_"), strict=True)
  assert sorted(pairs) == sorted((f"en {i}", f"de {i}") for i in range(20))
  (validation,) = data.validation_batches()
  assert texts_of(validation, data) == [f"en {i}" for i in range(3)]
  row = batch["decoder_segments"][0] == 1
  tokens, targets = batch["decoder_tokens"][0][row], batch["decoder_targets"][0][row]
  assert tokens[0] == data.tokenizer.pad_id and targets[-1] == data.tokenizer.eos_id
  assert (tokens[1:] == targets[:-1]).all() and (batch["decoder_weights"][0][row] == 1).all()


def test_words_have_their_tag_at_their_first_token(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", [dict(words=["ab", "c", "def"], tags=["A", "C", "D"])])
  _, data, batch = tasks.epoch(tasks.config(tmp_path, "tagging"))
  used = batch["weights"][0] > 0
  text = [data.tokenizer.decode([t]) for t in batch["tokens"][0]]
  assert [text[i] for i in np.flatnonzero(used)] == ["a", "c", "d"]
  assert [data.labels[t] for t in batch["targets"][0][used]] == ["A", "C", "D"]


def test_a_word_takes_the_first_token_that_holds_some_of_it():
  spans = lambda *pairs: np.array(pairs).reshape(-1, 2)
  assert first_tokens(["ab", "c"], spans((0, 1), (1, 2), (2, 4))).tolist() == [0, 2]
  assert first_tokens(["ab", "c"], spans((0, 0), (0, 2), (2, 3), (3, 4))).tolist() == [1, 3]
  assert first_tokens(["a", "b"], spans((0, 3))).tolist() == [0, -1]
  assert first_tokens(["a", "\u200b", "b"], spans((0, 1), (4, 5))).tolist() == [0, -1, 1]


def test_pairs_go_through_the_template_with_token_types(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(6))
  made = tasks.config(tmp_path, "pairs", token_types=2, tokenizer="wordpiece:60", packing=False)
  _, data, batch = tasks.epoch(made)
  for tokens, types, segments in zip(
    batch["tokens"], batch["types"], batch["segments"], strict=True
  ):
    length = int((segments > 0).sum())
    first = data.tokenizer.decode(tokens[:length][types[:length] == 0])
    second = data.tokenizer.decode(tokens[:length][types[:length] == 1])
    want = data.tokenizer.backend.encode(first, second)
    assert tokens[:length].tolist() == want.ids and types[:length].tolist() == want.type_ids
  assert Template.of(data.tokenizer).added(pair=True) == 3


@settings(deadline=None, max_examples=200)
@given(
  length=st.integers(1, 60), room=st.integers(2, 20), stride=st.integers(1, 19),
  first=st.integers(0, 59), size=st.integers(1, 20),
)  # fmt: skip
def test_windows_hold_every_token_and_every_answer_whole(length, room, stride, first, size):
  stride, first = min(stride, room - 1), min(first, length - 1)
  last = min(first + min(size, room) - 1, length - 1)
  starts = window_starts(length, room, stride)
  ends = np.minimum(starts + room, length)
  assert set(itertools.chain(*map(range, starts, ends))) == set(range(length))
  assert (ends[:-1] - starts[1:] == stride).all() and ends[-1] == length
  one = lambda *values: np.array(values)
  corpus = Corpus(one(1), one(0), one(1), columns=dict(
    text_pair=Column(np.arange(length), one(0), one(length)),
    label=Column(one(first, last), one(0), one(2)),
  ))  # fmt: skip
  cut = windows(corpus, one(room), stride)
  found = 0
  for w in range(len(cut.lengths)):
    context, answer = cut.columns["text_pair"].of(w), cut.columns["label"].of(w)
    assert 0 < len(context) <= room
    inside = {first, last} <= set(context.tolist())
    assert inside == (len(answer) > 0)
    if inside:
      assert context[answer].tolist() == [first, last]
      found += 1
  assert found >= 1


def test_answers_stand_where_the_text_says(tmp_path):
  lines = tasks.rows(12, others=40)
  tasks.write(tmp_path / "rows.jsonl", lines)
  _, data, batch = tasks.epoch(tasks.config(tmp_path, "span_qa"))
  answers = {r["text"]: r["answer"]["text"] for r in lines}
  seen = set()
  for row, number in np.argwhere(batch["text_weights"] > 0):
    here = batch["segments"][row] == number + 1
    text = data.tokenizer.decode(batch["tokens"][row][here])
    question = max((q for q in answers if text.startswith(q)), key=len)
    start, end = batch["text_start"][row, number], batch["text_end"][row, number]
    said = data.tokenizer.decode(batch["tokens"][row][start : end + 1])
    assert (said == "" and start == np.flatnonzero(here)[0]) or [said] == answers[question]
    seen |= {question} if said else set()
  assert seen == {question for question, answer in answers.items() if answer}


@pytest.mark.parametrize(
  ("objective", "shape"), [("seq2seq", "decoder"), ("pairs", "encoder"), ("contrastive", "encoder")]
)
def test_what_is_too_long_is_cut_and_counted(tmp_path, objective, shape):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  whole = load_data(tasks.config(tmp_path, objective, shape))
  made = tasks.config(tmp_path, objective, shape, seq_len=24, truncate=True)
  _, data, batch = tasks.epoch(made)
  assert data.truncated_tokens > 0 < data.truncated_documents <= 12
  assert data.tokens_per_epoch + data.truncated_tokens == whole.tokens_per_epoch
  sides = [name for name in ("", "pair_", "negative_") if f"{name}tokens" in batch]
  added = Template.of(data.tokenizer).added(pair=objective == "pairs")
  held = sum(int((batch[f"{s}segments"] > 0).sum()) for s in sides)
  if objective != "seq2seq":
    assert held == data.tokens_per_epoch + 12 * added * len(sides)


def test_batches_can_start_at_any_step(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(40))
  made = tasks.config(tmp_path, "classification", batch_size=3)
  data = load_data(made)
  got = itertools.islice(load_data(made).batches(5), 8)
  for step, batch in enumerate(got, start=5):
    want = data.batch(step)
    assert batch.keys() == want.keys()
    assert all((batch[k] == want[k]).all() for k in want)


def row(**values):
  return [*tasks.rows(3), {**tasks.rows(1)[0], **values}]


WRONG = {
  "label missing": ("classification", {}, dict(label=None), "data.label is not set"),
  "column missing": ("classification", {}, dict(label="lable"), "line 1 has no column 'lable'"),
  "label null": ("classification", dict(label=None), {}, "line 4: data.label holds None"),
  "label unknown": (
    "classification", dict(label="yess"), dict(labels=("no", "yes", "7")),
    "line 4: the label 'yess' is not among",
  ),
  "number": ("classification", dict(number="much"), dict(problem="regression", label="number"),
             "line 4: data.label='number' holds 'much'"),
  "empty": ("classification", dict(text="  "), {}, "line 4: data.text is empty"),
  "no text": ("classification", dict(text=3), {}, "line 4: data.text holds int"),
  "long": ("classification", dict(text="a" * 95), {}, "data.text has 95 tokens and room for 94"),
  "long pair": ("pairs", dict(text="a" * 95), {}, "raise seq_len"),
  "long target": ("seq2seq", dict(other="a" * 90), {}, "data.target has 90 tokens and room for 79"),
  "tags": ("tagging", dict(tags=["A"], words=["a", "b"]), {}, "2 words (data.text='words') and 1"),
  "answer": (
    "span_qa", dict(answer=dict(text=["qq"], answer_start=[0])), {}, "'qq' does not stand",
  ),
  "answer lists": ("span_qa", dict(answer=dict(text=["a"], answer_start=5)), {}, "the same length"),
  "answer start": ("span_qa", dict(answer="bee"), {}, "answer_start=None does not say"),
  "stride": ("span_qa", dict(text="a" * 90), {}, "leaves room for"),
  "unread": ("classification", {}, dict(target="other"), "data.target='other' has no effect"),
  "accumulation": ("contrastive", {}, dict(accumulation=2, batch_size=2), "accumulation=2"),
  "smoothing": ("classification", {}, dict(problem="regression", label="number",
                label_smoothing=0.1), "objective.label_smoothing=0.1 has no effect"),
  "order of numbers": ("classification", {}, dict(problem="regression", label="number",
                       labels=("a",)), "data.labels has no effect"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_learned_from_is_one_clear_error(tmp_path, name):
  objective, values, changes, said = WRONG[name]
  tasks.write(tmp_path / "rows.jsonl", row(**values))
  shape = changes.get("shape", "encoder_decoder" if objective == "seq2seq" else "encoder")
  settings = {k: v for k, v in changes.items() if k != "shape"}
  with pytest.raises(InputError) as error:
    load_data(tasks.config(tmp_path, objective, shape, **settings))
  assert said in str(error.value), error.value


def test_a_validation_label_that_training_lacks_is_refused(tmp_path):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(5))
  held_out = tasks.write(tmp_path / "dev.jsonl", row(label="maybe"))
  made = tasks.config(tmp_path, "classification", validation_source=str(held_out))
  with pytest.raises(InputError, match=r"dev.jsonl, line 4: the label 'maybe'.*data.labels"):
    load_data(made)


@pytest.mark.parametrize(("lines", "target_lines"), [(3, 5), (5, 3), (1, 0)])
def test_parallel_files_of_different_length_are_refused(tmp_path, lines, target_lines):
  files = parallel(tmp_path, lines, target_lines)
  with pytest.raises(InputError) as error:
    load_data(tasks.config(tmp_path, "seq2seq", "encoder_decoder", **files))
  assert f"has {lines} lines" in str(error.value) and f"has {target_lines}:" in str(error.value)


def test_text_files_need_another_one_for_the_target(tmp_path):
  files = parallel(tmp_path, 3, 3)
  for changes, said in (
    (dict(target="label"), "must be another one"),
    (dict(validation_source=files["source"]), "set data.validation_target"),
    (dict(source=f"0.5*{files['source']},0.5*{files['source']}"), "cannot be mixed"),
  ):
    with pytest.raises(InputError, match=said):
      load_data(tasks.config(tmp_path, "seq2seq", "encoder_decoder", **(files | changes)))
  with pytest.raises(InputError, match="learns from columns of a table"):
    load_data(tasks.config(tmp_path, "classification", source=files["source"]))
