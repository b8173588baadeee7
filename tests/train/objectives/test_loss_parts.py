"""The vocabulary scored for parts of the rows gives the loss and gradients of all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.errors import InputError
from tests.train import tiny
from train.config import ObjectiveConfig
from train.objectives import make_objective
from train.objectives.loss import in_parts
from train.objectives.objective import batch_fields
from train.program import make_loss

MODELS = {
  "causal_lm": (tiny.MODELS["learned_layer_norm"], {}),
  "prefix_lm": (dataclasses.replace(tiny.ROTARY, prefix_attention=True), {}),
  "masked_lm": (tiny.SHAPES["encoder"][0], {}),
  "span_corruption": (tiny.SHAPES["encoder_decoder"][0], dict(target_len=16)),
  "denoising": (tiny.SHAPES["encoder_decoder"][0], dict(target_len=16)),
  "ul2": (tiny.SHAPES["encoder_decoder"][0], dict(target_len=16)),
  "seq2seq": (tiny.ROTARY, {}),
  "sft": (tiny.ROTARY, {}),
}
DAILY = ("sft",)


def settings(name, parts=1, dtype="float32"):
  model, lengths = MODELS[name]
  model = dataclasses.replace(
    model, dtype=dtype, param_dtype=dtype, vocab_size=tiny.VOCAB, decoder_start_id=0
  )
  objective = ObjectiveConfig(
    name=name, z_loss=0.1, label_smoothing=0.1, loss_parts=parts,
    **(dict(mask_rate=0.3) if name == "masked_lm" else {}),
  )  # fmt: skip
  return tiny.config(model, objective=objective, seq_len=24, **lengths)


def some_batch(config):
  """Random words, of which some do not count."""
  rng, batch = np.random.default_rng(0), {}
  for name, ((length,), dtype, _) in batch_fields(make_objective(config).sides).items():
    shape, kind = (4, length), name.rpartition("_")[2]
    values = {
      "segments": np.ones(shape), "positions": np.broadcast_to(np.arange(length), shape),
      "weights": rng.integers(0, 2, shape),
      "prefix": np.arange(length) < rng.integers(1, 9, (4, 1)),
      "places": np.sort(rng.integers(0, config.seq_len, shape)), "types": np.zeros(shape),
    }.get(kind, rng.integers(0, tiny.VOCAB, shape))  # fmt: skip
    batch[name] = np.asarray(values).astype(dtype)
  return batch


def learned(config, batch):
  """(loss, gradients) of a batch."""
  objective = make_objective(config)
  net = objective.build(config.model, nnx.Rngs(0))
  graphdef, params = nnx.split(net, nnx.Param)
  loss_fn = make_loss(graphdef, objective)

  def total(params):
    loss = loss_fn(params, {}, batch, None)
    return loss.terms["loss"], loss

  (_, loss), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(nnx.to_pure_dict(params))
  return loss, grads


def cases():
  marks = lambda name: () if name in DAILY else pytest.mark.slow
  return [pytest.param(name, marks=marks(name)) for name in MODELS]


@pytest.mark.parametrize("name", cases())
def test_loss_in_parts_equals_the_loss_at_once(name):
  with jax.enable_x64(True):
    batch = some_batch(settings(name))
    length = next(v for k, v in batch.items() if k.endswith("targets")).shape[1]
    parts = next(n for n in range(2, length + 1) if length % n == 0)
    want, got = (learned(settings(name, n, "float64"), batch) for n in (1, parts))
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
  jax.tree.map(near, got, want)
  assert max(np.abs(g).max() for g in jax.tree.leaves(got[1])) > 1e-3


def test_scores_of_all_words_are_never_held_at_once():
  batch = some_batch(settings("causal_lm"))
  everything = f"4,24,{settings('causal_lm').model.padded_vocab}]"
  for parts, held in ((1, True), (4, False)):
    config = settings("causal_lm", parts)
    graphdef, params = nnx.split(make_objective(config).build(config.model, nnx.Rngs(0)), nnx.Param)
    loss_fn = make_loss(graphdef, make_objective(config))
    total = lambda params: loss_fn(params, {}, batch, None).terms["loss"]  # noqa: B023
    program = str(jax.make_jaxpr(jax.grad(total))(nnx.to_pure_dict(params)))
    assert (everything in program) is held


def test_parts_that_do_not_divide_a_row_are_refused():
  config = settings("causal_lm", 5)
  with pytest.raises(InputError, match="loss_parts=5 does not divide the 24 places"):
    learned(config, some_batch(config))


@pytest.mark.parametrize("name", ["replaced_token", "classification"])
def test_parts_are_refused_where_they_have_no_effect(name):
  with pytest.raises(InputError, match=r"loss_parts=2 has no effect"):
    ObjectiveConfig(name=name, loss_parts=2)


def test_parts_in_which_nothing_is_learned_are_not_scored():
  rng, scored = np.random.default_rng(0), []
  x, table = (rng.normal(size=s).astype(np.float32) for s in ((2, 16, 3), (3, 11)))
  targets = rng.integers(0, 11, (2, 16))
  weights = np.zeros((2, 16), np.float32)
  weights[0, [3, 9, 14]], weights[1, [0, 15]] = 1, 0.5

  def total(x, parts, few):
    def sums(x, targets, weights):
      jax.debug.callback(lambda: scored.append(1))
      nats = -jnp.take_along_axis(jax.nn.log_softmax(x @ table), targets[..., None], -1)[..., 0]
      return (jnp.sum(nats * weights),)

    return in_parts(sums, x, targets, weights, parts, few=few)[0]

  want, want_grad = jax.value_and_grad(total)(x, 1, few=False)
  for weigh, parts in ((weights, 1), (np.zeros_like(weights), 0)):
    weights, scored = weigh, []
    total(x, 4, few=True)
    jax.effects_barrier()
    assert len(scored) == parts
    if parts:
      got, grad = jax.value_and_grad(total)(x, 4, few=True)
      np.testing.assert_allclose(got, want, rtol=1e-6)
      np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-7)
