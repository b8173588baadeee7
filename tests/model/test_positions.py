"""Positions against Transformers' own functions."""

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.errors import InputError
from model.positions import (
  alibi_bias,
  alibi_slopes,
  apply_rotary,
  relative_bias_buckets,
  rotary_angles,
  signed_buckets,
  sinusoidal,
)

LLAMA3 = dict(rope_factor=8.0, rope_original_positions=8192)
YARN = dict(rope_factor=4.0, rope_original_positions=64)
LONGROPE = dict(rope_scaling="longrope", rope_short_factors=tuple(1 + np.arange(16) / 16),
                rope_long_factors=tuple(1.0 + np.arange(16)))  # fmt: skip


def _config(**fields) -> ModelConfig:
  sizes = dict(d_model=64, num_heads=2, num_layers=1, d_ff=8, vocab_size=8)
  return ModelConfig(**sizes, **fields)


def _transformers_angles(cfg, pos, length=None, theta=None):
  """cos and sin as Transformers' rotary modules compute them, (B, T, R)."""
  torch = pytest.importorskip("torch")
  rope = pytest.importorskip("transformers.modeling_rope_utils")
  llama = pytest.importorskip("transformers").LlamaConfig
  kind = cfg.rope_scaling if theta is None else "none"
  parameters = dict(
    rope_type="default" if kind == "none" else kind,
    rope_theta=theta or cfg.rope_theta,
    partial_rotary_factor=cfg.rope_fraction,
  )
  if kind != "none":
    parameters["factor"] = cfg.rope_factor
  if kind == "longrope":
    parameters["short_factor"] = list(cfg.rope_short_factors)
    parameters["long_factor"] = list(cfg.rope_long_factors)
    parameters["attention_factor"] = cfg.rope_attention_factor
  if kind in ("yarn", "llama3", "longrope"):
    parameters["original_max_position_embeddings"] = cfg.rope_original_positions
  if kind == "llama3":
    parameters["low_freq_factor"] = cfg.rope_low_freq_factor
    parameters["high_freq_factor"] = cfg.rope_high_freq_factor
  if kind == "yarn":
    parameters["attention_factor"] = cfg.rope_attention_factor
    parameters["beta_fast"], parameters["beta_slow"] = cfg.rope_beta_fast, cfg.rope_beta_slow
    parameters["truncate"] = cfg.rope_truncate
  longest = cfg.rope_original_positions or 2048
  theirs = llama(
    hidden_size=cfg.d_model,
    num_attention_heads=cfg.num_heads,
    head_dim=cfg.head_width,
    max_position_embeddings=longest if kind == "dynamic" else 4 * longest,
    rope_parameters=parameters,
  )
  if kind == "none":
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

    frequency, factor = GlmRotaryEmbedding.compute_default_rope_parameters(theirs)
  else:
    frequency, factor = rope.ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=length)
  angle = torch.tensor(np.asarray(pos))[..., None].float() * frequency
  return (angle.cos() * factor).numpy(), (angle.sin() * factor).numpy()


@pytest.mark.parametrize(
  "fields",
  [
    dict(),
    dict(rope_theta=500_000.0, rope_fraction=0.5),
    dict(rope_scaling="linear", rope_factor=2.5),
    dict(rope_scaling="dynamic", rope_factor=2.0, rope_original_positions=4096),
    dict(rope_scaling="yarn", **YARN),
    dict(rope_scaling="yarn", rope_fraction=0.5, rope_beta_fast=16.0, rope_beta_slow=2.0, **YARN),
    dict(rope_scaling="yarn", rope_attention_factor=1.7, **YARN),
    dict(rope_scaling="yarn", rope_factor=1.0, rope_original_positions=64),
    dict(rope_scaling="yarn", rope_truncate=False, **YARN),
    dict(rope_original_positions=64, rope_factor=3.0, **LONGROPE),
    dict(rope_original_positions=600, rope_factor=3.0, **LONGROPE),
    dict(rope_original_positions=599, rope_attention_factor=1.5, **LONGROPE),
    dict(rope_scaling="llama3", rope_theta=500_000.0, **LLAMA3),
    dict(rope_scaling="llama3", rope_low_freq_factor=2.0, rope_high_freq_factor=8.0, **LLAMA3),
  ],
  ids=str,
)
def test_rotary_angles_equal_transformers(fields):
  cfg = _config(**fields)
  pos = np.arange(600, dtype=np.int32)[None]
  ours = rotary_angles(pos, cfg, local=False)
  for got, expected in zip(ours, _transformers_angles(cfg, pos, length=600), strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-4)  # Of angles up to 600 in float32.
    np.testing.assert_allclose(got[:, :40], expected[:, :40], atol=5e-6)


