"""Positions as the model sees them: rotary angles and scalings, sinusoids, T5 buckets, ALiBi."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.errors import InputError


def rotary_angles(
  pos: Int[Array, "B T"], cfg: ModelConfig, *, local: bool, seg: Int[Array, "B T"] | None = None,
  length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:  # fmt: skip
  """Cosine and sine of each token's rotation; R is half of the rotated elements of a head.

  At least float32, float64 where the model computes in float64. Equal to Transformers'
  `ROPE_INIT_FUNCTIONS`, attention factors included. Position −1 gives finite angles.

  Dynamic scaling and LongRoPE hang on how long a text is: each token's own document, as far as it
  has been read. LongRoPE turns by the short factors up to `rope_original_positions` and by the long
  ones beyond. A cache keeps its keys as they are before they turn, so that those and the queries
  always turn alike; a text that grows beyond the original length must be read anew for the rest, as
  `infer` does.

  Args:
    pos: positions; −1 is padding.
    cfg: its `rope_*` fields.
    local: a windowed layer: uses `rope_local_theta`, unscaled, where the config has one.
    seg: segments, for scalings by length: a token's is that of its own document in this call.
    length: for scalings by length, that of each row's text where this call has a part of it.
  """
  dtype = jnp.promote_types(jax.dtypes.canonicalize_dtype(cfg.compute_dtype), jnp.float32)
  scaled = cfg.rope_scaling != "none" and not (local and cfg.rope_local_theta is not None)
  read = _length(pos, seg) if length is None else length[:, None]
  theta = cfg.rope_local_theta if local and cfg.rope_local_theta is not None else cfg.rope_theta
  width = cfg.rotated_width
  frequency = theta ** (-np.arange(0, width, 2) / width)
  amplitude = 1.0
  if scaled and cfg.rope_scaling == "linear":
    frequency = frequency / cfg.rope_factor
  elif scaled and cfg.rope_scaling == "llama3":
    frequency = _llama3(frequency, cfg)
  elif scaled and cfg.rope_scaling == "yarn":
    frequency = _yarn(frequency, theta, cfg)
    amplitude = cfg.rope_attention_factor
    if amplitude is None:
      amplitude = 0.1 * math.log(cfg.rope_factor) + 1.0
  elif scaled and cfg.rope_scaling == "longrope":
    frequency, amplitude = _longrope(frequency, read, cfg), _longrope_amplitude(cfg)
  angle = pos[..., None].astype(dtype) * jnp.asarray(frequency, dtype)
  if scaled and cfg.rope_scaling == "dynamic":
    angle = angle * _dynamic(read, width, cfg, dtype)
  return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def apply_rotary(
  x: Float[Array, "B T N H"],
  angles: tuple[Float[Array, "B T R"], Float[Array, "B T R"]],
  *,
  interleaved: bool,
) -> Float[Array, "B T N H"]:
  """Rotates the first 2R elements of each head, in at least float32; the rest passes through.

  Args:
    x: queries or keys.
    angles: what `rotary_angles` gives.
    interleaved: pairs are neighbours (0, 1), (2, 3) … as in GPT-J; else the elements i and i + R.
  """
  cos, sin = (a[:, :, None, :] for a in angles)
  half = cos.shape[-1]
  turned, rest = x[..., : 2 * half].astype(cos.dtype), x[..., 2 * half :]
  if interleaved:
    a, b = turned[..., 0::2], turned[..., 1::2]
    turned = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1)
    turned = turned.reshape(*x.shape[:-1], 2 * half)
  else:
    a, b = turned[..., :half], turned[..., half:]
    turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
  turned = turned.astype(x.dtype)
  return jnp.concatenate((turned, rest), axis=-1) if rest.shape[-1] else turned


def _llama3(frequency: np.ndarray, cfg: ModelConfig) -> np.ndarray:
  """Divides low frequencies by the factor, keeps high ones and interpolates between."""
  turns = _original(cfg) * frequency / (2 * math.pi)  # Over the original length.
  low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
  if not 0 < low < high:
    raise InputError(
      f"model.rope_low_freq_factor={low} must be positive and below rope_high_freq_factor={high}."
    )
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - keep) * frequency / cfg.rope_factor + keep * frequency


def _yarn(frequency: np.ndarray, theta: float, cfg: ModelConfig) -> np.ndarray:
  """YaRN (arXiv:2309.00071): a ramp over dimensions from kept to divided frequencies."""
  width = 2 * len(frequency)

  def dimension(turns: float) -> float:  # The element that makes so many turns.
    return width * math.log(_original(cfg) / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(cfg.rope_beta_fast), dimension(cfg.rope_beta_slow)
  if cfg.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = (np.arange(width // 2) - low) / (high - low if high != low else 0.001)
  divided = np.clip(ramp, 0, 1)
  return frequency / cfg.rope_factor * divided + frequency * (1 - divided)


def _longrope(
  frequency: np.ndarray, length: Int[Array, "B T"], cfg: ModelConfig
) -> Float[Array, "B T R"]:
  """LongRoPE (arXiv:2402.13753): frequencies divided by the factors of each token's length."""
  short, long = (frequency / np.asarray(f) for f in (cfg.rope_short_factors, cfg.rope_long_factors))
  return jnp.where((length > _original(cfg))[..., None], long, short)


