"""Samplers against Transformers' processors, and draws against the exact distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.sampling import (
  OFF_TOP_K,
  Epsilon,
  MinP,
  Sampler,
  Temperature,
  TopK,
  TopP,
  TypicalP,
  draw,
  seed_words,
)

ROWS, VOCAB = 1000, 211


restrict = jax.jit(Sampler.restrict)


def logits_of(seed: int = 0, rows: int = ROWS) -> np.ndarray:
  """Random rows, some peaked and some flat, with a padded vocabulary at -inf."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(rows, VOCAB)) * rng.uniform(0.2, 6, size=(rows, 1))
  logits[:, -11:] = -np.inf
  return logits.astype(np.float32)


def sampler(
  rows: int, *, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=1.0,
  epsilon_cutoff=0.0, seed=0,
) -> Sampler:  # fmt: skip
  full = lambda value, dtype: jnp.full(rows, value, dtype)
  return Sampler(
    Temperature(full(temperature, jnp.float32)),
    TopK(full(OFF_TOP_K if top_k is None else top_k, jnp.int32)),
    TopP(full(1.0 if top_p is None else top_p, jnp.float32)),
    MinP(full(min_p or 0.0, jnp.float32)),
    TypicalP(full(typical_p, jnp.float32)),
    Epsilon(full(epsilon_cutoff, jnp.float32)),
    jnp.broadcast_to(seed_words(seed), (rows, 2)),
    full(0, jnp.int32),
  )


def kept_alike(got: np.ndarray, want: np.ndarray) -> None:
  """The same tokens stay with the same log-probabilities."""
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
  log_softmax = lambda x: np.asarray(jax.nn.log_softmax(x, axis=-1))
  np.testing.assert_allclose(log_softmax(got), log_softmax(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    dict(temperature=0.7), dict(temperature=1.9), dict(top_k=1), dict(top_k=37), dict(top_k=10_000),
    dict(top_p=0.05), dict(top_p=0.9), dict(min_p=0.02), dict(min_p=1.0),
    dict(typical_p=0.1), dict(typical_p=0.9), dict(epsilon_cutoff=0.003), dict(epsilon_cutoff=0.9),
    dict(temperature=1.3, top_k=50, top_p=0.8, min_p=0.05),
    dict(temperature=0.8, top_k=90, top_p=0.95, min_p=0.001, typical_p=0.8, epsilon_cutoff=0.01),
  ],
)  # fmt: skip
def test_restricted_logits_equal_those_of_transformers(settings):
  torch = pytest.importorskip("torch")
  processors = pytest.importorskip("transformers.generation.logits_process")
  kinds = dict(
    temperature=processors.TemperatureLogitsWarper, top_k=processors.TopKLogitsWarper,
    top_p=processors.TopPLogitsWarper, min_p=processors.MinPLogitsWarper,
    typical_p=processors.TypicalLogitsWarper, epsilon_cutoff=processors.EpsilonLogitsWarper,
  )  # fmt: skip
  logits = logits_of()
  want = torch.tensor(logits)
  for name, value in settings.items():
    want = kinds[name](value)(None, want)
  got = restrict(sampler(ROWS, **settings), logits)
  kept_alike(np.asarray(got), want.numpy())


def test_each_row_has_settings_of_its_own():
  logits = logits_of(rows=4)
  each = [dict(top_k=3), dict(top_p=0.5), dict(min_p=0.1), dict(temperature=0.5)]
  alone = [restrict(sampler(1, **s), logits[[i]]) for i, s in enumerate(each)]
  mixed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[sampler(1, **s) for s in each])
  kept_alike(np.asarray(restrict(mixed, logits)), np.concatenate(alone))


def test_tokens_that_tie_with_the_last_one_stay():
  logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
  assert np.isfinite(TopK(jnp.array([2]))(logits)).tolist() == [[True, True, True, False, False]]
  assert np.isfinite(TopP(jnp.array([0.5]))(logits)).tolist() == [[True, True, True, False, False]]


