"""Encoders and encoder–decoders against Transformers' models: logits and gradients, padded, packed,
cached; and the identities of three shapes.
"""

import dataclasses
import functools
import re

import einops
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

LENGTHS = (230, 97)  # Tokens of two documents; the first passes all windows and bucket edges.
BASE = ModelConfig(
  shape="encoder", vocab_size=96, vocab_multiple=32, num_layers=2, d_model=32, d_ff=48, num_heads=4,
  max_positions=256, norm="layer", norm_placement="post", final_norm=False, embed_norm=True,
  positions="learned", gated=False, activation="gelu", mlp_bias=True, attention_bias=True,
  attention_out_bias=True, param_dtype="float32",
)  # fmt: skip


def norm(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}.scale", "d -> d"),
    (f"{theirs}.bias", f"{ours}.bias", "d -> d"),
  )


def linear(theirs, ours, weight, bias):
  return ((f"{theirs}.weight", f"{ours}.w", weight), (f"{theirs}.bias", f"{ours}.b", bias))


def heads(theirs, ours):
  """q, k, v of a layer with biases."""
  return linear(theirs, ours, "(n h) d -> d n h", "(n h) -> n h")


BERT_LAYER = "bert.encoder.layer.{i}"
BERT = (
  ("bert.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
  ("bert.embeddings.position_embeddings.weight", "encoder.position_embed.table", "p d -> p d"),
  ("bert.embeddings.token_type_embeddings.weight", "encoder.type_embed.table", "t d -> t d"),
  *norm("bert.embeddings.LayerNorm", "encoder.embed_norm"),
  *heads(f"{BERT_LAYER}.attention.self.query", "encoder.layers.attn.q_proj"),
  *heads(f"{BERT_LAYER}.attention.self.key", "encoder.layers.attn.k_proj"),
  *heads(f"{BERT_LAYER}.attention.self.value", "encoder.layers.attn.v_proj"),
  *linear(f"{BERT_LAYER}.attention.output.dense", "encoder.layers.attn.o_proj",
          "d (n h) -> n h d", "d -> d"),
  *norm(f"{BERT_LAYER}.attention.output.LayerNorm", "encoder.layers.attn_post_norm"),
  *linear(f"{BERT_LAYER}.intermediate.dense", "encoder.layers.mlp.up_proj", "f d -> d f", "f -> f"),
  *linear(f"{BERT_LAYER}.output.dense", "encoder.layers.mlp.down_proj", "d f -> f d", "d -> d"),
  *norm(f"{BERT_LAYER}.output.LayerNorm", "encoder.layers.mlp_post_norm"),
)  # fmt: skip
MASKED = (
  *linear("cls.predictions.transform.dense", "head.dense", "e d -> d e", "d -> d"),
  *norm("cls.predictions.transform.LayerNorm", "head.norm"),
  ("cls.predictions.bias", "head.bias", "v -> v"),
)
POOLED = (
  *linear("bert.pooler.dense", "head.dense", "e d -> d e", "d -> d"),
  *linear("classifier", "head.proj", "c d -> d c", "c -> c"),
)
MODERN = (
  ("model.embeddings.tok_embeddings.weight", "embed.table", "v d -> v d"),
  ("model.embeddings.norm.weight", "encoder.embed_norm.scale", "d -> d"),
  ("model.layers.{i}.attn_norm.weight", "encoder.layers.attn_norm.scale", "d -> d"),
  ("model.layers.{i}.attn.Wqkv.weight", "encoder.layers.attn.{q,k,v}_proj.w",
   "(c n h) d -> c d n h"),
  ("model.layers.{i}.attn.Wo.weight", "encoder.layers.attn.o_proj.w", "d (n h) -> n h d"),
  ("model.layers.{i}.mlp_norm.weight", "encoder.layers.mlp_norm.scale", "d -> d"),
  ("model.layers.{i}.mlp.Wi.weight", "encoder.layers.mlp.{gate,up}_proj.w", "(c f) d -> c d f"),
  ("model.layers.{i}.mlp.Wo.weight", "encoder.layers.mlp.down_proj.w", "d f -> f d"),
  ("model.final_norm.weight", "encoder.final_norm.scale", "d -> d"),
  ("head.dense.weight", "head.dense.w", "e d -> d e"),
  ("head.norm.weight", "head.norm.scale", "d -> d"),
  ("decoder.bias", "head.bias", "v -> v"),
)  # fmt: skip


def t5_stack(name, gated):
  layer, ours = f"{name}.block.{{i}}.layer", f"{name}.layers"
  own = f"{layer}.0.SelfAttention"
  rows = [(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
           f"{name}.relative_bias", "b n -> b n"),
          (f"{layer}.0.layer_norm.weight", f"{ours}.attn_norm.scale", "d -> d"),
          (f"{name}.final_layer_norm.weight", f"{name}.final_norm.scale", "d -> d")]  # fmt: skip
  attentions = {own: "attn"}
  if name == "decoder":
    attentions[f"{layer}.1.EncDecAttention"] = "cross_attn"
    rows += [(f"{layer}.1.layer_norm.weight", f"{ours}.cross_attn_norm.scale", "d -> d")]
  for theirs, part in attentions.items():
    for letter in "qkv":
      rows += [(f"{theirs}.{letter}.weight", f"{ours}.{part}.{letter}_proj.w", "(n h) d -> d n h")]
    rows += [(f"{theirs}.o.weight", f"{ours}.{part}.o_proj.w", "d (n h) -> n h d")]
  last = 1 + (name == "decoder")
  mlp = f"{layer}.{last}.DenseReluDense"
  rows += [(f"{layer}.{last}.layer_norm.weight", f"{ours}.mlp_norm.scale", "d -> d"),
           (f"{mlp}.wo.weight", f"{ours}.mlp.down_proj.w", "d f -> f d")]  # fmt: skip
  into = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
  rows += [(f"{mlp}.{a}.weight", f"{ours}.mlp.{b}_proj.w", "f d -> d f") for a, b in into.items()]
  return tuple(rows)


def bart_stack(name):
  layer, ours = f"model.{name}.layers.{{i}}", f"{name}.layers"
  rows = [(f"model.{name}.embed_positions.weight", f"{name}.position_embed.table", "p d -> p d"),
          *norm(f"model.{name}.layernorm_embedding", f"{name}.embed_norm"),
          *norm(f"{layer}.final_layer_norm", f"{ours}.mlp_post_norm"),
          *linear(f"{layer}.fc1", f"{ours}.mlp.up_proj", "f d -> d f", "f -> f"),
          *linear(f"{layer}.fc2", f"{ours}.mlp.down_proj", "d f -> f d", "d -> d")]  # fmt: skip
  attentions = {"self_attn": "attn"} | ({"encoder_attn": "cross_attn"} if name == "decoder" else {})
  for theirs, part in attentions.items():
    rows += norm(f"{layer}.{theirs}_layer_norm", f"{ours}.{part}_post_norm")
    for letter in "qkv":
      rows += heads(f"{layer}.{theirs}.{letter}_proj", f"{ours}.{part}.{letter}_proj")
    rows += linear(
      f"{layer}.{theirs}.out_proj", f"{ours}.{part}.o_proj", "d (n h) -> n h d", "d -> d"
    )
  return tuple(rows)


SHARED = (("shared.weight", "embed.table", "v d -> v d"),)
T5 = dict(
  shape="encoder_decoder", positions="t5_bias", norm="rms", norm_eps=1e-6, norm_placement="pre",
  final_norm=True, embed_norm=False, attention_scale=1.0, activation="relu", mlp_bias=False,
  attention_bias=False, attention_out_bias=False, logit_scale=32**-0.5, max_positions=None,
  head_dim=8, num_decoder_layers=3, decoder_start_id=0,
)  # fmt: skip
T5_SIZES = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
                num_heads=4, dropout_rate=0.0)  # fmt: skip
