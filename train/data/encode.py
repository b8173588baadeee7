"""Examples to arrays, once: texts to token ids, labels to numbers; kept in the cache."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data import conversations
from train.data.arrays import Column, Corpus
from train.data.cache import Cache
from train.data.examples import Example, ExampleSource
from train.data.labels import label_name, label_names, number
from train.data.roles import ANSWER_START, Role

_FORMAT = 1  # Of the cache; another one is never read.
_EXAMPLES = 4096  # Encoded at a time.

Place = str
Arrays = dict[str, list[np.ndarray]]


def read_examples(source: ExampleSource, tokenizer: Tokenizer, cache: Cache) -> Corpus:
  """The examples of `source` as arrays, from the cache where they have been encoded before.

  Columns, besides the text in `tokens`: token ids without special tokens; of `label` the places of
  labels in `names`, one or several for each example, or one for each token (tags: -1 but on a
  word's first token), or numbers, or the first and the last token of an answer (none where there
  is no answer); of a conversation `turns` and `ends` (`train.data.conversations.Encoded`); `place`,
  the file and line.

  Raises:
    InputError: naming the place of what cannot be learned from.
  """
  decides = f"{_FORMAT} {source.fingerprint} {tokenizer.fingerprint}"
  if source.roles and source.roles[0].kind == "said":
    decides += json.dumps(tokenizer.config.get("chat_template"))
  key = "examples-" + hashlib.sha256(decides.encode()).hexdigest()[:32]
  entry = cache.entry(key, lambda folder: _write(folder, source, tokenizer))
  meta = json.loads((entry.path / "meta.json").read_text())
  if meta["lost_tags"]:
    logging.warning(
      "%s: %d words have no token of their own, so their tags are not learned.",
      source.name, meta["lost_tags"],
    )  # fmt: skip
  columns = {name: _column(entry.path, name, dtype) for name, dtype in meta["dtypes"].items()}
  names = {"label": tuple(meta["labels"]), "place": source.files}
  columns = {n: Column(c.values, c.starts, c.lengths, names.get(n, ())) for n, c in columns.items()}
  text = columns.pop("text")
  return Corpus(text.values, text.starts, text.lengths, entry, columns)


def _column(folder: Path, name: str, dtype: str) -> Column:
  lengths = np.load(folder / f"{name}.npy")
  path = folder / f"{name}.bin"
  # An empty file cannot be mapped.
  values = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
  return Column(values, np.cumsum(lengths) - lengths, lengths)


def _write(folder: Path, source: ExampleSource, tokenizer: Tokenizer) -> None:
  start, coder = time.perf_counter(), _Coder(source, tokenizer)
  lengths: dict[str, list[int]] = {}
  dtypes: dict[str, str] = {}
  for examples in _batches(source.examples()):
    for name, arrays in coder.encode(examples).items():
      with (folder / f"{name}.bin").open("ab") as f:
        f.write(np.concatenate(arrays).tobytes())
      lengths.setdefault(name, []).extend(map(len, arrays))
      dtypes[name] = arrays[0].dtype.name
  if not lengths:
    raise InputError(f"{source.name!r} holds no examples: the corpus is empty.")
  for name, sizes in lengths.items():
    np.save(folder / f"{name}.npy", np.array(sizes, np.int64))
  meta = dict(dtypes=dtypes, labels=list(coder.labels), lost_tags=coder.lost_tags)
  (folder / "meta.json").write_text(json.dumps(meta))
  logging.info(
    "Encoded %s: %d examples in %.1f s.",
    source.name, len(lengths["text"]), time.perf_counter() - start,
  )  # fmt: skip


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
  batch: list[Example] = []
  for example in examples:
    batch.append(example)
    if len(batch) == _EXAMPLES:
      yield batch
      batch = []
  if batch:
    yield batch


class _Coder:
  """Encodes examples some at a time; the labels that came so far have the numbers they came in."""

  def __init__(self, source: ExampleSource, tokenizer: Tokenizer):
    self._source, self._tokenizer = source, tokenizer
    self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    self.labels: dict[str, int] = {}
    self.lost_tags = 0

  def encode(self, examples: list[Example]) -> Arrays:
    """Arrays of each column."""
    places = [self._source.place(example) for example in examples]
    out: Arrays = {"place": [np.array([e.file, e.number], np.int64) for e in examples]}
    kinds = {role.kind: role for role in self._source.roles}
    for role in self._source.roles:
      values = [example.values[role.name] for example in examples]
      if role.kind == "text":
        out[role.name] = self._texts(values, role, places)
      elif role.kind in ("label", "labels", "number"):
        out[role.name] = [self._label(v, role, p) for v, p in zip(values, places, strict=True)]
    if "said" in kinds:
      out |= self._said(examples, places)
    if "words" in kinds:
      out |= self._tagged(examples, kinds["words"], kinds["tags"], places)
    if "context" in kinds:
      out |= self._answered(examples, kinds["context"], kinds["answers"], places)
    return out

  def _texts(self, values: list[Any], role: Role, places: list[Place]) -> list[np.ndarray]:
    texts = [_text(v, f"{p}: {role}") for v, p in zip(values, places, strict=True)]
    before, after = map(len, self._tokenizer.affixes)
    whole = self._tokenizer.encode_documents(texts)
    return self._ids([ids[before : len(ids) - after] for ids in whole], role, places)

  def _ids(self, found: list[np.ndarray], role: Role, places: list[Place]) -> list[np.ndarray]:
    for ids, place in zip(found, places, strict=True):
      if not len(ids):
        raise InputError(f"{place}: {role} has no token: the tokenizer drops all of it.")
    return [ids.astype(self._dtype) for ids in found]

  def _label(self, value: Any, role: Role, place: Place) -> np.ndarray:
    place = f"{place}: {role}"
    if role.kind == "number":
      return np.array([number(value, place)], np.float64)
    names = [label_name(value, place)] if role.kind == "label" else label_names(value, place)
    return self._codes(names)

  def _codes(self, names: list[str]) -> np.ndarray:
    return np.array([self.labels.setdefault(n, len(self.labels)) for n in names], np.int32)

  def _said(self, examples: list[Example], places: list[Place]) -> Arrays:
    found = [conversations.encode(e.values, self._tokenizer, p) for e, p in _both(examples, places)]
    numbers = lambda rows: [np.array(row, np.int32) for row in rows]
    return {
      "text": [np.array(one.ids, self._dtype) for one in found],
      "turns": numbers(one.turns for one in found),
      "ends": numbers(one.ends for one in found),
    }

  def _tagged(
    self, examples: list[Example], words: Role, tags: Role, places: list[Place]
  ) -> Arrays:
    found = [_words(e.values[words.name], f"{p}: {words}") for e, p in _both(examples, places)]
    encoded = self._tokenizer.encode_spans([" ".join(one) for one in found])
    labels = []
    for (ids, spans), one, example, place in zip(encoded, found, examples, places, strict=True):
      names = _tags(example.values[tags.name], f"{place}: {tags}")
      if len(names) != len(one):
        raise InputError(
          f"{place} has {len(one)} words ({words}) and {len(names)} tags ({tags}): there must be "
          "one tag for each word."
        )
      own = first_tokens(one, spans)
      marks = np.full(len(ids), -1, np.int32)
      marks[own[own >= 0]] = self._codes(names)[own >= 0]
      self.lost_tags += int((own < 0).sum())
      labels.append(marks)
    return {words.name: self._ids([ids for ids, _ in encoded], words, places), "label": labels}

  def _answered(
    self, examples: list[Example], context: Role, answers: Role, places: list[Place]
  ) -> Arrays:
    texts = [_text(e.values[context.name], f"{p}: {context}") for e, p in _both(examples, places)]
    encoded, found = self._tokenizer.encode_spans(texts), []
    for (_, spans), text, example, place in zip(encoded, texts, examples, places, strict=True):
      values, where = example.values, f"{place}: {answers}"
      answer = _answer(values[answers.name], values[ANSWER_START], where)
      found.append(np.zeros(0, np.int32))
      if answer is not None:
        found[-1] = _answer_tokens(text, *answer, spans, where)
    return {context.name: self._ids([ids for ids, _ in encoded], context, places), "label": found}


def first_tokens(words: list[str], spans: np.ndarray) -> np.ndarray:
  """The first token of each word of a text in which spaces separate them; -1 where it has none.

  Args:
    spans: characters [start, end) of each token. One that two words share is the first word's.
  """
  out, token = np.full(len(words), -1), 0
  start = 0
  for i, word in enumerate(words):
    end = start + len(word)
    while token < len(spans) and (spans[token, 1] <= start or spans[token, 0] == spans[token, 1]):
      token += 1
    if token < len(spans) and spans[token, 0] < end:
      out[i] = token
      token += 1
    start = end + 1
  return out


def _both(examples: list[Example], places: list[Place]) -> Iterator[tuple[Example, Place]]:
  return zip(examples, places, strict=True)


def _text(value: Any, place: Place) -> str:
  if not isinstance(value, str):
    raise InputError(f"{place} holds {type(value).__name__}, not text.")
  if not value.strip():
    raise InputError(f"{place} is empty: fill it in, or leave the example out.")
  return value


def _words(value: Any, place: Place) -> list[str]:
  words = value.split() if isinstance(value, str) else value
  if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
    raise InputError(f"{place} holds no words: a list of texts, or text with spaces, is needed.")
  if not words:
    raise InputError(f"{place} is empty: fill it in, or leave the example out.")
  return words


def _tags(value: Any, place: Place) -> list[str]:
  tags = value.split() if isinstance(value, str) else value
  if not isinstance(tags, list):
    raise InputError(f"{place} holds no tags: a list, or text with spaces, is needed.")
  return [label_name(tag, place) for tag in tags]


def _answer(value: Any, start: Any, place: Place) -> tuple[str, int] | None:
  """(text, first character) of the first answer; None where there is none."""
  if isinstance(value, dict):
    if not {"text", ANSWER_START} <= value.keys():
      raise InputError(f"{place} has no 'text' and {ANSWER_START!r}: SQuAD's answers have both.")
    value, start = value["text"], value[ANSWER_START]
    if isinstance(value, list):
      if not isinstance(start, list) or len(start) != len(value):
        raise InputError(f"{place}: 'text' is {value!r} and {ANSWER_START!r} {start!r}: lists of "
                         "the same length are needed.")  # fmt: skip
      value, start = (value[0], start[0]) if value else (None, None)
  if value is None or value == "":
    return None
  if not isinstance(value, str):
    raise InputError(f"{place} holds {type(value).__name__}, not the text of an answer.")
  try:
    return value, int(start)
  except (TypeError, ValueError, OverflowError):
    raise InputError(
      f"{place} is an answer, and {ANSWER_START}={start!r} does not say at which character of the "
      "context it begins."
    ) from None


def _answer_tokens(
  context: str, answer: str, start: int, spans: np.ndarray, place: Place
) -> np.ndarray:
  """The first and the last token of an answer."""
  end = start + len(answer)
  if start < 0 or context[start:end] != answer:
    raise InputError(
      f"{place}: the answer {answer!r} does not stand at character {start} of the context, where "
      f"{context[max(0, start) : max(0, end)]!r} stands."
    )
  inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start))
  if not len(inside):
    raise InputError(f"{place}: the answer {answer!r} has no token.")
  return np.array([inside[0], inside[-1]], np.int32)