def test_extreme_settings_leave_the_most_probable_token_and_no_nan():
  logits = logits_of(rows=3)
  tiny = float(np.finfo(np.float32).tiny)
  for settings in (dict(temperature=tiny), dict(top_p=tiny), dict(min_p=1.0), dict(top_k=1)):
    kept = np.asarray(restrict(sampler(3, **settings), logits))
    assert not np.isnan(kept).any()
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))
  assert not np.isnan(restrict(sampler(3, temperature=np.finfo(np.float32).max), logits)).any()


def exact_distribution(
  logits, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon_cutoff=0.0
) -> np.ndarray:
  """The probabilities that are drawn from, one restriction after the other, in float64."""
  probs = np.exp(np.asarray(logits, np.float64) / temperature)

  def keep(chosen):
    nonlocal probs
    probs = np.where(chosen, probs, 0)
    probs /= probs.sum()

  def first_to(share, order):
    """The tokens in this order up to the first whose sum reaches the share."""
    before = np.cumsum(probs[order]) - probs[order]
    chosen = np.zeros(len(probs), bool)
    chosen[order[before < share]] = True
    return chosen

  keep(probs > 0)
  keep(probs >= np.sort(probs)[-(top_k or 0)])
  keep(first_to(top_p, np.argsort(-probs)))
  keep(probs >= min_p * probs.max())
  surprise = -np.log(np.maximum(probs, 1e-300))
  keep(first_to(typical_p, np.argsort(np.abs(surprise - (probs * surprise).sum()))))
  keep((probs >= epsilon_cutoff) | (probs == probs.max()))
  return probs


def fits(counts: np.ndarray, exact: np.ndarray) -> None:
  """Chi squared: what is impossible never comes, the rest as often as it should."""
  assert counts[exact == 0].sum() == 0
  kept = exact > 0
  expected = exact[kept] * counts.sum()
  chi2, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), kept.sum() - 1
  assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom), (chi2, freedom)


@pytest.mark.parametrize(
  ("settings", "kept"),
  [
    (dict(temperature=0.8, top_k=30, top_p=0.97), 10),
    (dict(temperature=1.4, top_k=33, top_p=0.98, min_p=0.02, typical_p=0.93), 12),
  ],
)
def test_draws_have_the_exact_distribution(settings, kept):
  draws, vocab = 100_000, 40
  logits = np.random.default_rng(3).normal(size=vocab).astype(np.float32) * 1.5
  logits[[0, 7, 39]] = -np.inf
  chosen = sampler(draws, seed=11, **settings)
  tokens = jax.jit(lambda s, x, pos: s(x, pos))(
    chosen, jnp.broadcast_to(logits, (draws, vocab)), jnp.arange(draws)
  )
  exact = exact_distribution(logits, **settings)
  assert kept <= (exact > 0).sum() < settings["top_k"], "each restriction has an effect"
  fits(np.bincount(np.asarray(tokens), minlength=vocab), exact)


def test_draws_from_a_large_vocabulary_are_never_impossible_and_reach_its_ends():
  vocab, rows = 4097, 2000
  logits = jnp.full((rows, vocab), -jnp.inf).at[:, jnp.array([0, 2048, 4096])].set(0.0)
  tokens = draw(logits, jax.random.split(jax.random.key(0), rows))
  assert set(np.unique(tokens)) == {0, 2048, 4096}


def test_a_draw_depends_on_seed_sequence_and_position_not_on_the_row():
  logits = np.tile(logits_of(rows=1), (6, 1))
  pos = np.array([5, 5, 6, 5, 5, 6])
  s = sampler(6, temperature=2.0, seed=2**40 + 3)
  s = dataclasses.replace(s, sequence=jnp.array([0, 1, 0, 0, 1, 0]))
  keys = np.asarray(jax.random.key_data(s.keys(pos)))
  assert len({tuple(k) for k in keys[:3].tolist()}) == 3
  np.testing.assert_array_equal(keys[:3], keys[3:])
  tokens = np.asarray(s(logits, pos))
  np.testing.assert_array_equal(tokens[:3], tokens[3:])
  assert not np.array_equal(keys[0], sampler(1, seed=3).keys(pos[:1])[0])


def test_seeds_are_those_of_jax():
  want = jax.random.key_data(jax.random.key(123, impl="threefry2x32"))
  np.testing.assert_array_equal(seed_words(123), want)
