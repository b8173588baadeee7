"""Tokenizer: text to ids and back, in Hugging Face form, whatever it was loaded from."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from model import chat
from model.documents import groups_of, parts_of, without_special
from model.errors import InputError
from model.tokenizer_files import read_tokenizer, write_tokenizer

_ROLES = ("pad", "bos", "eos", "mask", "unk", "cls", "sep")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Token ids of a text or of a pair of texts, and where each token comes from."""

  ids: list[int]
  types: list[int]  # Token types, as the template gives them.
  offsets: list[tuple[int, int]]  # Characters (start, end) of the text that a token is of.
  sequence: list[int | None]  # 0: of the first text; 1: of the second; None: the template's own.


class Tokenizer:
  """A `tokenizers.Tokenizer` with the roles of its special tokens.

  Args:
    backend: what maps text to ids; its truncation and padding are switched off.
    config: fields of tokenizer_config.json; `pad_token`, `bos_token`, `eos_token`, `mask_token` …
      name special tokens by their text.
  """

  def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]):
    backend.no_truncation()
    backend.no_padding()
    self.backend = backend
    self.config = config
    self.special = {role: t for role in _ROLES if (t := self._special_token(role)) is not None}

  def _special_token(self, role: str) -> str | None:
    named = self.config.get(f"{role}_token")
    named = named.get("content") if isinstance(named, dict) else named
    return named if named is not None and self.backend.token_to_id(named) is not None else None

  def _id(self, role: str) -> int | None:
    return self.backend.token_to_id(self.special[role]) if role in self.special else None

  @property
  def pad_id(self) -> int | None:
    """Id of padding; None when there is none, as for the others."""
    return self._id("pad")

  @property
  def bos_id(self) -> int | None:
    """Id that begins a text."""
    return self._id("bos")

  @property
  def eos_id(self) -> int | None:
    """Id that ends a text."""
    return self._id("eos")

  @property
  def mask_id(self) -> int | None:
    """Id that stands for a token to guess."""
    return self._id("mask")

  @functools.cached_property
  def sentinel_ids(self) -> tuple[int, ...]:
    """Ids of T5's sentinels, <extra_id_0> first: each stands for one span that is left out."""
    ids = map(self._sentinel, itertools.count())
    return tuple(itertools.takewhile(lambda found: found is not None, ids))  # pyright: ignore

  def _sentinel(self, i: int) -> int | None:
    names = f"<extra_id_{i}>", f"▁<extra_id_{i}>"  # mT5's vocabulary has the second form.
    ids = map(self.backend.token_to_id, names)
    return next((found for found in ids if found is not None), None)

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids of all special tokens: `decode` leaves them out."""
    added = self.backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256, in hex, of what decides the ids."""
    decides = json.dumps([json.loads(self.backend.to_str()), self.special], sort_keys=True)
    return hashlib.sha256(decides.encode()).hexdigest()

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Ids of `text`; special tokens spelled in it are recognized.

    Raises:
      InputError: if the vocabulary has no token for a character and none for the unknown.
    """
    return self.encode_batch([text], add_special_tokens)[0]

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Ids of each text, in parallel; see `encode`."""
    return self._encode(self.backend, texts, add_special_tokens)

  def encode_pairs(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, literal: bool = False
  ) -> list[Encoded]:
    """Texts, or pairs of texts, in the template's special tokens, in parallel.

    Offsets may begin with the space before a word; tokens that share a character share its offset.

    Args:
      pairs: the second text of each pair.
      literal: text that merely spells a special token is ordinary text, as in `encode_documents`.

    Raises:
      InputError: as `encode`, or if the numbers of texts differ.
    """
    if pairs is not None and len(pairs) != len(texts):
      raise InputError(f"{len(texts)} texts and {len(pairs)} second texts: give one for each.")
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    backend = self._literal if literal else self.backend
    found = _encodings(backend, inputs, backend.encode_batch)
    return [Encoded(e.ids, e.type_ids, e.offsets, e.sequence_ids) for e in found]

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a text to continue: the template's special tokens before it and none after it."""
    return [*self.affixes[0], *self.encode(text, add_special_tokens=False)]

  def encode_document(self, text: str) -> list[int]:
    """Ids of a document to learn from; see `encode_documents`."""
    return self.encode_documents([text])[0].tolist()

  def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Ids of documents, in parallel: the special tokens of the template and no others.

    Text that merely spells a special token is encoded as the characters that it consists of.
    Memory is bounded: long texts are cut where that is known to change nothing.

    Raises:
      InputError: as `encode`.
    """
    encode = lambda some: self._encode(self._literal, some, False)
    parts = [parts_of(text, encode) for text in texts]
    groups = groups_of([part for one in parts for part in one])
    ids = (np.array(found, np.int32) for group in groups for found in encode(group))
    prefix, suffix = (np.array(ends, np.int32) for ends in self.affixes)
    return [np.concatenate([prefix, *(next(ids) for _ in one), suffix]) for one in parts]

  def encode_spans(
    self, texts: Sequence[str]
  ) -> list[tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n 2"]]]:
    """Ids of documents without special tokens, and the characters [start, end) of each token.

    As in `encode_documents`, special tokens spelled in a text are ordinary characters.

    Raises:
      InputError: as `encode`.
    """
    encode = functools.partial(self._literal.encode_batch, add_special_tokens=False)
    found = _encodings(self._literal, list(texts), encode)
    spans = lambda e: np.array(e.offsets, np.int32).reshape(-1, 2)
    return [(np.array(e.ids, np.int32), spans(e)) for e in found]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids` without special tokens."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

  def apply_chat_template(
    self, conversation: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None, *,
    documents: Sequence[Mapping[str, Any]] | None = None, chat_template: str | None = None,
    add_generation_prompt: bool = False, continue_final_message: bool = False,
    tokenize: bool = True, return_assistant_tokens_mask: bool = False, **variables: Any,
  ) -> str | list[int] | dict[str, list[int]]:  # fmt: skip
    """Messages as the model reads them, from the template that came with the tokenizer.

    Args:
      conversation: objects with `role` and `content` (text, or what the template makes of it).
      tools, documents: what the template may offer to the model, as JSON.
      chat_template: another template, or the name of one of several.
      add_generation_prompt: end where the assistant begins to write.
      continue_final_message: end where the content of the last message ends.
      tokenize: token ids instead of text.
      return_assistant_tokens_mask: `{"input_ids", "assistant_masks"}`; a mask is 1 for what the
        assistant wrote: what the template has between `{% generation %}` and `{% endgeneration %}`.
      **variables: of the template.

    Raises:
      InputError: if there is no template, it fails or refuses the messages, or does what no
        template may.
    """
    if return_assistant_tokens_mask and (not tokenize or continue_final_message):
      raise InputError(
        "return_assistant_tokens_mask is told of tokens, and of whole messages: leave out "
        f"{'tokenize=False' if not tokenize else 'continue_final_message'}."
      )
    text, written = self.render_chat(
      conversation, tools, documents=documents, chat_template=chat_template,
      add_generation_prompt=add_generation_prompt, unfinished=continue_final_message,
      marked=return_assistant_tokens_mask, **variables,
    )  # fmt: skip
    if not tokenize:
      return text
    encode = functools.partial(self.backend.encode_batch, add_special_tokens=False)
    found = _encodings(self.backend, [text], encode)[0]
    if not return_assistant_tokens_mask:
      return found.ids
    return {"input_ids": found.ids, "assistant_masks": chat.overlapping(found.offsets, written)}

  def render_chat(
    self, conversation: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None, *,
    documents: Sequence[Mapping[str, Any]] | None = None, chat_template: str | None = None,
    add_generation_prompt: bool = False, unfinished: bool = False, marked: bool = False,
    **variables: Any,
  ) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
    """The text of messages, and the characters that the template marks as the assistant's.

    Args:
      conversation, …, add_generation_prompt, **variables: as of `apply_chat_template`.
      unfinished: the text ends with the content of the last message.
      marked: a template without marks is an error.

    Raises:
      InputError: as `apply_chat_template`.
    """
    names = {k: v for k, v in self.config.items() if k.endswith("_token") and isinstance(v, str)}
    names |= {f"{role}_token": token for role, token in self.special.items()}
    return chat.render(
      chat.choose(self.config.get("chat_template"), chat_template, tools is not None), conversation,
      {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt,
       **names, **variables},
      unfinished=unfinished, marked=marked,
    )  # fmt: skip

  def save(self, directory: str | Path, *, token_types: bool | None = None) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which Transformers opens too.

    Args:
      token_types: whether the model reads token types, so that Transformers gives it some; None:
        nothing is said.
    """
    write_tokenizer(self.backend, self.config, self.special, Path(directory), token_types)

  @classmethod
  def load(cls, path: str | Path) -> "Tokenizer":
    """Reads a tokenizer.json, a SentencePiece .model, a folder that holds one of them, or a .gguf.

    A folder may also hold BERT's vocab.txt, or GPT-2's vocabulary and merges (vocab.json and
    merges.txt, or encoder.json and vocab.bpe), read as its tokenizer_config.json or the kind of its
    model says. A bare SentencePiece model gets the beginning and the end of text that it declares;
    tokenizer_config.json may switch them off (`add_bos_token`, `add_eos_token`). Marian's pair of
    models is read for its source language.

    Raises:
      InputError: if nothing is there, or it is damaged.
    """
    return cls(*read_tokenizer(Path(path).expanduser()))

  @functools.cached_property
  def affixes(self) -> tuple[list[int], list[int]]:
    """Special ids that the template puts before and after one text."""
    for i in range(self.vocab_size):
      text = "" if i in self.special_ids else self.backend.decode([i])
      body = self.encode(text, add_special_tokens=False) if text else []
      if body:
        break
    else:
      return [], []
    whole = self.encode(text)
    start = next(k for k in range(len(whole)) if whole[k : k + len(body)] == body)
    return whole[:start], whole[start + len(body) :]

  @functools.cached_property
  def _literal(self) -> tokenizers.Tokenizer:
    return without_special(self.backend)

  def _encode(self, backend, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    fast = functools.partial(backend.encode_batch_fast, add_special_tokens=add_special_tokens)
    return [e.ids for e in _encodings(backend, list(texts), fast)]


def _encodings(backend, inputs: list, encode: Callable[[list], list]) -> list:
  """What `encode` makes of texts or pairs of texts.

  Raises:
    InputError: with the text that it cannot encode.
  """
  try:
    return encode(inputs)
  except Exception as error:  # The library raises nothing more precise.
    texts = [text for one in inputs for text in (one if isinstance(one, tuple) else [one])]
    raise _unencodable(backend, texts, error) from None


def _unencodable(backend, texts: Sequence[str], error: Exception) -> InputError:
  known = backend.get_vocab()
  for text in texts:
    if not isinstance(text, str):
      return InputError(f"the tokenizer takes text, not {type(text).__name__}.")
    for character in text:
      if "\ud800" <= character <= "\udfff":
        return InputError(f"a text holds {character!r}, half of a character: it is not Unicode.")
      if "WordLevel" in str(error) and character not in known:
        return InputError(
          f"the vocabulary has no character {character!r}: train the tokenizer on text that has "
          "it, or use 'bytes' or 'bpe:N'."
        )
  return InputError(f"the tokenizer cannot encode a text: {error}")
