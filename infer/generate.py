"""Generation: prompts in, completions out, the same for a prompt alone and in any batch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from infer.batch import Batch, batches, rows_at_once, text_of
from infer.beam import search
from infer.contrastive import contrast
from infer.prompts import by_room, checked, listed, prefix
from infer.ranking import scores
from infer.requests import adapters_of, end_ids
from infer.scores import Pairs, prompt_logprobs
from infer.settings import Settings, settings_of
from infer.text import continuation
from infer.timing import Stopwatch, Timing
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

Prompt = str | Sequence[int]
STOP_STEPS = 16  # Steps between two looks for stop strings.
WINDOW_BATCHES, WINDOW_SEQUENCES = 4, 512  # Among which batches of similar lengths are made.
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
  top_logprobs: list[Pairs] | None = None
  # With `echo`: the prompt's tokens, and the log-probabilities of all but the first.
  prompt_tokens: list[int] | None = None
  prompt_logprobs: list[float] | None = None
  prompt_top_logprobs: list[Pairs] | None = None
  acceptance: float | None = None  # Of the tokens that a `draft` guessed, the share that was right.
  score: float | None = None  # Of a search: see `infer.beam.Found`.
  cached_tokens: int | None = None  # Of the prompt, those that a `prefix_cache` had.
  timing: Timing | None = dataclasses.field(default=None, compare=False)


def generate(m: "Model", prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Completion]:
  """Continues each prompt, or answers it where an encoder reads it.

  Args:
    m: a loaded model.
    prompts: one text or list of token ids, or a list of them. Texts get the tokenizer's special
      tokens, without the closing one where a decoder continues them; token ids are taken as they
      are. Of an encoder–decoder they are what its encoder reads.
    **settings: see Settings. A `scorer` says which of `best_of` completions are returned, the best
      first: "mean_logprob", a function of (prompt, completion) that returns a number, or a reward
      model (a sequence head that says one number), which reads prompt and completion as one text.

  Returns:
    `num_return_sequences` completions for each prompt, in order.

  Raises:
    InputError: for an unknown setting, an impossible value, an empty prompt, a token outside the
      vocabulary, a prompt that leaves too little room in the model's positions, a model whose head
      does not score the next token, a constraint (json_schema, regex, grammar) that does not
      compile, or one that no token of the vocabulary can go on with.
  """
  return [completion for group in results(m, prompts, **settings) for completion in group]


def results(
  m: "Model", prompts: Prompt | Sequence[Prompt], **settings: Any
) -> Iterator[list[Completion]]:
  """Yields what `generate` returns for each prompt, in order, when it and all before it are done.

  All prompts are checked first; some batches of them are in hand at a time.

  Raises:
    InputError: as `generate` does, before the first result.
  """
  chosen, prompts = settings_of(settings), listed(prompts)
  encoded = checked(m, prompts, chosen)
  asked = _Asked(encoded, chosen.seeds(len(prompts)), adapters_of(m, chosen, len(prompts)))
  return _in_order(m, prompts, asked, chosen)


@dataclasses.dataclass(frozen=True)
class _Asked:
  """Prompts, with what each has of its own."""

  prompts: list[list[int]]
  seeds: list[int]
  adapters: list[int] | None  # Numbers of the model's adapters; None: as the model is.

  def part(self, places: slice) -> "_Asked":
    """Some of them."""
    adapters = None if self.adapters is None else self.adapters[places]
    return _Asked(self.prompts[places], self.seeds[places], adapters)

  def own(self, places: list[int]) -> list[int] | None:
    """The adapters of prompts."""
    return None if self.adapters is None else [self.adapters[i] for i in places]


def _in_order(
  m: "Model", prompts: list[Prompt], asked: _Asked, settings: Settings
) -> Iterator[list[Completion]]:
  each = settings.best_of or settings.num_return_sequences
  run = _searched if settings.num_beams > 1 or settings.penalty_alpha else _drawn
  rows = rows_at_once(m, asked.prompts, settings)
  size = max(1, min(WINDOW_BATCHES * rows, max(rows, WINDOW_SEQUENCES)) // each)
  for start in range(0, len(prompts), size):
    window = asked.part(slice(start, start + size))
    done: dict[int, Completion] = {}
    first = 0  # Place of the next prompt's first sequence.
    for place, completion in run(m, window, each, settings):
      done[place] = completion
      while all(first + j in done for j in range(each)):
        group, prompt = [done.pop(first + j) for j in range(each)], start + first // each
        yield _finished(m, prompts[prompt], asked.part(slice(prompt, prompt + 1)), group, settings)
        first += each


def _finished(
  m: "Model", prompt: Prompt, asked: _Asked, group: list[Completion], settings: Settings
) -> list[Completion]:
  """The sequences of a prompt that are returned, with what is told about the prompt."""
  if settings.best_of is not None:
    group = _best(m, prompt, group, settings)
  if not settings.echo:
    return group
  told = _echo(m, asked, settings.logprobs or 0)
  return [dataclasses.replace(completion, **told) for completion in group]


# Places of sequences, `each` of a prompt behind each other, with what came of them.
_Found = Iterator[tuple[int, Completion]]


def _drawn(m: "Model", asked: _Asked, each: int, settings: Settings) -> _Found:
  """Sequences of each prompt, as their batches are done."""
  texts = [prompt for prompt in asked.prompts for _ in range(each)]
  follow = bool(settings.stop_strings())
  for room, members in by_room(m, texts, settings).items():
    limited = dataclasses.replace(settings, max_new_tokens=room)
    for places in batches(m, [texts[i] for i in members], limited):
      rows = [members[place] for place in places]
      groups = [i // each for i in rows]
      batch = Batch(
        m, [texts[i] for i in rows], [asked.seeds[g] for g in groups], limited, follow=follow,
        sequences=[i % each for i in rows], groups=groups, adapters=asked.own(groups),
      )  # fmt: skip
      while not batch.finished:
        batch.advance(STOP_STEPS if follow else room)
      yield from zip(rows, _completions(batch), strict=True)


def _searched(m: "Model", asked: _Asked, each: int, settings: Settings) -> _Found:
  """What beam search or contrastive search, which draw nothing, make of each prompt."""
  decode, ends, prompts = text_of(m), end_ids(m, settings), asked.prompts
  for room, members in by_room(m, prompts, settings).items():
    limited = dataclasses.replace(settings, max_new_tokens=room)
    for places in batches(m, [prompts[i] for i in members], limited):
      rows = [members[place] for place in places]
      texts, own, watch = [prompts[i] for i in rows], asked.own(rows), Stopwatch()
      groups = search(m, texts, limited, own) if limited.num_beams > 1 else None
      groups = groups or [[found] for found in contrast(m, texts, limited, own)]
      timings = iter(watch.searched([len(found.tokens) for group in groups for found in group]))
      for i, group in zip(rows, groups, strict=True):
        for j, found in enumerate(group):
          shown = [t for t in found.tokens if t not in ends]
          text = continuation(decode, prefix(m, prompts[i]), shown)
          reason = "stop" if found.ended else "length"
          told: dict[str, Any] = dict(
            score=found.score, cached_tokens=found.cached, timing=next(timings)
          )
          yield i * each + j, Completion(text, found.tokens, found.logprobs, reason, **told)


def _best(
  m: "Model", prompt: Prompt, completions: list[Completion], settings: Settings
) -> list[Completion]:
  """The best completions of a prompt, best first; of equal ones the first."""
  values = scores(m, prompt, completions, settings.scorer)
  order = sorted(range(len(values)), key=lambda i: -values[i])
  return [completions[i] for i in order[: settings.num_return_sequences]]


def _echo(m: "Model", asked: _Asked, top: int) -> dict[str, Any]:
  """The fields of a completion that tell about its prompt, the first one asked for."""
  prompt, adapter = asked.prompts[0], asked.adapters
  values, pairs = prompt_logprobs(m, prompt, top, None if adapter is None else adapter[0])
  shown = pairs if top else None
  return dict(prompt_tokens=prompt, prompt_logprobs=values, prompt_top_logprobs=shown)


def told_whole(settings: Settings) -> list[str]:
  """The settings whose outcome is known, or told, only when a text has ended."""
  several = ("num_return_sequences", "num_beams", "best_of")
  told = [name for name in several if (getattr(settings, name) or 1) > 1]
  return told + [n for n in ("penalty_alpha", "logprobs", "echo") if getattr(settings, n)]


def stream(m: "Model", prompt: Prompt, **settings: Any) -> Iterator[str]:
  """Yields the text of `generate` for one prompt in pieces of whole characters, as they come.

  Raises:
    InputError: as `generate` does, before the first piece.
  """
  chosen = settings_of(settings)
  encoded = checked(m, prompt, chosen)
  if len(encoded) != 1:
    raise InputError(f"stream takes one prompt and got {len(encoded)}: call it once for each.")
  for name in told_whole(chosen):
    raise InputError(f"{name}={getattr(chosen, name)} cannot be streamed: call generate.")
  chosen = dataclasses.replace(chosen, max_new_tokens=next(iter(by_room(m, encoded, chosen))))
  adapters = adapters_of(m, chosen, 1)
  return _pieces(Batch(m, encoded, chosen.seeds(1), chosen, follow=True, adapters=adapters))


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
  texts, drawn = batch.results()
  top = batch.settings.logprobs
  out = []
  told = zip(
    batch.rows, texts, batch.acceptance(), batch.reused(), batch.timings(), strict=False
  )  # fmt: skip
  for i, (row, (text, n), share, reused, timing) in enumerate(told):
    pairs = None
    if top is not None:
      ids, values = drawn.top_tokens[i, :n, :top].tolist(), drawn.top_logprobs[i, :n, :top].tolist()
      pairs = [list(zip(*place, strict=True)) for place in zip(ids, values, strict=True)]
    reason = "stop" if row.ended else "length"
    out.append(
      Completion(
        text,
        row.tokens[:n],
        drawn.logprobs[i, :n].tolist(),
        reason,
        pairs,
        acceptance=share,
        cached_tokens=reused,
        timing=timing,
      )
    )
  return out
