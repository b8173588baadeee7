"""Generation: prompts in, completions out, the same for a prompt alone and in any batch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from infer.batch import Batch, batches
from infer.prompts import by_room, checked
from infer.settings import settings_of
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
  """Continues each prompt, or answers it where an encoder reads it.

  Args:
    m: a loaded model.
    prompts: one text or list of token ids, or a list of them. Texts get the tokenizer's special
      tokens, without the closing one where a decoder continues them; token ids are taken as they
      are. Of an encoder–decoder they are what its encoder reads.
    **settings: see Settings.

  Returns:
    One completion for each prompt, in order.

  Raises:
    InputError: for an unknown setting, an impossible value, an empty prompt, a token outside the
      vocabulary, a prompt that leaves too little room in the model's positions, or a model whose
      head does not score the next token.
  """
  chosen = settings_of(settings)
  encoded = checked(m, prompts, chosen)
  seeds = chosen.seeds(len(encoded))
  follow = bool(chosen.stop_strings())
  done: dict[int, Completion] = {}
  for room, members in by_room(m, encoded, chosen).items():
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
  encoded = checked(m, prompt, chosen)
  if len(encoded) != 1:
    raise InputError(f"stream takes one prompt and got {len(encoded)}: call it once for each.")
  chosen = dataclasses.replace(chosen, max_new_tokens=next(iter(by_room(m, encoded, chosen))))
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
