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

from infer.constrain import Walk, language_of
from infer.constrain_ahead import speculate_within
from infer.decode import Drawn, decode, start
from infer.found import nothing_left
from infer.prompts import prefix
from infer.reading import LEAST_PROMPT, Behind, Reader, chunk_of, kept_dtype, reader, spread
from infer.requests import bucket, end_ids, request_of
from infer.settings import Settings
from infer.shaping import History
from infer.speculative import Tally, draft_of, speculate
from infer.text import Transcript, continuation
from infer.timing import Stopwatch, Timing, peak_bandwidth, step_bytes
from model.cache import new_cache
from model.peft.virtual import virtual_tokens
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

LEAST_LENGTH, LEAST_ROOM = 64, 64  # The smallest sizes.
PASS_TOKENS = 16_384  # The most tokens of a batch that are read in one pass.
# The most bytes of a batch's cache, and twice those of one layer's scores while prompts are read:
CACHE_BYTES = 2**31  # Where a device does not tell its memory.
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
    follow: bool, sequences: list[int] | None = None, groups: list[int] | None = None,
    adapters: list[int] | None = None,
  ):  # fmt: skip
    """Reads the prompts and chooses a first token for each.

    Args:
      prompts: of an encoder–decoder, what its encoder reads.
      sequences: the number of each among the sequences of its prompt; None: each is the first.
      groups: rows of one number lie together and have one prompt, which is read once.
      adapters: the number of each among the model's adapters; None: as the model is.
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
    self._config, size = m.config, bucket(len(prompts), 1)
    plain = reader(m, settings, cache_length(m, read, settings))
    self._reader = plain.with_adapters(adapters, size)
    self._net, self._params = self._reader.graphdef, self._reader.params
    self._request = request_of(m, settings, seeds, sequences, size, self._ends)
    self._language = language_of(m, settings)
    self._walks = [] if self._language is None else [self._language.begin(p) for p in read]
    self._restrict()
    self._ahead = settings.guesses
    ways = distinct(m, prompts, size, groups, adapters)
    behind, self._reused = read_prompts(plain, ways, settings)
    self._cache = behind.cache
    self._progress = start(
      self._net, self._params, behind.last, said(read, size, self._reader.length), self._request,
      room=bucket(settings.most_new_tokens(), LEAST_ROOM),
      top=bucket(settings.logprobs, 1, m.config.vocab_size) if settings.logprobs else 0,
    )  # fmt: skip
    if settings.draft is not None:
      self._draft = draft_of(m, settings.draft)
      if adapters is not None and isinstance(settings.draft, str):  # Guesses by the same adapters.
        self._draft = self._draft.with_adapters(adapters, size)
      zeros: Any = np.zeros(size, np.int32)
      self._drafts, self._tally = None, Tally(zeros, zeros)
      if self._draft.config is not None:
        guesser = dataclasses.replace(
          self._reader, graphdef=self._draft.graphdef, params=self._draft.params,
          config=self._draft.config,
          length=self._reader.length + virtual_tokens(self._draft.params, "decoder"),
          chunk=chunk_of(self._draft.config, settings, self._reader.length),
        )  # fmt: skip
        alone = dataclasses.replace(settings, prefix_cache=None)
        told = ways if isinstance(settings.draft, str) else dataclasses.replace(ways, adapters=None)
        self._drafts = read_prompts(guesser, told, alone)[0].cache
    self._stepped = 0  # Tokens of the row that has the most.
    self.count = 0  # New tokens of each row that has not ended, at least.
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
    before = virtual_tokens(self._params, "decoder")
    return {original + 1 - before - len(row.prompt) for row in self.rows if not row.ended}

  def _reread(self) -> None:
    texts = [[] if row.ended else row.prompt + row.tokens for row in self.rows]
    size, prompts = len(self._request.sampler.seed), [len(row.prompt) for row in self.rows]
    # The newest tokens are among them: a step writes them once more.
    self._cache = self._reader.read(texts, size, prompts=prompts).cache

  def _restrict(self) -> None:
    """Asks for the next tokens to keep texts within what they are to be; ends those that have to
    end and have no token for it."""
    if self._language is None:
      return
    walks = self._open_walks()
    masks = self._language.masks(walks)
    self._request = dataclasses.replace(self._request, allowed=masks)
    for row, walk, mask in zip(self.rows, walks, masks, strict=False):  # No padding rows.
      if walk is not None and not mask.any():
        if (error := walk.stuck()) is not None:
          raise error
        self._end(row)

  def _open_walks(self) -> list[Walk | None]:
    """The way of each row through the language; None for those that have ended and for padding."""
    rows = zip(self.rows, self._walks, strict=True)
    padding = [None] * (len(self._request.sampler.seed) - len(self.rows))
    return [*(None if row.ended else walk for row, walk in rows), *padding]

  def _end(self, row: Row) -> None:
    if len(row.tokens) < self.settings.min_new_tokens:
      raise nothing_left(len(row.tokens))
    row.ended = True

  def _decode(self, *goals: int) -> None:
    self._restrict()
    if self.finished:
      return
    stopped = np.ones(len(self._request.sampler.seed), bool)
    stopped[: len(self.rows)] = [row.ended for row in self.rows]
    until = np.int32(min(goals))
    if self.settings.draft is None:
      self._cache, self._progress = decode(
        self._net, self._params, self._cache, self._progress, stopped, until, self._request
      )
    elif self._language is not None:
      self._cache, self._drafts, self._progress, self._tally = speculate_within(
        self._net, self._params, self._draft, self._cache, self._drafts, self._progress,
        self._tally, stopped, until, self._request, self._open_walks(), ahead=self._ahead,
      )  # fmt: skip
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
    steps, self._stepped = int(counts.max()) - self._stepped, int(counts.max())
    before = [len(row.tokens) for row in self.rows]
    walks = self._walks or [None] * len(self.rows)
    for row, walk, count, tokens in zip(self.rows, walks, counts, drawn, strict=False):
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
        if walk is not None and not row.ended:
          walk.take(token)
          if walk.ended:
            self._end(row)
    going = [len(row.tokens) for row in self.rows if not row.ended]
    self.count = min(going, default=int(counts.max()))
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

  def reused(self) -> list[int | None]:
    """Tokens of each row's prompt that a cache of prefixes had; None without one."""
    return self._reused

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
  cfg, longest = m.config, max(map(len, prompts))
  length = cache_length(m, [prefix(m, prompt) for prompt in prompts], settings)
  room = m.room(cfg.stacks[0])
  source = bucket(longest, LEAST_PROMPT, room)  # Kept behind an encoder only.
  chunk, dtype = chunk_of(cfg, settings, length), kept_dtype(settings)
  row = jax.eval_shape(
    lambda: new_cache(
      cfg, 1, length, stacked=False, chunk=chunk, source=source,
      dtype=None if dtype is None else jnp.dtype(dtype),
    )
  )  # fmt: skip
  row_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(row))
  stats = jax.local_devices()[0].memory_stats() or {}
  free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
  budget = CACHE_SHARE * free if stats else CACHE_BYTES
  copies = settings.num_beams if not settings.penalty_alpha else settings.top_k or 1
  whole = cfg.shape == "encoder_decoder"  # An encoder reads its texts whole.
  width = source if whole else min(chunk, bucket(longest, LEAST_PROMPT, room))
  scores = 4 * cfg.num_heads * width * (source if whole else length)
  most = min(budget // row_bytes // copies, budget // 2 // scores, PASS_TOKENS // width)
  return 1 << max(0, int(most).bit_length() - 1)


def text_of(m: "Model") -> Callable[[list[int]], str]:
  """Token ids -> text; '' for a model without a tokenizer."""
  return m.tokenizer.decode if m.tokenizer is not None else lambda tokens: ""


def cache_length(m: "Model", prompts: list[list[int]], settings: Settings) -> int:
  """Tokens that the caches of these prompts have room for, virtual ones among them."""
  longest, most = max(map(len, prompts)), m.room("decoder")
  length = bucket(longest + settings.most_new_tokens(), LEAST_LENGTH, most)
  return length + virtual_tokens(m.params, "decoder")


def _table(
  prompts: list[list[int]], size: int, least: int, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, each prompt from the left; lengths, 0 for rows that only fill the batch)."""
  tokens = np.zeros((size, bucket(max(map(len, prompts)), least, most)), np.int32)
  lengths = np.zeros(size, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
  return tokens, lengths


@dataclasses.dataclass(frozen=True)
class Ways:
  """The prompts of a batch without copies, and the row of each place of the batch among them."""

  reads: list[list[int]]  # What the decoder reads.
  source: Inputs | None  # What the encoder reads.
  size: int  # Rows of a pass.
  rows: np.ndarray | None  # None: as they are.
  adapters: list[int] | None  # Of each prompt; None: as the model is.


def distinct(
  m: "Model", prompts: list[list[int]], size: int, groups: list[int] | None = None,
  adapters: list[int] | None = None,
) -> Ways:  # fmt: skip
  """The prompts of a batch of `size` rows, of which those of one group are one."""
  if groups is None or len(set(groups)) == len(groups):
    reads = [prefix(m, prompt) for prompt in prompts]
    return Ways(reads, source_of(m, prompts, size), size, None, adapters)
  own = list(dict.fromkeys(groups))
  firsts = [groups.index(group) for group in own]
  once = [prompts[i] for i in firsts]
  adapters = None if adapters is None else [adapters[i] for i in firsts]
  rows: Any = np.zeros(size, np.int32)
  rows[: len(groups)] = [own.index(group) for group in groups]
  size = bucket(len(own), 1)
  reads = [prefix(m, prompt) for prompt in once]
  return Ways(reads, source_of(m, once, size), size, rows, adapters)


def read_prompts(
  reader: Reader, ways: Ways, settings: Settings, *, states: bool = False
) -> tuple[Behind, list[int | None]]:
  """(what is known behind the prompts, how many of their tokens a cache of prefixes had)."""
  prefixes, own = settings.prefix_cache, ways.adapters or [None] * len(ways.reads)
  trails = [] if prefixes is None else [
    prefixes.trail(text, reader.dtype, adapter)
    for text, adapter in zip(ways.reads, own, strict=True)
  ]  # fmt: skip
  reader = reader.with_adapters(ways.adapters, ways.size)
  behind = reader.read(ways.reads, ways.size, source=ways.source, trails=trails, states=states)
  reused: list[int | None] = [trail.tokens for trail in trails] or [None] * len(ways.reads)
  if ways.rows is None:
    return behind, reused
  padded = reused + [None] * ways.size
  return spread(behind, ways.rows), [padded[row] for row in ways.rows]


def said(reads: list[list[int]], size: int, length: int) -> History:
  """What has been said before the first new token, with room for `length` tokens."""
  tokens, lengths = _table(reads, size, length, length)
  return History(tokens, lengths, lengths)  # pyright: ignore[reportArgumentType]


def source_of(m: "Model", prompts: list[list[int]], size: int) -> Inputs | None:
  """What an encoder reads; None where there is none."""
  if m.config.shape != "encoder_decoder":
    return None
  tokens, lengths = _table(prompts, size, LEAST_PROMPT, m.room("encoder"))
  index: Any = np.arange(tokens.shape[1], dtype=np.int32)
  return Inputs(jnp.asarray(tokens), jnp.where(index < lengths[:, None], index, -1))
