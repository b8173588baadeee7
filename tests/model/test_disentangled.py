"""Disentangled attention: packed, padded, rematerialized and sharded it is the same function."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model
from model.config import ModelConfig
from model.flops import matmul_params, model_flops
from model.heads import abstract, init_params
from model.layers import param_info
from model.sharding import batch_sharding, make_mesh, shardings
from model.trained import Model
from model.transformer import Inputs
from train.certify.cases.deberta import V3

CFG = ModelConfig(
  shape="encoder", positions="disentangled", vocab_size=61, vocab_multiple=8, num_layers=3,
  d_model=16, d_ff=32, num_heads=4, max_positions=64, norm="layer", norm_placement="post",
  embed_norm=True, final_norm=False, activation="gelu", gated=False, attention_bias=True,
  relative_buckets=8, relative_max_distance=12, relative_norm=True, init_std=0.3,
)  # fmt: skip
CONV = dataclasses.replace(CFG, layer_prefix=("global+conv",), conv_width=3)
OWN = dataclasses.replace(CFG, relative_own_proj=True, layer_pattern=("local", "global"), window=9)


def gradient(cfg, params, tokens, pos, key=None):
  graphdef = nnx.split(abstract(cfg), nnx.Param)[0]

  def total(params):
    x, _, _ = nnx.merge(graphdef, params).hidden(Inputs(tokens, pos), key=key)
    return jnp.sum(jnp.where(pos[..., None] < 0, 0, jnp.sin(x)))

  return jax.jit(jax.value_and_grad(total))(params)


def close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def batch(rows):
  tokens = jax.random.randint(jax.random.key(1), (rows, 24), 0, 61)
  return tokens, jnp.broadcast_to(jnp.arange(24), (rows, 24))


@pytest.mark.parametrize(
  "cfg", [pytest.param(CONV, marks=pytest.mark.slow), OWN], ids=["shared", "own"]
)
def test_padded_and_packed_texts_have_the_scores_of_each_alone(cfg):
  m = Model(cfg, init_params(cfg, jax.random.key(0)))
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 61, n) for n in (30, 11)]
  want = [np.asarray(m(text[None]))[0] for text in texts]
  seg = np.concatenate([np.full(len(text), i + 1) for i, text in enumerate(texts)])
  got = np.asarray(m(np.concatenate(texts)[None], segments=seg[None]))[0]
  np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-4, atol=1e-4)
  for left in (0, 19):  # The short one, on the left and on the right of padding.
    tokens, pos = np.zeros((2, 30), int), np.full((2, 30), -1)
    for row, (text, at) in enumerate(zip(texts, (0, left), strict=True)):
      tokens[row, at : at + len(text)], pos[row, at : at + len(text)] = text, np.arange(len(text))
    got = np.asarray(m(tokens, positions=pos))
    np.testing.assert_allclose(got[pos >= 0], np.concatenate(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "change",
  [dict(remat="attention"), dict(scan_layers=False), dict(remat="full")],
  ids=str,
)
@pytest.mark.slow
def test_loop_and_remat_equal_the_plain_scan_with_dropout(change):
  cfg = dataclasses.replace(OWN, dropout=0.1, attention_dropout=0.1)
  params, (tokens, pos), key = init_params(cfg, jax.random.key(0)), batch(2), jax.random.key(3)
  want = gradient(cfg, params, tokens, pos, key)
  close(gradient(dataclasses.replace(cfg, **change), params, tokens, pos, key), want)


@pytest.mark.slow
def test_eight_devices_equal_one():
  params, arrays = init_params(OWN, jax.random.key(0)), batch(8)
  want = gradient(OWN, params, *arrays)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  axes = jax.tree.map(lambda info: info.axes, param_info(abstract(OWN)))
  placed = jax.device_put(params, shardings(params, axes, mesh))
  with jax.set_mesh(mesh):
    close(gradient(OWN, placed, *jax.device_put(arrays, batch_sharding(mesh))), want)


def test_flops_count_every_term_of_a_score_and_no_projection_of_positions():
  layer = 4 * 16 * 16 + 2 * 16 * 32
  for cfg, terms in ((CFG, 3), (OWN, 3), (dataclasses.replace(OWN, relative_scores=("p2c",)), 2)):
    assert sum(matmul_params(cfg).values()) == 3 * layer + 16 * 61
    pairs = {"encoder.None": 1, "encoder.9": 1}
    got = model_flops(cfg, dict(encoder=1, head=1), pairs)
    assert got == 6 * (3 * layer + 16 * 61) + 3 * 6 * 16 * (terms + 1)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(positions="learned"), "relative_norm=True has no effect"),
    (dict(relative_scores=()), "relative_scores"),
    (dict(relative_scores=("c2p", "c2p")), "relative_scores"),
    (dict(relative_scores=("p2p",)), "p2p"),
    (dict(relative_buckets=10), "relative_buckets=10"),
    (dict(relative_buckets=28), "relative_buckets=28"),
    (dict(shape="decoder"), "shape='decoder'"),
    (dict(num_kv_heads=2), "num_kv_heads=2"),
    (dict(qk_norm="full"), "qk_norm='full'"),
    (dict(attention_softcap=3.0), "attention_softcap=3.0"),
    (dict(layer_pattern=("global+conv",)), "conv_width"),
    (dict(conv_width=3), "conv_width=3 has no effect"),
    (dict(conv_width=2, layer_pattern=("global+conv",)), "conv_width=2"),
    (dict(conv_activation="relu"), "conv_width"),
  ],
  ids=str,
)
def test_what_does_not_go_with_it_is_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(CFG, **changes)


def test_the_head_of_published_folders_is_read_under_its_newer_name(tmp_path):
  """Those of v3 name no class, hold `lm_predictions`, and a head that nothing is computed with."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  files = pytest.importorskip("safetensors.torch")
  torch.manual_seed(0)
  config = transformers.DebertaV2Config(**V3, legacy=False)
  theirs = transformers.DebertaV2ForMaskedLM(config).eval()
  theirs.save_pretrained(tmp_path / "theirs")
  path = tmp_path / "theirs" / "config.json"
  values = json.loads(path.read_text())
  del values["architectures"]
  path.write_text(json.dumps(values | {"pos_att_type": "p2c|c2p"}))
  tensors = files.load_file(tmp_path / "theirs" / "model.safetensors")
  assert any(name.startswith("lm_predictions.") for name in tensors)
  extra = {"mask_predictions.dense.weight": torch.ones(2, 2),
           "deberta.embeddings.position_embeddings.weight": torch.ones(2, 2)}  # fmt: skip
  files.save_file(tensors | extra, tmp_path / "theirs" / "model.safetensors")
  tokens = np.arange(5, 90)[None]
  want = theirs(torch.tensor(tokens)).logits.detach().numpy()
  m = model.load(tmp_path / "theirs")
  np.testing.assert_allclose(m(tokens), want, atol=1e-4, rtol=1e-4)
  model.save(m, tmp_path / "ours", format="hf")
  again = transformers.DebertaV2ForMaskedLM.from_pretrained(tmp_path / "ours").eval()
  np.testing.assert_allclose(again(torch.tensor(tokens)).logits.detach(), want, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(conv_kernel_size=4), "conv_width=4"),
    (dict(conv_kernel_size=3, conv_groups=2), "conv_groups=2"),
    (dict(position_biased_input=True), "position_biased_input=True"),
    (dict(relative_attention=False), "relative_attention=False"),
    (dict(position_buckets=256), "position_buckets=256"),
    (dict(norm_rel_ebd="batch_norm"), "batch_norm"),
    (dict(embedding_size=16), "embedding_size"),
  ],
  ids=str,
)
def test_a_deberta_that_is_not_known_is_refused_by_its_field(change, said):
  values = {**V3, "model_type": "deberta-v2", **change}
  with pytest.raises(ValueError, match=said):
    model.hf.FAMILIES["deberta-v2"].read(values)
