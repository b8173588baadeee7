"""The identities of three shapes: cached, looped, rematerialized, pooled, refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.cache import new_cache
from model.config import ModelConfig
from model.heads import abstract, init_params, pool, unstack
from model.trained import Model
from model.transformer import Inputs

BASE = ModelConfig(
  shape="encoder", vocab_size=96, vocab_multiple=32, num_layers=2, d_model=32, d_ff=48, num_heads=4,
  max_positions=256, norm="layer", norm_placement="post", final_norm=False, embed_norm=True,
  positions="learned", gated=False, activation="gelu", mlp_bias=True, attention_bias=True,
  attention_out_bias=True, param_dtype="float32",
)  # fmt: skip


T5 = dict(
  shape="encoder_decoder", positions="t5_bias", norm="rms", norm_eps=1e-6, norm_placement="pre",
  final_norm=True, embed_norm=False, attention_scale=1.0, activation="relu", mlp_bias=False,
  attention_bias=False, attention_out_bias=False, logit_scale=32**-0.5, max_positions=None,
  head_dim=8, num_decoder_layers=3, decoder_start_id=0,
)  # fmt: skip


def padded(arrays, length, left=False):
  """(tokens, positions) of arrays, padded on one side."""
  tokens, pos = np.zeros((len(arrays), length), int), np.full((len(arrays), length), -1)
  for i, a in enumerate(arrays):
    at = slice(length - len(a), length) if left else slice(0, len(a))
    tokens[i, at], pos[i, at] = a, np.arange(len(a))
  return tokens, pos


SMALL = {
  "t5": dataclasses.replace(BASE, **T5, num_layers=2),
  "bart": dataclasses.replace(BASE, shape="encoder_decoder", position_offset=2, num_kv_heads=2),
  "windows": dataclasses.replace(
    BASE, shape="encoder_decoder", positions="rotary", norm="rms", norm_placement="sandwich",
    layer_pattern=("local", "global"), window=4, qk_norm="head", num_decoder_layers=3,
    decoder_pattern=("global", "local", "local"), decoder_window=3, decoder_embed=True,
  ),
  "shared": dataclasses.replace(
    BASE, shape="encoder_decoder", num_decoder_layers=4, layer_sets=2, d_embed=16, head_dense=True,
    relative_bias=True,
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  ("name", "stacked"),
  [("windows", True), *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      ("t5", False), ("t5", True), ("bart", False), ("bart", True), ("windows", False),
      ("shared", True),
    )
  )],
)  # fmt: skip
def test_cached_cross_attention_equals_one_full_pass(name, stacked):
  cfg = SMALL[name]
  params = init_params(cfg, jax.random.key(0))
  docs = [(np.arange(9) + 5, np.arange(8) + 9), (np.arange(20) + 7, np.arange(11) + 11)]
  source = Inputs(*map(jnp.asarray, padded([a for a, _ in docs], 24)))
  answers, pos = padded([b for _, b in docs], 11, left=True)
  graphdef = nnx.split(abstract(cfg), nnx.Param)[0]
  whole = lambda p: nnx.merge(graphdef, p).hidden(Inputs(answers, pos), source=source)[0]
  want = jax.jit(whole)(params)
  if not stacked:
    graphdef = nnx.split(abstract(cfg, stacked=False), nnx.Param)[0]
    params = unstack(cfg, params)
  cache = new_cache(cfg, 2, 11, stacked=stacked, chunk=6, source=24)
  cache, got = jax.jit(lambda p: nnx.merge(graphdef, p).read(cache, source))(params), []

  @jax.jit
  def step(cache, tokens, pos):
    return nnx.merge(graphdef, params).hidden(Inputs(tokens, pos), cache=cache)[:2]

  for chunk in (slice(0, 6), *(slice(t, t + 1) for t in range(6, 11))):
    x, cache = step(cache, answers[:, chunk], pos[:, chunk])
    got.append(x)
  real = pos >= 0
  np.testing.assert_allclose(
    np.concatenate(got, axis=1)[real], np.asarray(want)[real], rtol=1e-4, atol=1e-5
  )


LOOP, REMAT = dict(scan_layers=False), dict(remat="full")


@pytest.mark.parametrize(
  ("name", "change"),
  [("t5", LOOP), ("windows", LOOP), ("windows", REMAT), ("bart", LOOP), ("bart", REMAT),
   ("t5", REMAT), ("shared", LOOP)],
)  # fmt: skip
@pytest.mark.slow
def test_loop_and_remat_equal_the_plain_scan_of_both_stacks(name, change):
  cfg = dataclasses.replace(SMALL[name], dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1)
  params = init_params(cfg, jax.random.key(0))
  tokens = jnp.arange(24).reshape(2, 12) + 5
  pos = jnp.broadcast_to(jnp.arange(12), (2, 12))

  def gradient(cfg):
    graphdef = nnx.split(abstract(cfg), nnx.Param)[0]

    def total(params):
      net = nnx.merge(graphdef, params)
      side = Inputs(tokens, pos)
      x, _, _ = net.hidden(side, source=side, key=jax.random.key(1))
      return jnp.sum(jax.nn.logsumexp(net.logits(x), axis=-1))

    return jax.jit(jax.value_and_grad(total))(params)

  (value, grads), (want, want_grads) = gradient(dataclasses.replace(cfg, **change)), gradient(cfg)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads,
               want_grads)  # fmt: skip


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_takes_each_segment_by_itself(how):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 10, 3)).astype(np.float32)
  seg = np.array([[1, 1, 1, 2, 2, 0, 3, 3, 3, 3], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
  pos = np.array([[0, 1, 2, 0, 1, -1, 0, 1, 2, 3], [-1, -1, *range(8)]])
  got = np.asarray(pool(jnp.asarray(x), jnp.asarray(pos), jnp.asarray(seg), how=how, segments=4))
  for row in range(2):
    for s in range(1, 5):
      own = x[row][seg[row] == s]
      want = {"first": own[:1], "last": own[-1:], "mean": own}[how]
      np.testing.assert_allclose(got[row, s - 1], want.mean(0) if len(want) else 0, atol=1e-6)


def test_what_a_shape_does_not_take_is_refused_by_name():
  encoder = Model(BASE, init_params(BASE, jax.random.key(0)))
  both = Model(SMALL["bart"], init_params(SMALL["bart"], jax.random.key(0)))
  ids = np.array([[5, 6, 7]])
  for call, said in (
    (lambda: encoder(ids, decoder_tokens=ids), "no encoder–decoder"),
    (lambda: encoder(ids, token_types=ids), "token_types"),
    (lambda: both(ids), "decoder_tokens"),
    (lambda: both(ids, decoder_tokens=ids + 96), "decoder_token 103"),
    (lambda: both(ids, decoder_tokens=ids, segments=ids - 4), "segments for the encoder and"),
    (lambda: dataclasses.replace(BASE, head="language"), "head='language'"),
    (lambda: dataclasses.replace(BASE, num_decoder_layers=2), "num_decoder_layers"),
    (lambda: dataclasses.replace(BASE, layer_sets=3), "layer_sets=3 does not divide 2"),
    (lambda: dataclasses.replace(SMALL["windows"], layer_sets=1), "layers of one kind"),
    (lambda: dataclasses.replace(BASE, d_embed=16), "set model.head_dense"),
    (lambda: dataclasses.replace(SMALL["t5"], relative_bias=True), "beside learned positions"),
    (lambda: dataclasses.replace(BASE, head_dense_bias=False), "no effect without head_dense"),
    (lambda: dataclasses.replace(BASE, decoder_pattern=("global",)), "decoder_pattern"),
    (lambda: dataclasses.replace(BASE, decoder_embed=True), "decoder_embed"),
    (lambda: dataclasses.replace(SMALL["t5"], decoder_window=3), "no local layer"),
    (lambda: dataclasses.replace(SMALL["bart"], relative_bias_per_layer=True), "per_layer"),
    (lambda: dataclasses.replace(SMALL["bart"], sinusoid_inclusive=True), "sinusoid_inclusive"),
    (lambda: dataclasses.replace(SMALL["t5"], position_offset=2), "position_offset"),
  ):
    with pytest.raises(ValueError, match=said):
      call()