@pytest.mark.parametrize(
  "fields", [dict(rope_scaling="dynamic"), LONGROPE], ids=["dynamic", "longrope"]
)
def test_scaling_by_length_takes_each_documents_own(fields):
  cfg = _config(rope_factor=2.0, rope_original_positions=16, **fields)
  lengths = (40, 9, 23)
  pos = np.concatenate([np.arange(n) for n in lengths] + [np.full(8, -1)])[None].astype(np.int32)
  seg = np.repeat([1, 2, 3, 0], [*lengths, 8])[None].astype(np.int32)
  packed = rotary_angles(pos, cfg, local=False, seg=seg)
  start = 0
  for n in lengths:
    alone = np.arange(n, dtype=np.int32)[None]
    expected = _transformers_angles(cfg, alone, length=n)
    batched = np.concatenate([alone, np.full((1, 5), -1, np.int32)], axis=1)
    for i in range(2):
      np.testing.assert_allclose(packed[i][:, start : start + n], expected[i], atol=1e-5)
      np.testing.assert_array_equal(
        rotary_angles(batched, cfg, local=False)[i][:, :n],
        rotary_angles(alone, cfg, local=False)[i],
      )
    start += n
  assert np.isfinite(packed).all()


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(rope_short_factors=(1.0,) * 16), "rope_short_factors has no effect"),
    (dict(rope_truncate=False), "rope_truncate=False has no effect"),
    ({**LONGROPE}, "needs model.rope_original_positions"),
    (
      {**LONGROPE, "rope_original_positions": 8, "rope_long_factors": (1.0,)},
      "must be 16 positive",
    ),
    ({**LONGROPE, "rope_original_positions": 1, "rope_factor": 2.0}, "is too short"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_scalings_that_are_not_whole_or_have_no_effect_are_refused(fields, said):
  with pytest.raises(InputError, match=said):
    _config(**fields)


def test_local_layers_turn_by_their_own_unscaled_base():
  pos = np.arange(30, dtype=np.int32)[None]
  scaled = dict(rope_scaling="linear", rope_factor=8.0, rope_theta=1e6)
  two = _config(rope_local_theta=10_000.0, **scaled)
  one = _config(**scaled)
  local, plain = rotary_angles(pos, two, local=True), _transformers_angles(two, pos, theta=10_000.0)
  np.testing.assert_allclose(local, plain, atol=5e-6)
  np.testing.assert_array_equal(
    rotary_angles(pos, two, local=False), rotary_angles(pos, one, local=True)
  )


def test_angles_are_float64_for_a_float64_model_only():
  pos = np.array([[0, 1, 100_000]], np.int32)
  with jax.enable_x64(True):
    cfg = _config(dtype="float64")
    cos, _ = rotary_angles(pos, cfg, local=False)
    assert cos.dtype == np.float64
    frequency = 10_000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(cos[0, 2], np.cos(100_000 * frequency), atol=1e-10)
    assert rotary_angles(pos, _config(), local=False)[0].dtype == np.float32
  assert rotary_angles(pos, _config(dtype="bfloat16"), local=False)[0].dtype == np.float32


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_equals_transformers(interleaved, fraction):
  torch = pytest.importorskip("torch")
  llama = pytest.importorskip("transformers.models.llama.modeling_llama")
  gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
  cfg = _config(rope_fraction=fraction)
  pos = np.arange(12, dtype=np.int32)[None]
  x = np.random.default_rng(0).standard_normal((1, 12, 2, 32)).astype(np.float32)
  cos, sin = (np.array(a) for a in rotary_angles(pos, cfg, local=False))
  ours = apply_rotary(x, (cos, sin), interleaved=interleaved)
  width = 2 * cos.shape[-1]
  turned = torch.tensor(x[..., :width])
  if interleaved:
    theirs = gptj.apply_rotary_pos_emb(turned, torch.tensor(sin), torch.tensor(cos))
  else:
    both = [torch.tensor(np.concatenate([a, a], axis=-1)) for a in (cos, sin)]
    theirs, _ = llama.apply_rotary_pos_emb(turned, turned, *both, unsqueeze_dim=2)
  np.testing.assert_allclose(ours[..., :width], theirs.numpy(), atol=1e-6)
  np.testing.assert_array_equal(ours[..., width:], x[..., width:])


def test_scores_depend_on_distance_only_and_dtype_is_kept():
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, 1, 1, 1, 32)).astype(np.float32)
  score = lambda a, b: float(
    np.sum(
      np.asarray(apply_rotary(q, rotary_angles(np.array([[a]]), _config(), local=False),
                              interleaved=False))
      * np.asarray(apply_rotary(k, rotary_angles(np.array([[b]]), _config(), local=False),
                                interleaved=False))
    )
  )  # fmt: skip
  assert abs(score(7, 3) - score(107, 103)) < 1e-4
  angles = rotary_angles(np.array([[-1]]), _config(), local=False)
  low = apply_rotary(jax.numpy.asarray(q, "bfloat16"), angles, interleaved=False)
  assert low.dtype == "bfloat16" and np.isfinite(np.asarray(low, np.float32)).all()


