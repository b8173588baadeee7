"""Arrays that would be the largest of all are computed in parts, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attend, quant


def near(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_wide_head_is_widened_in_parts(format, monkeypatch):
  w = quant.quantize(jax.random.normal(jax.random.key(0), (16, 96)), format)
  x = jax.random.normal(jax.random.key(1), (2, 20, 16))

  def score(x):
    y = quant.product(x, w, jnp.float32)
    return jnp.sum(jnp.sin(y)), y

  want = jax.value_and_grad(score, has_aux=True)(x)
  monkeypatch.setattr(quant, "_MOST_WIDENED", 96 * 16)  # A quarter, in float32.
  assert quant._parts(x, w) == 4
  text = str(jax.make_jaxpr(jax.grad(lambda x: score(x)[0]))(x))
  assert "f32[96,16]" not in text and "f32[24,16]" in text
  near(jax.value_and_grad(score, has_aux=True)(x), want)


def test_many_scores_are_computed_for_one_group_of_heads_after_the_other(monkeypatch):
  draw = lambda i, heads: jax.random.normal(jax.random.key(i), (2, 12, heads, 8))
  q, k, v = draw(0, 6), draw(1, 3), draw(2, 3)
  pos = jnp.stack([jnp.arange(12), jnp.maximum(jnp.arange(12) - 3, -1)])

  def run(q, k, v):
    y = attend.attend(
      q, k, v, q_pos=pos, kv_pos=pos, causal=True, scale=0.3, ordered=True, kernel="xla"
    )
    return jnp.sum(jnp.sin(y)), y

  grad = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  want = grad(q, k, v)
  monkeypatch.setattr(attend, "_MANY_SCORES", 1)
  text = str(jax.make_jaxpr(grad)(q, k, v))
  assert "f32[2,3,2,12,12]" not in text and "f32[2,1,2,12,12]" in text
  near(grad(q, k, v), want)