BERT_SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=48, max_position_embeddings=256)  # fmt: skip
FAMILIES = {
  "BertForMaskedLM": (
    BERT + MASKED, BERT_SIZES,
    dict(norm_eps=1e-12, token_types=2, head_dense=True, head_norm=True, logit_bias=True),
  ),
  "BertForSequenceClassification": (
    BERT + POOLED, {**BERT_SIZES, "num_labels": 3},
    dict(norm_eps=1e-12, token_types=2, head="sequence", head_dense=True, head_activation="tanh",
         num_labels=3),
  ),
  "BertForQuestionAnswering": (
    BERT + linear("qa_outputs", "head.proj", "c d -> d c", "c -> c"), BERT_SIZES,
    dict(norm_eps=1e-12, token_types=2, head="span"),
  ),
  "ModernBertForMaskedLM": (
    MODERN,
    dict(vocab_size=96, hidden_size=32, num_hidden_layers=8, num_attention_heads=4,
         intermediate_size=48, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
         eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=16),
    dict(num_layers=8, positions="rotary", rope_theta=160_000.0, rope_local_theta=10_000.0,
         norm_bias=False, norm_placement="pre", final_norm=True, gated=True, mlp_bias=False,
         attention_bias=False, attention_out_bias=False, window=16,
         layer_prefix=("global+unnormed", "local", "local"),
         layer_pattern=("global", "local", "local"), head_dense=True, head_norm=True,
         head_dense_bias=False, logit_bias=True),
  ),
  "T5ForConditionalGeneration": (
    SHARED + t5_stack("encoder", False) + t5_stack("decoder", False), T5_SIZES, T5,
  ),
  "T5ForConditionalGeneration gated": (
    SHARED + t5_stack("encoder", True) + t5_stack("decoder", True),
    {**T5_SIZES, "feed_forward_proj": "gated-gelu"},
    {**T5, "gated": True, "activation": "gelu_tanh"},
  ),
  "BartForConditionalGeneration": (
    (("model.shared.weight", "embed.table", "v d -> v d"), *bart_stack("encoder"),
     *bart_stack("decoder")),
    dict(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
         decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
         max_position_embeddings=256),
    dict(shape="encoder_decoder", position_offset=2, decoder_start_id=2),
  ),
}  # fmt: skip


