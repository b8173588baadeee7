"""How long a batch of prompts takes, and what share of the device's memory bandwidth it uses."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from model.cache import Cache
from model.hardware import hardware
from model.heads import abstract
from model.layers import ParamInfo, param_info

if TYPE_CHECKING:
  from model import Model


@dataclasses.dataclass(frozen=True)
class Timing:
  """What a completion took, on the clock of the host. A first call of a shape also compiles.

  Attributes:
    time_to_first_token: seconds from the beginning of its batch, whose prompts are token ids by
      then, until the first new tokens of the batch are on the host.
    tokens_per_second: its tokens after the first, over the seconds in which it was decoded: of a
      compiled call of several steps the share of the steps that gave it a token. None: one token.
    batch_size: sequences of its batch.
    batch_tokens_per_second: as `tokens_per_second`, of all sequences of the batch together, over
      the seconds of all calls behind the first tokens.
    bandwidth_share: the bytes that a device has to read for a step of decoding (the parameters that
      it uses, and what the cache keeps of the tokens that each sequence has by then, on average),
      times steps per second, over the device's peak memory bandwidth. None: the device is not in
      the table of `model.hardware` (a CPU), or tokens were guessed ahead or searched for.

  A search is one compiled call: its first token is known when all are, `tokens_per_second` counts
  all of its tokens, and both count from the beginning.
  """

  time_to_first_token: float
  tokens_per_second: float | None
  batch_size: int
  batch_tokens_per_second: float | None
  bandwidth_share: float | None = None


class Stopwatch:
  """Times a batch: first tokens, then calls that decode some steps."""

  def __init__(self):
    self._last = time.perf_counter()
    self._first: float | None = None
    self._seconds, self._steps = 0.0, 0
    self._busy: Any = None  # Seconds and tokens of each row.
    self._tokens: Any = None

  def lap(self) -> float:
    """Seconds since the lap before, or since the beginning."""
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    return seconds

  def note(self, steps: int, tokens: list[int]) -> None:
    """Ends a lap of so many steps, in which each row got so many tokens.

    The first lap is that of first tokens.
    """
    seconds, new = self.lap(), np.array(tokens)
    if self._first is None:
      self._first = seconds
      self._busy, self._tokens = np.zeros(len(new)), np.zeros(len(new), int)
      return
    self._seconds, self._steps = self._seconds + seconds, self._steps + steps
    self._busy = self._busy + seconds * new / max(steps, 1)
    self._tokens = self._tokens + new

  def told(self, read_bytes: float | None = None, peak: float | None = None) -> list[Timing]:
    """The timing of each row.

    Args:
      read_bytes: what a device reads in a step; None: unknown.
      peak: its memory bandwidth in bytes/s; None: unknown.
    """
    rate = lambda count, seconds: float(count / seconds) if count and seconds else None
    steps = rate(self._steps, self._seconds)
    known = None not in (steps, read_bytes, peak)
    share = float(steps * read_bytes / peak) if known else None  # pyright: ignore
    whole = rate(self._tokens.sum(), self._seconds)
    return [
      Timing(self._first or 0.0, rate(n, busy), len(self._busy), whole, share)
      for n, busy in zip(self._tokens, self._busy, strict=True)
    ]

  def searched(self, tokens: list[int]) -> list[Timing]:
    """The timings of sequences of so many tokens that one search has found in this lap."""
    seconds = self.lap()
    whole = sum(tokens) / seconds
    return [Timing(seconds, n / seconds, len(tokens), whole) for n in tokens]


def peak_bandwidth() -> float | None:
  """Bytes/s of the memory of the first device; None: not in the table."""
  entry = hardware(jax.local_devices()[0].device_kind)
  return None if entry is None else entry.memory_bandwidth


def parameter_bytes(m: "Model", rows: int) -> float:
  """Bytes of parameters that a device reads for a step of `rows` sequences.

  Left out is what a step takes a few rows of or none: tables of tokens that do not score the
  vocabulary, tables of positions, encoders, and projections of what an encoder has read. Of
  experts, as many count as the rows can have chosen at most.
  """
  cfg = m.config
  infos = param_info(abstract(cfg, stacked=False))
  chosen = min(1.0, rows * cfg.experts_per_token / max(cfg.num_experts, 1))
  table = "decoder_embed" if cfg.decoder_embed else "embed"
  unread = {"encoder", "embed", "decoder_embed"} - ({table} if cfg.tie_embeddings else set())

  def size(path: tuple, info: ParamInfo, value: Any) -> float:
    names = [str(getattr(key, "key", key)) for key in path]
    behind = "cross_attn" in names and {"k_proj", "v_proj"} & set(names)
    if names[0] in unread or "position_embed" in names or behind:
      return 0.0
    return _device_bytes(value) * (chosen if info.axes[0] == "expert" else 1.0)

  is_info = lambda x: isinstance(x, ParamInfo)
  sizes = jax.tree_util.tree_map_with_path(size, infos, m.unstacked()[1], is_leaf=is_info)
  return float(sum(jax.tree.leaves(sizes)))


def cache_bytes(
  cache: Cache, own: np.ndarray, source: np.ndarray | None, share: np.ndarray
) -> float:
  """Bytes of keys and values that a device reads for a step.

  Args:
    own: tokens that each row has in the cache.
    source: tokens that the encoder has read for each row.
    share: of the steps, those that each row takes part in.
  """
  total = 0.0
  for layer in cache:
    for kept, tokens in ((layer.own, own), (layer.cross, source)):
      if kept is not None and tokens is not None:
        rows, slots = kept.pos.shape
        seen = (np.minimum(tokens, slots) * share).sum()
        total += _device_bytes(kept) / (rows * slots) * seen
  return total


def _device_bytes(tree: Any) -> float:
  """Bytes of arrays that lie on one device."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
    total += int(np.prod(shape)) * leaf.dtype.itemsize
  return total


def step_bytes(
  m: "Model", cache: Cache, prompts: list[int], new: list[int], source: list[int] | None
) -> float:
  """Bytes that a device reads for a step on average: parameters, and keys and values.

  Args:
    prompts, new: tokens that each row's decoder began with, and that it got.
    source: tokens that an encoder has read for each row.
  """
  counts = np.array(new)
  share = (counts - 1) / max(counts.max() - 1, 1)
  behind = None if source is None else np.array(source)
  held = np.array(prompts) + counts / 2
  return parameter_bytes(m, len(new)) + cache_bytes(cache, held, behind, share)
