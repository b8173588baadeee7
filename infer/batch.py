"""A batch of prompts on the device and its rows on the host: padded to few sizes, stepped together.

Every size that a compiled program depends on (rows, prompt, cache, new tokens) is rounded up to a
power of two, so that programs are compiled for few sizes and serve all others. What is padding has
position -1 and changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.decode import Drawn, decode, prefill, reread
from infer.found import nothing_left
from infer.prompts import prefix
from infer.requests import bucket, request_of
from infer.settings import Settings
from infer.speculative import Tally, draft_of, read_prompts, speculate
from infer.text import Transcript, continuation
from infer.timing import Stopwatch, Timing, peak_bandwidth, step_bytes
from model.cache import new_cache
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

LEAST_PROMPT, LEAST_LENGTH, LEAST_ROOM = 16, 64, 64  # The smallest sizes.
PROMPT_TOKENS = 16_384  # The most tokens of a batch's padded prompts, which are read in one pass.
CACHE_BYTES = 2**31  # The most bytes of a batch's cache, where a device does not tell its memory.
CACHE_SHARE = 0.5  # Of the memory that is free on a device.


@dataclasses.dataclass
class Row:
  """One sequence."""

  prompt: list[int]  # What the decoder reads before the first new token.
  transcript: Transcript
  tokens: list[int] = dataclasses.field(default_factory=list)
  ended: bool = False


class Batch:
  """Prompts that are decoded together, some steps at a time."""

  def __init__(
    self, m: "Model", prompts: list[list[int]], seeds: list[int], settings: Settings, *,
    follow: bool, sequences: list[int] | None = None,
  ):  # fmt: skip
    """Reads the prompts and chooses a first token for each.

    Args:
      prompts: of an encoder–decoder, what its encoder reads.
      sequences: the number of each among the sequences of its prompt; None: each is the first.
      follow: keep the text of each row after every token, which stop strings and streams need.
    """
    self._watch, self._model = Stopwatch(), m
    self.settings, self.decode_text = settings, text_of(m)
    self._follow, self._ends = follow, end_ids(m, settings)
    stop, least = settings.stop_strings(), settings.min_new_tokens
    begin = lambda p: Transcript(self.decode_text, p, stop=stop, min_tokens=least)
    read = [prefix(m, prompt) for prompt in prompts]
    self._sources = None if read == prompts else [len(prompt) for prompt in prompts]
    self.rows = [Row(prompt, begin(prompt)) for prompt in read]
    self._net, self._params = m.unstacked()
    self._config, self._length = m.config, cache_length(m, read, settings)
    size = bucket(len(prompts), 1)
    tokens, lengths = padded_prompts(m, read, size)
    source = source_of(m, prompts, size)
    self._request = request_of(m, settings, seeds, sequences, size, self._ends)
    self._ahead = settings.guesses
    self._cache, self._progress = prefill(
      self._net, self._params, tokens, lengths, self._request, source, cfg=m.config,
      length=self._length, ahead=self._ahead,
      room=bucket(settings.most_new_tokens(), LEAST_ROOM),
      top=bucket(settings.logprobs, 1, m.config.vocab_size) if settings.logprobs else 0,
    )  # fmt: skip
    if settings.draft is not None:
      self._draft, zeros = draft_of(m, settings.draft), jnp.zeros(size, jnp.int32)
      self._drafts, self._tally = None, Tally(zeros, zeros)
      if self._draft.config is not None:
        self._drafts = read_prompts(
          self._draft.graphdef, self._draft.params, tokens, lengths, source,
          cfg=self._draft.config, length=self._length, ahead=self._ahead,
        )  # fmt: skip
    self.count = 0  # New tokens of the rows that have not ended, at most.
    self._collect()

  @property
  def finished(self) -> bool:
    """True when no row goes on."""
    return self.count >= self.settings.most_new_tokens() or all(row.ended for row in self.rows)

  def advance(self, steps: int) -> None:
    """Takes up to so many steps, in one compiled call where no text has to be read anew."""
    self._watch.lap()
    goal = min(self.count + steps, self.settings.most_new_tokens())
    while self.count < goal and not self.finished:
      turns = self._turns()
      if self.count in turns:
        self._reread()
      self._decode(min([count for count in turns if count > self.count], default=goal), goal)

  def _turns(self) -> set[int]:
    """Numbers of new tokens at which a text outgrows the length that LongRoPE began with: from then
    on all of it turns otherwise."""
    original = self._config.rope_original_positions
    if self._config.rope_scaling != "longrope" or original is None:
      return set()
    return {original + 1 - len(row.prompt) for row in self.rows if not row.ended}

  def _reread(self) -> None:
    size, limit = len(self._request.sampler.seed), self._config.max_positions
    texts = [[] if row.ended else row.prompt + row.tokens for row in self.rows]
    tokens, lengths = _table(texts, size, LEAST_PROMPT, limit)
    prompts: Any = np.zeros(size, np.int32)
    prompts[: len(self.rows)] = [len(row.prompt) for row in self.rows]
    self._cache = reread(
      self._net, self._params, tokens, lengths, prompts, cfg=self._config, length=self._length
    )

  def _decode(self, *goals: int) -> None:
    stopped = np.ones(len(self._request.sampler.seed), bool)
    stopped[: len(self.rows)] = [row.ended for row in self.rows]
    until = np.int32(min(goals))
    if self.settings.draft is None:
      self._cache, self._progress = decode(
        self._net, self._params, self._cache, self._progress, stopped, until, self._request
      )
    else:
      self._cache, self._drafts, self._progress, self._tally = speculate(
        self._net, self._params, self._draft.graphdef, self._draft.params, self._cache,
        self._drafts, self._progress, self._tally, stopped, until, self._request,
        ahead=self._ahead,
      )  # fmt: skip
    self._collect()

  def _collect(self) -> None:
    """Takes the tokens that are new to the host."""
    counts, drawn = np.asarray(self._progress.count), np.asarray(self._progress.drawn.tokens)
    steps, self.count = int(counts.max()) - self.count, int(counts.max())
    before = [len(row.tokens) for row in self.rows]
    for row, count, tokens in zip(self.rows, counts, drawn, strict=False):  # No padding rows.
      for token in tokens[len(row.tokens) : count].tolist():
        if row.ended:
          break
        if token < 0:
          raise nothing_left(len(row.tokens))
        row.tokens.append(token)
        if token in self._ends:
          row.ended = True
        elif self._follow:
          row.ended = row.transcript.push(token)
    self._watch.note(steps, [len(r.tokens) - n for r, n in zip(self.rows, before, strict=True)])

  def timings(self) -> list[Timing]:
    """How long each row took."""
    peak = peak_bandwidth() if self.settings.draft is None else None
    if peak is None:
      return self._watch.told()
    prompts, new = ([len(getattr(r, name)) for r in self.rows] for name in ("prompt", "tokens"))
    return self._watch.told(step_bytes(self._model, self._cache, prompts, new, self._sources), peak)

  def acceptance(self) -> list[float | None]:
    """The share of guesses that were right, of each row; None where nothing was guessed."""
    if self.settings.draft is None:
      return [None] * len(self.rows)
    guessed, right = (
      np.asarray(a)[: len(self.rows)] for a in (self._tally.guessed, self._tally.right)
    )
    return [float(r / g) if g else None for g, r in zip(guessed, right, strict=True)]

  def results(self) -> tuple[list[tuple[str, int]], Drawn]:
    """(text, number of tokens that count) of each row, and all that was drawn, as NumPy arrays."""
    return [self._result(row) for row in self.rows], jax.device_get(self._progress.drawn)

  def _result(self, row: Row) -> tuple[str, int]:
    if row.transcript.cut is not None:
      return row.transcript.close()
    shown = row.tokens[:-1] if row.tokens[-1] in self._ends else row.tokens
    return continuation(self.decode_text, row.prompt, shown), len(row.tokens)


def batches(m: "Model", prompts: list[list[int]], settings: Settings) -> list[list[int]]:
  """Indices of the prompts of each batch: similar lengths, and as many as memory has room for with
  all of their beams or candidates."""
  rows = rows_at_once(m, prompts, settings)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  return [order[i : i + rows] for i in range(0, len(order), rows)]


def rows_at_once(m: "Model", prompts: list[list[int]], settings: Settings) -> int:
  """How many sequences like the longest of these prompts a batch has room for."""
  longest = max(map(len, prompts))
  length = cache_length(m, [prefix(m, prompt) for prompt in prompts], settings)
  source = bucket(longest, LEAST_PROMPT, m.config.max_positions)  # Kept behind an encoder only.
  row = jax.eval_shape(lambda: new_cache(m.config, 1, length, stacked=False, source=source))
  row_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(row))
  stats = jax.local_devices()[0].memory_stats() or {}
  free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
  budget = CACHE_SHARE * free if stats else CACHE_BYTES
  copies = settings.num_beams if not settings.penalty_alpha else settings.top_k or 1
  most = min(budget // row_bytes, PROMPT_TOKENS // longest) // copies
  return 1 << max(0, int(most).bit_length() - 1)


def end_ids(m: "Model", settings: Settings) -> frozenset[int]:
  """Tokens that end a sequence: the settings' stop ids, and the model's, or where it has none the
  tokenizer's end token, or where that names none what its template closes a text with.
  """
  if m.end_ids:
    return frozenset([*settings.stop_ids(), *m.end_ids])
  if m.tokenizer is None:
    return frozenset(settings.stop_ids())
  eos = m.tokenizer.eos_id
  closing = m.tokenizer.affixes[1][-1:] if eos is None else [eos]
  return frozenset([*settings.stop_ids(), *closing])


def text_of(m: "Model") -> Callable[[list[int]], str]:
  """Token ids -> text; '' for a model without a tokenizer."""
  return m.tokenizer.decode if m.tokenizer is not None else lambda tokens: ""


def cache_length(m: "Model", prompts: list[list[int]], settings: Settings) -> int:
  longest, most = max(map(len, prompts)), m.config.max_positions
  return bucket(longest + settings.most_new_tokens(), LEAST_LENGTH, most)


def _table(
  prompts: list[list[int]], size: int, least: int, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, each prompt from the left; lengths, 0 for rows that only fill the batch)."""
  tokens = np.zeros((size, bucket(max(map(len, prompts)), least, most)), np.int32)
  lengths = np.zeros(size, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
  return tokens, lengths


def padded_prompts(
  m: "Model", prompts: list[list[int]], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """What `size` decoders read first, as `_table` has it."""
  least = 1 if m.config.shape == "encoder_decoder" else LEAST_PROMPT
  return _table(prompts, size, least, m.config.max_positions)


def source_of(m: "Model", prompts: list[list[int]], size: int) -> Inputs | None:
  """What an encoder reads; None where there is none."""
  if m.config.shape != "encoder_decoder":
    return None
  tokens, lengths = _table(prompts, size, LEAST_PROMPT, m.config.max_positions)
  index: Any = np.arange(tokens.shape[1], dtype=np.int32)
  return Inputs(jnp.asarray(tokens), jnp.where(index < lengths[:, None], index, -1))