@functools.cache
def theirs_and_ours(name):
  """A random model of Transformers and ours with the same weights."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import torch

  rows, settings, changes = FAMILIES[name]
  kind = getattr(transformers, name.split()[0])
  torch.manual_seed(0)
  sizes = {**settings, "attn_implementation": "eager"}
  theirs = kind(kind.config_class(**sizes)).eval()
  with torch.no_grad():
    for p in theirs.parameters():  # Norms too: a scale of one would hide a mistake.
      torch.nn.init.normal_(p, std=0.2)
  cfg = dataclasses.replace(BASE, **changes)
  return theirs, Model(cfg, converted(cfg, rows, theirs.state_dict()))


def places(cfg, stack):
  """(stack of layers, place in it) of each layer."""
  first, found = 0, []
  for pattern, n in cfg.groups(stack):
    found += [(first + p, r) for r in range(n) for p in range(len(pattern))]
    first += len(pattern)
  return found


def values(rows, tensors, cfg):
  """(path of a leaf, place in its stack, value) of each tensor, in our layout."""
  for theirs, ours, pattern in rows:
    layers = places(cfg, ours.split(".")[0]) if "{i}" in theirs else [(None, None)]
    for i, (stack, r) in enumerate(layers):
      name = theirs.format(i=i)
      if name not in tensors or tensors[name] is None:
        continue
      sizes = {a: s for a, s in dict(n=cfg.num_heads, h=cfg.head_width).items() if a in pattern}
      choice = re.search(r"\{(.*)\}", ours)
      names = choice[1].split(",") if choice else [None]
      counts = {"c": len(names)} if choice else {}
      value = einops.rearrange(tensors[name].detach().numpy(), pattern, **sizes, **counts)
      for n, letter in enumerate(names):
        path = ours if letter is None else ours.replace(choice[0], letter)
        path = path if stack is None else path.replace("layers", f"layers.{stack}")
        yield path, r, value if letter is None else value[n]


def leaf(params, path):
  for part in path.split("."):
    params = params[int(part) if part.isdigit() else part]
  return params


def converted(cfg, rows, tensors):
  params = jax.tree.map(np.array, init_params(cfg, jax.random.key(0)))
  seen = 0
  for path, r, value in values(rows, tensors, cfg):
    put = leaf(params, path) if r is None else leaf(params, path)[r]
    put[tuple(slice(0, n) for n in value.shape)] = value
    seen += value.size
  assert seen == cfg.num_params(), "every parameter comes from theirs"
  return jax.tree.map(jnp.asarray, params)


def documents(seed=0):
  """Token ids of documents, of what encoders and what decoders read; none of them is padding."""
  rng = np.random.default_rng(seed)
  return [(rng.integers(5, 96, n), rng.integers(5, 96, n // 3)) for n in LENGTHS]


def their_logits(theirs, m, doc):
  import torch

  tokens, answer = (torch.tensor(ids)[None] for ids in doc)
  more = dict(decoder_input_ids=answer) if m.config.shape == "encoder_decoder" else {}
  out = theirs(input_ids=tokens, **more)
  if "start_logits" in out:
    return torch.stack([out.start_logits, out.end_logits], -1)[0]
  return out.logits[0]


def padded(arrays, length, left=False):
  """(tokens, positions) of arrays, padded on one side."""
  tokens, pos = np.zeros((len(arrays), length), int), np.full((len(arrays), length), -1)
  for i, a in enumerate(arrays):
    at = slice(length - len(a), length) if left else slice(0, len(a))
    tokens[i, at], pos[i, at] = a, np.arange(len(a))
  return tokens, pos


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_alone_padded_and_packed(name):
  theirs, m = theirs_and_ours(name)
  docs = documents()
  want = [their_logits(theirs, m, doc).detach().numpy() for doc in docs]
  two, text = m.config.shape == "encoder_decoder", m.config.head == "sequence"
  for left in (False, True):
    tokens, pos = padded([a for a, _ in docs], 256, left)
    more = {}
    answers, answer_pos = padded([b for _, b in docs], 80, left)
    if two:
      more = dict(decoder_tokens=answers, decoder_positions=answer_pos)
    got = np.asarray(m(tokens, positions=pos, **more))
    for i, one in enumerate(want):
      row = got[i] if text else got[i][(answer_pos if two else pos)[i] >= 0]
      np.testing.assert_allclose(row, one, atol=1e-4, rtol=1e-4)
  rows = [np.concatenate([np.full(len(doc[side]), i + 1) for i, doc in enumerate(docs)])[None]
          for side in (0, 1)]  # fmt: skip
  joined = [np.concatenate([doc[side] for doc in docs])[None] for side in (0, 1)]
  more = dict(decoder_tokens=joined[1], decoder_segments=rows[1]) if two else {}
  got = np.asarray(m(joined[0], segments=rows[0], **more))[0]
  np.testing.assert_allclose(got, np.stack(want) if text else np.concatenate(want), atol=1e-4,
                             rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_transformers(name):
  theirs, m = theirs_and_ours(name)
  doc = documents()[0]
  theirs.zero_grad()
  their_logits(theirs, m, doc).logsumexp(-1).sum().backward()
  more = dict(decoder_tokens=doc[1][None]) if m.config.shape == "encoder_decoder" else {}
  summed = lambda params: jax.nn.logsumexp(m.apply(params, doc[0][None], **more), axis=-1).sum()
  grads = jax.device_get(jax.jit(jax.grad(summed))(m.params))
  theirs_grads = {n: p.grad for n, p in theirs.named_parameters()}
  checked = 0
  for path, r, want in values(FAMILIES[name][0], theirs_grads, m.config):
    got = leaf(grads, path) if r is None else leaf(grads, path)[r]
    got = got[tuple(slice(0, n) for n in want.shape)]
    if path == "embed.table":  # Torch leaves rows of padding tokens without a gradient.
      got, want = got[3:], want[3:]
    # The gradient of a key bias is zero: a softmax does not see what all scores have in common.
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) + 1e-5, (path, r)
    checked += 1
  assert checked > 10


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
  [("t5", False), ("windows", False), ("windows", True), ("shared", True), *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("t5", True), ("bart", False), ("bart", True))
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
  [("t5", LOOP), ("bart", REMAT), ("shared", LOOP), *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("windows", LOOP), ("windows", REMAT), ("bart", LOOP), ("t5", REMAT))
  )],
)  # fmt: skip
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
