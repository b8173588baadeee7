"""The identities of the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.cache import new_cache
from model.config import ModelConfig
from model.heads import abstract, init_params
from model.layers import FEW_ROWS, MLP, scores
from model.trained import Model
from model.transformer import Inputs
from tests.train import tiny

BASE = ModelConfig(
  vocab_size=96, vocab_multiple=32, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
  head_dim=8, max_positions=64,
)  # fmt: skip


@pytest.mark.parametrize("name", tiny.marked(*tiny.LONGER))
def test_cached_and_unstacked_decoding_equal_one_full_pass(name):
  cfg = tiny.MODELS[name]
  params = init_params(cfg, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, cfg.vocab_size)
  pos = jnp.stack([jnp.arange(12), jnp.arange(12) - 3]).clip(-1)  # The second is padded left.
  graphdef = nnx.split(abstract(cfg), nnx.Param)[0]
  want = jax.jit(lambda p: nnx.merge(graphdef, p).hidden(Inputs(tokens, pos))[0])(params)
  loose, separate = Model(cfg, params).unstacked()

  @jax.jit
  def step(params, cache, tokens, pos):
    return nnx.merge(loose, params).hidden(Inputs(tokens, pos), cache=cache)[:2]

  cache, got = new_cache(cfg, 2, 12, stacked=False, chunk=5), []
  for chunk in (slice(0, 5), *(slice(t, t + 1) for t in range(5, 12))):
    x, cache = step(separate, cache, tokens[:, chunk], pos[:, chunk])
    got.append(x)
  real = pos >= 0
  np.testing.assert_allclose(
    jnp.concatenate(got, axis=1)[real], want[real], rtol=1e-4, atol=1e-5
  )  # fmt: skip


@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (FEW_ROWS + 1,)])
def test_scores_equal_a_product_and_have_its_gradient(rows):
  rng = np.random.default_rng(0)
  table, x = rng.standard_normal((24, 16)), rng.standard_normal((*rows, 16))
  value, (by_table, by_x) = jax.value_and_grad(
    lambda t, x: jnp.sum(jnp.square(scores(t, x))), argnums=(0, 1)
  )(table.astype(np.float32), x.astype(np.float32))
  y = x @ table.T
  np.testing.assert_allclose(value, np.sum(y**2), rtol=1e-5)
  np.testing.assert_allclose(by_x, 2 * y @ table, rtol=1e-4, atol=1e-4)
  want = 2 * y.reshape(-1, 24).T @ x.reshape(-1, 16)
  np.testing.assert_allclose(by_table, want, rtol=1e-4, atol=1e-4)


def test_an_mlp_drops_what_its_activation_gives():
  cfg = dataclasses.replace(BASE, d_ff=32, gated=False, activation="relu", mlp_dropout=0.3)
  mlp = MLP(cfg, rngs=nnx.Rngs(0))
  mlp.up_proj.w[...] = mlp.down_proj.w[...] = jnp.eye(32)
  x = 1 + jnp.arange(2 * 500 * 32.0).reshape(2, 500, 32)
  y = mlp(x, jax.random.key(0))
  np.testing.assert_allclose(jnp.where(y == 0, x, 0.7 * y), x, rtol=1e-6)
  assert abs(float(jnp.mean(y == 0)) - 0.3) < 0.01
  np.testing.assert_array_equal(mlp(x), x)


def test_the_padding_of_the_vocabulary_is_never_predicted_or_counted():
  cfg = dataclasses.replace(tiny.ROTARY, vocab_size=61, vocab_multiple=64)
  params = init_params(cfg, jax.random.key(0))
  m = Model(cfg, params)
  tokens = np.arange(8)[None]
  assert m(tokens).shape == (1, 8, 61)
  net = nnx.merge(m.graphdef, params)
  logits = net.logits(net.hidden(Inputs(jnp.asarray(tokens), jnp.arange(8)[None]))[0])
  assert logits.shape[-1] == 64 and np.all(np.isneginf(logits[..., 61:]))
  exact = dataclasses.replace(cfg, vocab_multiple=1)
  assert cfg.num_params() == exact.num_params()
  held = sum(a.size for a in jax.tree.leaves(init_params(exact, jax.random.key(0))))
  assert exact.num_params() == held


def test_wrong_tokens_are_refused_by_name():
  m = Model(tiny.ROTARY, init_params(tiny.ROTARY, jax.random.key(0)))
  for tokens, said in (
    ([[61]], "token 61"), ([[-1]], "tokens hold -1"), ([[0.5]], "whole numbers"), ([1, 2], "shape"),
    (np.zeros((1, 33), int), "position 32"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=said):
      m(np.asarray(tokens))
  for name, values, said in (
    ("segments", [[-1, 0]], "segments hold -1"), ("positions", [[-2, 0]], "positions hold -2"),
    ("segments", [[1.0, 1.0]], "segments have shape"), ("positions", [[0]], r"tokens \(1, 2\)"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=said):
      m([[1, 2]], **{name: values})
  with pytest.raises(ValueError, match="position 32"):
    jax.jit(lambda tokens: m.apply(m.params, tokens))(np.zeros((1, 33), int))


def test_lists_and_concrete_arrays_in_a_traced_call_give_the_same_logits():
  m = Model(tiny.ROTARY, init_params(tiny.ROTARY, jax.random.key(0)))
  tokens, segments, positions = [[5, 6, 7, 8]], [[1, 1, 2, 0]], [[0, 1, 0, -1]]
  want = m(np.array(tokens), segments=np.array(segments), positions=np.array(positions))
  np.testing.assert_array_equal(m(tokens, segments=segments), want)
  traced = jax.jit(lambda params: m.apply(params, tokens, segments=segments))(m.params)
  np.testing.assert_allclose(traced, want, atol=1e-5)
