"""Nothing is compiled after a warm-up, whatever is asked for; counted by JAX itself."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import infer
from tests.infer import tiny

CHUNK = 32
WORDS = dict(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1,
             no_repeat_ngram_size=3, logit_bias={5: 1.5, (6, 7): -2.0}, bad_words=["ab", 9],
             allowed_tokens=None, prefix=[7, 8])  # fmt: skip


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
  """Every program that XLA compiles meanwhile, those of single operations outside of jit too."""
  found = []

  def listen(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@dataclasses.dataclass
class Requests:
  """Random requests within buckets: rows, tokens of a pass, tokens of a cache, reports, shaping."""

  m: object
  rows: tuple[int, ...]
  longest: int
  rng: np.random.Generator
  told: tuple[int | None, ...]
  kept: infer.PrefixCache

  def prompt(self, length: int) -> list[int]:
    """Half of them share a beginning."""
    own = self.rng.integers(5, 250, length).tolist()
    shared = [(7 * i) % 200 + 9 for i in range(length)]
    cut = int(self.rng.integers(0, length)) if self.rng.random() < 0.5 else 0
    return shared[:cut] + own[cut:]

  def warm_up(self) -> None:
    """One request for each set of buckets; those of a cache of prefixes twice."""
    lengths = [n for n in (10, 30, 60) if n <= self.longest]
    for rows, shaped, told in itertools.product(self.rows, (False, True), self.told):
      for length in lengths:
        settings = dict(WORDS if shaped else {}, logprobs=told, max_new_tokens=20)
        prompts = [self.prompt(length) for _ in range(rows)]
        for prefixes in (None, self.kept, self.kept):
          self.ask(prompts, settings | dict(prefix_cache=prefixes))
        copies = settings | dict(temperature=1.0, num_return_sequences=rows)
        self.ask([self.prompt(length)], copies)

  def ask(self, prompts, settings) -> None:
    infer.generate(self.m, prompts, prefill_chunk=CHUNK, **settings)

  def any(self) -> None:
    """Asks for something."""
    draw, chance = self.rng, lambda p: self.rng.random() < p
    settings: dict = dict(
      max_new_tokens=int(draw.integers(4, 24)), min_new_tokens=int(draw.integers(0, 4)),
      seed=int(draw.integers(0, 2**40)), temperature=float(draw.random() * chance(0.7)),
      prefix_cache=self.kept if chance(0.5) else None,
    )  # fmt: skip
    for name, value in dict(
      top_k=int(draw.integers(1, 300)), top_p=float(0.1 + 0.9 * draw.random()), min_p=0.05,
      typical_p=0.9, epsilon_cutoff=1e-3,
      stop=[int(draw.integers(0, 250)), *(["e", "xy"] if chance(0.5) else [])],
    ).items():  # fmt: skip
      settings |= {name: value} if chance(0.3) else {}
    told = draw.choice(np.array(self.told, object))
    settings["logprobs"] = told and told + int(draw.integers(0, 2))
    names = [name for name in WORDS if chance(0.3)] if chance(0.5) else []
    settings |= {name: WORDS[name] for name in names}
    length = lambda: int(draw.integers(1, self.longest + 1))
    rows = int(draw.choice(self.rows))
    if chance(0.2) and settings["temperature"] > 0:
      self.ask([self.prompt(length())], settings | dict(num_return_sequences=rows))
    elif not told and chance(0.2):  # A stream tells no log-probabilities.
      one = settings | dict(prefill_chunk=CHUNK)
      "".join(infer.stream(self.m, self.prompt(length()), **one))
    else:
      self.ask([self.prompt(length()) for _ in range(rows)], settings)


@pytest.mark.parametrize(
  ("requests", "rows", "longest", "told"),
  [(50, (1,), 38, (3,)), pytest.param(500, (1, 2, 4), 100, (None, 3), marks=pytest.mark.slow)],
)
def test_requests_of_mixed_lengths_and_options_compile_nothing_after_a_warm_up(
  requests, rows, longest, told
):
  m = tiny.model(max_positions=64 if longest < 64 else 128, num_layers=1, layer_pattern=("local",))
  rng, kept = np.random.default_rng(0), infer.PrefixCache(m, block=8)
  asked = Requests(m, rows, longest, rng, told, kept)
  with counted() as programs:
    asked.warm_up()
  assert len(programs) > 10  # They are counted.
  with counted() as programs:
    for _ in range(requests):
      asked.any()
  assert programs == []
  assert asked.kept.hits > requests / 10
