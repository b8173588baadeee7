"""The Block's settings against Transformers' models, and the identities of the decoder."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.cache import new_cache
from model.config import ModelConfig
from model.heads import abstract, init_params
from model.layers import FEW_ROWS, MLP, scores
from model.loading import Model
from model.transformer import Inputs
from tests.train import tiny

BASE = ModelConfig(
  vocab_size=96, vocab_multiple=32, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
  head_dim=8, max_positions=64,
)  # fmt: skip
SIZES = dict(
  vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
  num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
LLAMA = (
  ("model.embed_tokens.weight", "embed.table", "v d -> v d"),
  ("model.layers.{i}.self_attn.q_proj.weight", "attn.q_proj.w", "(n h) d -> d n h"),
  ("model.layers.{i}.self_attn.k_proj.weight", "attn.k_proj.w", "(n h) d -> d n h"),
  ("model.layers.{i}.self_attn.v_proj.weight", "attn.v_proj.w", "(n h) d -> d n h"),
  ("model.layers.{i}.self_attn.o_proj.weight", "attn.o_proj.w", "d (n h) -> n h d"),
  ("model.layers.{i}.mlp.gate_proj.weight", "mlp.gate_proj.w", "f d -> d f"),
  ("model.layers.{i}.mlp.up_proj.weight", "mlp.up_proj.w", "f d -> d f"),
  ("model.layers.{i}.mlp.down_proj.weight", "mlp.down_proj.w", "d f -> f d"),
  ("model.norm.weight", "final_norm.scale", "d -> d"),
)
PRE = (
  ("model.layers.{i}.input_layernorm.weight", "attn_norm.scale", "d -> d"),
  ("model.layers.{i}.post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
)
SANDWICH = (
  ("model.layers.{i}.input_layernorm.weight", "attn_norm.scale", "d -> d"),
  ("model.layers.{i}.post_attention_layernorm.weight", "attn_post_norm.scale", "d -> d"),
  ("model.layers.{i}.pre_feedforward_layernorm.weight", "mlp_norm.scale", "d -> d"),
  ("model.layers.{i}.post_feedforward_layernorm.weight", "mlp_post_norm.scale", "d -> d"),
)
QK = (
  ("model.layers.{i}.self_attn.q_norm.weight", "attn.q_norm.scale", "h -> h"),
  ("model.layers.{i}.self_attn.k_norm.weight", "attn.k_norm.scale", "h -> h"),
)
QK_FULL = (
  ("model.layers.{i}.self_attn.q_norm.weight", "attn.q_norm.scale", "(n h) -> n h"),
  ("model.layers.{i}.self_attn.k_norm.weight", "attn.k_norm.scale", "(n h) -> n h"),
)
OUTPUT = (SANDWICH[1], SANDWICH[3])
GPT2 = (
  ("transformer.wte.weight", "embed.table", "v d -> v d"),
  ("transformer.wpe.weight", "position_embed.table", "p d -> p d"),
  ("transformer.h.{i}.ln_1.weight", "attn_norm.scale", "d -> d"),
  ("transformer.h.{i}.ln_1.bias", "attn_norm.bias", "d -> d"),
  ("transformer.h.{i}.attn.c_attn.weight", "attn.{qkv}_proj.w", "d (c n h) -> c d n h"),
  ("transformer.h.{i}.attn.c_attn.bias", "attn.{qkv}_proj.b", "(c n h) -> c n h"),
  ("transformer.h.{i}.attn.c_proj.weight", "attn.o_proj.w", "(n h) d -> n h d"),
  ("transformer.h.{i}.attn.c_proj.bias", "attn.o_proj.b", "d -> d"),
  ("transformer.h.{i}.ln_2.weight", "mlp_norm.scale", "d -> d"),
  ("transformer.h.{i}.ln_2.bias", "mlp_norm.bias", "d -> d"),
  ("transformer.h.{i}.mlp.c_fc.weight", "mlp.up_proj.w", "d f -> d f"),
  ("transformer.h.{i}.mlp.c_fc.bias", "mlp.up_proj.b", "f -> f"),
  ("transformer.h.{i}.mlp.c_proj.weight", "mlp.down_proj.w", "f d -> f d"),
  ("transformer.h.{i}.mlp.c_proj.bias", "mlp.down_proj.b", "d -> d"),
  ("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
  ("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
)
NEOX = (
  ("gpt_neox.embed_in.weight", "embed.table", "v d -> v d"),
  ("gpt_neox.layers.{i}.input_layernorm.weight", "attn_norm.scale", "d -> d"),
  ("gpt_neox.layers.{i}.input_layernorm.bias", "attn_norm.bias", "d -> d"),
  ("gpt_neox.layers.{i}.post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
  ("gpt_neox.layers.{i}.post_attention_layernorm.bias", "mlp_norm.bias", "d -> d"),
  ("gpt_neox.layers.{i}.attention.query_key_value.weight", "attn.{qkv}_proj.w",
   "(n c h) d -> c d n h"),
  ("gpt_neox.layers.{i}.attention.query_key_value.bias", "attn.{qkv}_proj.b", "(n c h) -> c n h"),
  ("gpt_neox.layers.{i}.attention.dense.weight", "attn.o_proj.w", "d (n h) -> n h d"),
  ("gpt_neox.layers.{i}.attention.dense.bias", "attn.o_proj.b", "d -> d"),
  ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", "mlp.up_proj.w", "f d -> d f"),
  ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias", "mlp.up_proj.b", "f -> f"),
  ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", "mlp.down_proj.w", "d f -> f d"),
  ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias", "mlp.down_proj.b", "d -> d"),
  ("gpt_neox.final_layer_norm.weight", "final_norm.scale", "d -> d"),
  ("gpt_neox.final_layer_norm.bias", "final_norm.bias", "d -> d"),
  ("lm_head.weight", "head.proj.w", "v d -> d v"),
)  # fmt: skip
BIASED = dict(
  norm="layer", gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True,
  num_kv_heads=None,
)  # fmt: skip
FAMILIES = {
  "GPT2LMHeadModel": (
    GPT2,
    dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=4, n_head=4, n_inner=48),
    dict(**BIASED, positions="learned", activation="gelu_tanh"),
  ),
  "Qwen3ForCausalLM": (LLAMA + PRE + QK, dict(tie_word_embeddings=True, rms_norm_eps=1e-5),
                       dict(qk_norm="head")),
  "Gemma2ForCausalLM": (
    LLAMA + SANDWICH,
    dict(rms_norm_eps=1e-5, sliding_window=5, query_pre_attn_scalar=16,
         attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    dict(norm_placement="sandwich", norm_offset=True, scale_embeddings=True, window=5,
         layer_pattern=("local", "global"), attention_scale=0.25, attention_softcap=2.0,
         logit_softcap=3.0, activation="gelu_tanh"),
  ),
  "Olmo2ForCausalLM": (LLAMA + OUTPUT + QK_FULL,
                       dict(tie_word_embeddings=True, rms_norm_eps=1e-5),
                       dict(norm_placement="output", qk_norm="full")),
  "GPTNeoXForCausalLM": (
    NEOX,
    dict(rotary_pct=0.5, use_parallel_residual=True, tie_word_embeddings=False,
         rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    dict(**BIASED, residual="parallel_two_norms", activation="gelu", rope_fraction=0.5,
         tie_embeddings=False),
  ),
}  # fmt: skip


def theirs_and_ours(name):
  """A random model of Transformers and ours with the same weights."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import torch

  rows, settings, changes = FAMILIES[name]
  kind = getattr(transformers, name)
  sizes = {} if name.startswith("GPT2") else {**SIZES, "attn_implementation": "eager"}
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**{**sizes, **settings})).eval()
  for p in theirs.parameters():  # Norms too: a scale of one would hide a mistake.
    torch.nn.init.normal_(p, std=0.2)
  cfg = dataclasses.replace(BASE, **changes)
  return theirs, Model(cfg, converted(cfg, rows, theirs.state_dict()))