def _longrope_amplitude(cfg: ModelConfig) -> float:
  if cfg.rope_attention_factor is not None:
    return cfg.rope_attention_factor
  if cfg.rope_factor == 1.0:
    return 1.0
  return math.sqrt(1 + math.log(cfg.rope_factor) / math.log(_original(cfg)))


def _length(pos, seg) -> Int[Array, "B T"]:
  """Length of each token's document; one for a row without segments."""
  if seg is None:
    return jnp.max(pos, axis=1, keepdims=True) + 1
  own = seg[:, :, None] == seg[:, None, :]
  return jnp.max(jnp.where(own, pos[:, None, :], -1), axis=-1) + 1


def _dynamic(
  length: Int[Array, "B T"], width: int, cfg: ModelConfig, dtype
) -> Float[Array, "B T R"]:
  """What dynamic NTK multiplies each frequency by, from the length of each token's document."""
  longer = jnp.maximum(length.astype(dtype), _original(cfg)) / _original(cfg)
  stretch = cfg.rope_factor * longer - (cfg.rope_factor - 1)
  # The base grows by stretch^(width / (width - 2)); a base to the power −2i / width remains.
  power = -np.arange(0, width, 2) / max(width - 2, 1)
  return stretch[..., None] ** jnp.asarray(power, dtype)


def _original(cfg: ModelConfig) -> int:
  if cfg.rope_original_positions is None:
    raise InputError(
      f"model.rope_scaling={cfg.rope_scaling!r} needs model.rope_original_positions."
    )
  return cfg.rope_original_positions


