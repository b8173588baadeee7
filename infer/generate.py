"""Generation: prompts in, completions out, the same for a prompt alone and in any batch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from infer.batch import Batch, batches
from infer.settings import Settings, settings_of
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

Prompt = str | Sequence[int]
STOP_STEPS = 16  # Steps between two looks for stop strings.
GLANCE_SECONDS = 0.05  # A stream looks for text as often as this, where steps are fast.


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model made of a prompt.

  `text` has neither the end token nor the stop string. `tokens` are the new ones, the end or stop
  token included; where a stop string ended the text they are those that lie wholly before it.
  """

  text: str
  tokens: list[int]
  logprobs: list[float]  # Of each token: the model's own, in nats, before any processor.
  finish_reason: Literal["stop", "length"]
  # The most probable tokens at each place with their log-probabilities, if `logprobs` was set.
  top_logprobs: list[list[tuple[int, float]]] | None = None


def generate(m: "Model", prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Completion]:
  """Continues each prompt.

  Args:
    m: a loaded model.
    prompts: one text or list of token ids, or a list of them. Texts get the tokenizer's special
      tokens, without the closing one; token ids are taken as they are.
    **settings: see Settings.

  Returns:
    One completion for each prompt, in order.

  Raises:
    InputError: for an unknown setting, an impossible value, an empty prompt, a token outside the
      vocabulary, or a prompt that leaves too little room in the model's positions.
  """
  chosen = settings_of(settings)
  encoded = _checked(m, prompts, chosen)
  seeds = chosen.seeds(len(encoded))
  follow = bool(chosen.stop_strings())
  done: dict[int, Completion] = {}
  for room, members in _by_room(m, encoded, chosen).items():
    limited = dataclasses.replace(chosen, max_new_tokens=room)
    for places in batches(m, [encoded[i] for i in members], limited):
      rows = [members[place] for place in places]
      prompt, seed = [encoded[i] for i in rows], [seeds[i] for i in rows]
      batch = Batch(m, prompt, seed, limited, follow=follow)
      while not batch.finished:
        batch.advance(STOP_STEPS if follow else room)
      done.update(zip(rows, _completions(batch), strict=True))
  return [done[i] for i in range(len(encoded))]


def stream(m: "Model", prompt: Prompt, **settings: Any) -> Iterator[str]:
  """Yields the text of `generate` for one prompt in pieces of whole characters, as they come.

  Raises:
    InputError: as `generate` does, before the first piece.
  """
  chosen = settings_of(settings)
  encoded = _checked(m, prompt, chosen)
  if len(encoded) != 1:
    raise InputError(f"stream takes one prompt and got {len(encoded)}: call it once for each.")
  chosen = dataclasses.replace(chosen, max_new_tokens=next(iter(_by_room(m, encoded, chosen))))
  return _pieces(Batch(m, encoded, chosen.seeds(1), chosen, follow=True))


def _pieces(batch: Batch) -> Iterator[str]:
  shown, steps = 0, 1
  while not batch.finished:
    text = batch.rows[0].transcript.shown()
    if len(text) > shown:
      yield text[shown:]
      shown = len(text)
    start = time.perf_counter()
    batch.advance(steps)
    if time.perf_counter() - start < GLANCE_SECONDS:
      steps *= 2
  rest = _completions(batch)[0].text[shown:]
  if rest:
    yield rest


def _completions(batch: Batch) -> list[Completion]:
  results, drawn = batch.results()
  top = batch.settings.logprobs
  out = []
  for i, (row, (text, n)) in enumerate(zip(batch.rows, results, strict=True)):
    pairs = None
    if top is not None:
      ids, values = drawn.top_tokens[i, :n, :top].tolist(), drawn.top_logprobs[i, :n, :top].tolist()
      pairs = [list(zip(*place, strict=True)) for place in zip(ids, values, strict=True)]
    reason = "stop" if row.ended else "length"
    out.append(Completion(text, row.tokens[:n], drawn.logprobs[i, :n].tolist(), reason, pairs))
  return out


def _checked(m: "Model", prompts: Any, settings: Settings) -> list[list[int]]:
  """The prompts as token ids, after all checks that need the model."""
  vocab, limit = m.config.vocab_size or 0, m.config.max_positions
  if settings.stop_strings() and m.tokenizer is None:
    raise InputError("stop strings need a tokenizer and this model has none: give token ids.")
  for token in settings.stop_ids():
    _in_vocabulary("stop", token, vocab)
  if settings.logprobs is not None and settings.logprobs > vocab:
    raise InputError(f"logprobs={settings.logprobs} exceeds the vocabulary of {vocab} tokens.")
  encoded = [_encoded(m, p, i) for i, p in enumerate(_listed(prompts))]
  for i, prompt in enumerate(encoded):
    for token in prompt:
      _in_vocabulary(f"prompt {i}", token, vocab)
    asked = settings.max_new_tokens or max(1, settings.min_new_tokens)
    if limit is not None and len(prompt) + asked > limit:
      raise InputError(
        f"prompt {i} has {len(prompt)} tokens and {asked} new ones are asked for: together "
        f"{len(prompt) + asked}, and the model has {limit} positions. Shorten the prompt or ask "
        "for fewer tokens (max_new_tokens)."
      )
  return encoded


def _by_room(m: "Model", prompts: list[list[int]], settings: Settings) -> dict[int, list[int]]:
  """Indices of prompts by the most new tokens that each may get."""
  groups: dict[int, list[int]] = {}
  for i, prompt in enumerate(prompts):
    room, limit = settings.most_new_tokens(), m.config.max_positions
    if settings.max_new_tokens is None and limit is not None:
      room = min(room, limit - len(prompt))
    groups.setdefault(room, []).append(i)
  return groups


def _listed(prompts: Any) -> list[Any]:
  """One prompt or many -> a list of prompts."""
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, bytes | dict) or not hasattr(prompts, "__iter__"):
    raise InputError(f"prompts={prompts!r} must be a text, a list of token ids, or a list of them.")
  prompts = list(prompts)
  if not prompts:
    raise InputError("prompts is empty: give at least one text or one list of token ids.")
  return [prompts] if all(isinstance(p, Integral) for p in prompts) else prompts


def _encoded(m: "Model", prompt: Any, index: int) -> list[int]:
  """Token ids of a prompt; an empty one is the tokenizer's first token, where it has one."""
  if isinstance(prompt, str):
    if m.tokenizer is None:
      raise InputError(f"prompt {index} is a text and the model has no tokenizer: give token ids.")
    tokens = m.tokenizer.encode_prompt(prompt)
  else:
    tokens = list(prompt) if hasattr(prompt, "__iter__") else [prompt]
    if not all(isinstance(t, Integral) and not isinstance(t, bool) for t in tokens):
      raise InputError(f"prompt {index} is {prompt!r}: give a text or a list of token ids.")
  bos = getattr(m.tokenizer, "bos_id", None)
  if tokens:
    return [int(t) for t in tokens]
  if bos is None:
    raise InputError(
      f"prompt {index} is empty and the tokenizer has no token that begins a text: give some text."
    )
  return [bos]


def _in_vocabulary(name: str, token: int, vocab: int) -> None:
  if not 0 <= token < vocab:
    raise InputError(f"{name}: token {token} is not in the vocabulary of ids 0 to {vocab - 1}.")