def converted(cfg, rows, tensors):
  params = jax.tree.map(np.array, init_params(cfg, jax.random.key(0)))
  order = [(first + p, r) for first, size, n in stacks(cfg) for r in range(n) for p in range(size)]
  for theirs, ours, pattern in rows:
    axes = dict(n=cfg.num_heads if "k_" not in ours and "v_" not in ours else cfg.kv_heads)
    axes = {a: s for a, s in {**axes, "c": 3}.items() if f"{a} " in pattern}
    for i, (stack, r) in enumerate(order if "{i}" in theirs else [(None, None)]):
      value = einops.rearrange(tensors[theirs.format(i=i)].numpy(), pattern, **axes)
      if "{qkv}" in ours:
        for part, letter in zip(value, "qkv", strict=True):
          leaf(params, ours.replace("{qkv}", letter), stack)[r] = part
      elif stack is None:
        put = leaf(params, ours, None)
        put[tuple(slice(0, n) for n in value.shape)] = value
      else:
        leaf(params, ours, stack)[r] = value
  return jax.tree.map(jnp.asarray, params)


def stacks(cfg):
  """(first stack, stacks, repeats) of each group."""
  first = 0
  for kinds, n in cfg.groups("decoder"):
    yield first, len(kinds), n
    first += len(kinds)


def leaf(params, path, stack):
  at = params if path.startswith(("head", "embed.")) else params["decoder"]
  at = at if stack is None else at["layers"][stack]
  for part in path.split("."):
    at = at[part]
  return at


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers(name):
  theirs, m = theirs_and_ours(name)
  import torch

  # Not the padding tokens: torch leaves their rows of the embedding without a gradient.
  tokens = np.random.default_rng(0).integers(5, 96, (2, 40))
  logits = theirs(torch.tensor(tokens)).logits
  np.testing.assert_allclose(m(tokens), logits.detach().numpy(), atol=2e-4, rtol=1e-4)
  logits.logsumexp(-1).sum().backward()
  summed = lambda params: jax.nn.logsumexp(m.apply(params, tokens), axis=-1).sum()
  grads = jax.jit(jax.grad(summed))(m.params)
  rows = FAMILIES[name][0]
  want = converted(m.config, rows, {n: p.grad for n, p in theirs.named_parameters()})
  for row in rows:
    for letter in "qkv" if "{qkv}" in row[1] else " ":
      path, stack = row[1].replace("{qkv}", letter), 0 if "{i}" in row[0] else None
      a, b = leaf(grads, path, stack), leaf(want, path, stack)
      a, b = (x[: m.config.vocab_size] if path == "embed.table" else x for x in (a, b))
      a, b = (x[..., : m.config.vocab_size] if path == "head.proj.w" else x for x in (a, b))
      # The gradient of a key bias is zero: a softmax does not see what all scores have in common.
      assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6, path


@pytest.mark.parametrize("name", tiny.MODELS)
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