@pytest.mark.parametrize("width", [16, 17])
def test_sinusoids_equal_transformers_marian_and_the_papers_interleaved_form(width):
  pos = np.arange(200, dtype=np.int32)[None]
  ours = np.asarray(sinusoidal(pos, width))
  angle = pos[0, :, None] / 10_000 ** (2 * (np.arange(width) // 2) / width)
  paper = np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle))
  order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
  np.testing.assert_allclose(ours[0], paper[:, order], atol=3e-5)
  assert np.isfinite(sinusoidal(np.array([[-1]]), width)).all()
  marian = pytest.importorskip("transformers.models.marian.modeling_marian")
  theirs = marian.MarianSinusoidalPositionalEmbedding(200, width).create_weight().numpy()
  np.testing.assert_allclose(ours[0], theirs, atol=3e-5)


def test_inclusive_sinusoids_equal_transformers_m2m_100():
  ours = np.asarray(sinusoidal(np.arange(700, dtype=np.int32)[None], 16, inclusive=True))
  m2m = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
  theirs = m2m.M2M100SinusoidalPositionalEmbedding.get_embedding(700, 16).numpy()
  np.testing.assert_allclose(ours[0], theirs, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 50), (64, 1000), (8, 20)])
def test_relative_buckets_equal_transformers_t5_at_every_distance(bidirectional, buckets, furthest):
  torch = pytest.importorskip("torch")
  t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
  q_pos, kv_pos = np.array([[1200]], np.int32), np.arange(2400, dtype=np.int32)[None]
  sizes = dict(bidirectional=bidirectional, num_buckets=buckets, max_distance=furthest)
  ours = relative_bias_buckets(q_pos, kv_pos, **sizes)
  theirs = t5._relative_position_bucket(torch.tensor(kv_pos - q_pos), **sizes)
  np.testing.assert_array_equal(ours[:, 0], theirs.numpy())
  assert ours.dtype == np.int32


@pytest.mark.parametrize(
  ("buckets", "furthest"), [(512, 512), (64, 200), (64, 513), (8, 12), (8, 4), (400, 200)]
)
def test_signed_buckets_equal_transformers_deberta_at_every_distance(buckets, furthest):
  torch = pytest.importorskip("torch")
  deberta = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
  side = buckets // 2
  text = torch.zeros(1, 1400, 1)
  size = side if side < furthest else -1
  theirs = deberta.build_relative_position(text, text, bucket_size=size, max_position=furthest)[0]
  pos = np.arange(1400, dtype=np.int32)[None]
  ours = signed_buckets(pos, pos, num_buckets=buckets, max_distance=furthest)[0]
  np.testing.assert_array_equal(ours, np.clip(theirs.numpy() + side, 0, buckets - 1))
  assert ours.dtype == np.int32


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_alibi_equals_transformers_bloom_up_to_a_shift_of_each_row(heads):
  torch = pytest.importorskip("torch")
  bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
  pos = np.arange(9, dtype=np.int32)[None]
  theirs = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).numpy()  # (N, 1, S)
  ours = np.asarray(alibi_bias(pos, pos, heads))[0]
  shift = np.asarray(alibi_slopes(heads))[:, None, None] * pos[0][:, None]
  seen = np.tril(np.ones((9, 9), bool))
  expected = np.where(seen, theirs - shift, 0)
  np.testing.assert_allclose(np.where(seen, ours, 0), expected, atol=1e-6)
  np.testing.assert_array_equal(ours, ours.swapaxes(1, 2))


@pytest.mark.parametrize("heads", [4, 12])
def test_rounded_alibi_equals_transformers_falcon_up_to_a_shift_of_each_row(heads):
  torch = pytest.importorskip("torch")
  falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
  length = 700  # Above 256 not every position has a bfloat16 of its own.
  pos = np.arange(length, dtype=np.int32)[None]
  ones = torch.ones(1, length, dtype=torch.long)
  theirs = falcon.build_alibi_tensor(ones, heads, torch.float32).numpy() / 8
  ours = np.asarray(alibi_bias(pos, pos, heads, scale=1 / 8, rounded=True))[0]
  shift = theirs.swapaxes(1, 2)
  np.testing.assert_allclose(ours, theirs - shift, atol=1e-6)
  assert np.abs(ours - alibi_bias(pos, pos, heads, scale=1 / 8)[0])[:, -1].max() > 0.01


def test_settings_of_alibi_are_refused_where_they_say_nothing():
  with pytest.raises(InputError, match="alibi_scaled has no effect"):
    _config(alibi_scaled=True)
  for reads in (dict(shape="encoder"), dict(prefix_attention=True)):
    with pytest.raises(InputError, match="alibi_rounded counts from keys to later queries"):
      _config(positions="alibi", alibi_rounded=True, **reads)