def sinusoidal(
  pos: Int[Array, "B T"], width: int, dtype=jnp.float32, *, inclusive: bool = False
) -> Float[Array, "B T D"]:
  """Sinusoids of "Attention Is All You Need", all sines before all cosines.

  The paper interleaves sine and cosine; like Transformers' Marian this concatenates them, which is
  the same up to a fixed order of the width. Position −1 gives finite values.

  Args:
    pos: positions.
    width: elements of the result; an odd one has one sine more.
    dtype: of the result; computed in at least float32.
    inclusive: the last frequency is 1/10,000 itself (tensor2tensor); `width` is even.
  """
  sines = (width + 1) // 2
  exact = jnp.promote_types(dtype, jnp.float32)
  steps = sines - 1 if inclusive else width / 2
  frequency = jnp.asarray(10_000.0 ** (-np.arange(sines) / steps), exact)
  angle = pos[..., None].astype(exact) * frequency
  both = jnp.concatenate((jnp.sin(angle), jnp.cos(angle[..., : width // 2])), axis=-1)
  return both.astype(dtype)


def relative_bias_buckets(
  q_pos: Int[Array, "B T"],
  kv_pos: Int[Array, "B S"],
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> Int[Array, "B T S"]:
  """T5's bucket of each key's distance from each query, int32 in [0, num_buckets).

  Near distances have a bucket each, far ones share logarithmically growing ones, all from
  `max_distance` on the last. `bidirectional`: keys after the query have half of the buckets to
  themselves; otherwise they count as distance 0.

  Raises:
    InputError: for too few buckets or a `max_distance` that they reach one by one.
  """
  buckets = num_buckets // 2 if bidirectional else num_buckets
  exact = buckets // 2
  if exact < 1 or max_distance <= exact:
    raise InputError(
      f"relative positions: {num_buckets} buckets and a largest distance of {max_distance} do not "
      f"fit: use at least {4 if bidirectional else 2} buckets and a distance above {exact}."
    )
  # Bounds found on the host in float32, as Transformers computes them: exact on every device.
  distances = np.arange(exact, max_distance + 1)
  ratio = np.log((distances / exact).astype(np.float32)) / np.float32(
    math.log(max_distance / exact)
  )
  bucket = (ratio * np.float32(buckets - exact)).astype(np.int32)
  bounds = distances[np.searchsorted(bucket, np.arange(1, buckets - exact))]
  ahead = kv_pos[:, None, :] - q_pos[:, :, None]
  distance = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
  result = jnp.minimum(distance, exact)
  for bound in bounds.tolist():
    result += distance >= bound
  if bidirectional:
    result += jnp.where(ahead > 0, buckets, 0)
  return result.astype(jnp.int32)


def signed_buckets(
  q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"], *, num_buckets: int, max_distance: int
) -> Int[Array, "B T S"]:
  """DeBERTa's bucket of each key's distance from each query, int32 in [0, num_buckets).

  Distance 0 has the middle one, keys before the query those above it. The nearer half of each side
  has a bucket for each distance, far ones share logarithmically growing ones up to `max_distance`;
  where there are as many buckets as distances, none is shared.
  """
  side = num_buckets // 2
  near, distances = side // 2, np.arange(max_distance + 1)
  bucket = distances
  if side < max_distance:  # In float32, as Transformers computes them.
    ratio = np.log((np.maximum(distances, near) / near).astype(np.float32))
    ratio /= np.log(np.float32((max_distance - 1) / near))
    far = np.ceil(ratio * np.float32(near - 1)).astype(np.int32) + near
    bucket = np.where(distances <= near, distances, far)
  behind = q_pos[:, :, None] - kv_pos[:, None, :]
  bucket = jnp.asarray(bucket, jnp.int32)[jnp.minimum(jnp.abs(behind), max_distance)]
  return jnp.clip(side + jnp.sign(behind) * bucket, 0, num_buckets - 1).astype(jnp.int32)


def alibi_slopes(num_heads: int, dtype=jnp.float32) -> Float[Array, "N"]:
  """The slope of each head: 2^(−8i/n) for a power of two n, else its next ones between (BLOOM)."""
  whole = 2 ** math.floor(math.log2(num_heads))
  slopes = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
  between = 2.0 ** (-4 / whole * np.arange(1, 2 * (num_heads - whole), 2))
  return jnp.asarray(np.concatenate((slopes, between)), dtype)


def alibi_bias(
  q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"], num_heads: int, dtype=jnp.float32, *,
  scale: float = 1.0, rounded: bool = False,
) -> Float[Array, "B N T S"]:  # fmt: skip
  """What ALiBi adds to scores: minus slope times distance (arXiv:2108.12409).

  Args:
    scale: multiplies it.
    rounded: slopes, positions and their products are rounded to bfloat16 before they are
      subtracted, as in Falcon. Only where keys are never behind their queries.
  """
  slopes = alibi_slopes(num_heads, dtype)[:, None, None]
  if not rounded:
    distance = jnp.abs(q_pos[:, None, :, None] - kv_pos[:, None, None, :])
    return -scale * slopes * distance.astype(dtype)
  bfloat16 = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  term = lambda pos: bfloat16(bfloat16(slopes) * bfloat16(pos.astype(dtype)))
  return scale * (term(kv_pos[:, None, None, :]) - term(q_pos[:, None, :, None]))
