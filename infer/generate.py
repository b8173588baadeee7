"""Generation: prompts in, completions out, the same for a prompt alone and in any batch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from infer.batch import Batch, batches, end_ids, text_of
from infer.beam import search
from infer.contrastive import contrast
from infer.prompts import by_room, checked, listed, prefix
from infer.ranking import scores
from infer.scores import Pairs, prompt_logprobs
from infer.settings import Settings, settings_of
from infer.text import continuation
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
  top_logprobs: list[Pairs] | None = None
  # With `echo`: the prompt's tokens, and the log-probabilities of all but the first.
  prompt_tokens: list[int] | None = None
  prompt_logprobs: list[float] | None = None
  prompt_top_logprobs: list[Pairs] | None = None
  acceptance: float | None = None  # Of the tokens that a `draft` guessed, the share that was right.
  score: float | None = None  # Of a search: see `infer.beam.Found`.
  cached_tokens: int | None = None  # Of the prompt, those that a `prefix_cache` had.


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
      vocabulary, a prompt that leaves too little room in the model's positions, or a model whose
      head does not score the next token.
  """
  chosen, prompts = settings_of(settings), listed(prompts)
  encoded = checked(m, prompts, chosen)
  each = chosen.best_of or chosen.num_return_sequences
  done = (
    _searched(m, encoded, chosen)
    if chosen.num_beams > 1 or chosen.penalty_alpha
    else _all(m, [p for p in encoded for _ in range(each)], each, chosen)
  )
  groups = [done[i : i + each] for i in range(0, len(done), each)]
  if chosen.best_of is not None:
    groups = [_best(m, p, group, chosen) for p, group in zip(prompts, groups, strict=True)]
  if chosen.echo:
    told = _echo(m, encoded, chosen.logprobs or 0)
    groups = [[dataclasses.replace(c, **t) for c in g] for t, g in zip(told, groups, strict=True)]
  return [completion for group in groups for completion in group]


def _all(m: "Model", prompts: list[list[int]], each: int, settings: Settings) -> list[Completion]:
  """Completions of prompts that stand `each` times behind each other, one for each place."""
  seeds = [seed for seed in settings.seeds(len(prompts) // each) for _ in range(each)]
  follow = bool(settings.stop_strings())
  done: dict[int, Completion] = {}
  for room, members in by_room(m, prompts, settings).items():
    limited = dataclasses.replace(settings, max_new_tokens=room)
    for places in batches(m, [prompts[i] for i in members], limited):
      rows = [members[place] for place in places]
      batch = Batch(
        m, [prompts[i] for i in rows], [seeds[i] for i in rows], limited, follow=follow,
        sequences=[i % each for i in rows], groups=[i // each for i in rows],
      )  # fmt: skip
      while not batch.finished:
        batch.advance(STOP_STEPS if follow else room)
      done.update(zip(rows, _completions(batch), strict=True))
  return [done[i] for i in range(len(prompts))]


def _searched(m: "Model", prompts: list[list[int]], settings: Settings) -> list[Completion]:
  """What beam search or contrastive search makes of each prompt, behind each other."""
  decode, ends = text_of(m), end_ids(m, settings)
  done: dict[int, list[Completion]] = {}
  for room, members in by_room(m, prompts, settings).items():
    limited = dataclasses.replace(settings, max_new_tokens=room)
    for places in batches(m, [prompts[i] for i in members], limited):
      rows = [members[place] for place in places]
      texts = [prompts[i] for i in rows]
      groups = search(m, texts, limited) if limited.num_beams > 1 else None
      groups = groups or [[found] for found in contrast(m, texts, limited)]
      for i, group in zip(rows, groups, strict=True):
        done[i] = []
        for found in group:
          shown = [t for t in found.tokens if t not in ends]
          text = continuation(decode, prefix(m, prompts[i]), shown)
          reason = "stop" if found.ended else "length"
          told: Any = dict(score=found.score, cached_tokens=found.cached)
          done[i].append(Completion(text, found.tokens, found.logprobs, reason, **told))
  return [completion for i in range(len(prompts)) for completion in done[i]]


def _best(
  m: "Model", prompt: Prompt, completions: list[Completion], settings: Settings
) -> list[Completion]:
  """The best completions of a prompt, best first; of equal ones the first."""
  values = scores(m, prompt, completions, settings.scorer)
  order = sorted(range(len(values)), key=lambda i: -values[i])
  return [completions[i] for i in order[: settings.num_return_sequences]]


def _echo(m: "Model", prompts: list[list[int]], top: int) -> list[dict[str, Any]]:
  """The fields of a completion that tell about its prompt."""
  out = []
  for prompt in prompts:
    values, pairs = prompt_logprobs(m, prompt, top)
    shown = pairs if top else None
    out.append(dict(prompt_tokens=prompt, prompt_logprobs=values, prompt_top_logprobs=shown))
  return out


def stream(m: "Model", prompt: Prompt, **settings: Any) -> Iterator[str]:
  """Yields the text of `generate` for one prompt in pieces of whole characters, as they come.

  Raises:
    InputError: as `generate` does, before the first piece.
  """
  chosen = settings_of(settings)
  encoded = checked(m, prompt, chosen)
  if len(encoded) != 1:
    raise InputError(f"stream takes one prompt and got {len(encoded)}: call it once for each.")
  for name in ("num_return_sequences", "num_beams", "best_of", "penalty_alpha", "echo"):
    if getattr(chosen, name) not in (1, None, False, 0.0):
      raise InputError(f"{name}={getattr(chosen, name)} cannot be streamed: call generate.")
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
  told = zip(batch.rows, results, batch.acceptance(), batch.reused(), strict=False)
  for i, (row, (text, n), share, reused) in enumerate(told):
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
      )
    )
  return out
