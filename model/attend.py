"""attend(): one interface over the attention kernels, and the choice among them."""

import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.context import seq_parts
from model.errors import InputError
from model.fused import cudnn_attention, splash_attention
from model.mask import attention_mask
from model.observe import observed, observing
from model.ring import ring_attention
from model.sharding import constrain

_MANY_SCORES = 2**27  # Of a layer, half a gigabyte in float32.


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  q_pos: Int[Array, "B T"],
  kv_pos: Int[Array, "B S"],
  q_seg: Int[Array, "B T"] | None = None,
  kv_seg: Int[Array, "B S"] | None = None,
  causal: bool,
  window: int | None = None,
  bidirectional: Bool[Array, "B S"] | None = None,
  scale: float,
  softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  bias: Float[Array, "#B N T S"] | None = None,
  scales: tuple[Float[Array, "B K S"], Float[Array, "B K S"]] | None = None,
  ordered: bool,
  balanced: int = 1,
  kernel: str,
  ring: bool = False,
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> Float[Array, "B T N Hv"]:
  """Softmax attention of every query over the keys that `attention_mask` shows it.

  Query heads share key/value heads in groups of N / K. A query that sees nothing, such as padding,
  gets zeros, and its gradients are zeros. The result has the dtype of `q`; scores and softmax are
  at least float32.

  Args:
    q, k, v: queries, keys and values of one dtype.
    q_pos, kv_pos, q_seg, kv_seg, causal, window, bidirectional: see `attention_mask`.
    scale: multiplies the scores.
    softcap: bounds the scaled scores, as softcap · tanh(score / softcap), before bias and mask.
    sinks: a learned score per head that joins the denominator of the softmax (GPT-OSS).
    bias: added to the scores (T5, ALiBi).
    scales: what each key and each value is to be multiplied by, of a cache in int8.
    ordered: a static promise that key time is query time and that in each segment tokens lie in
      row order with positions rising by one, so that kernels may mask by index.
    balanced: tokens lie in the balanced order of so many devices (see `balanced_parts`), and
      `ordered` is of the order that they had before; 1: they lie as they are.
    kernel: "auto", "xla", "cudnn" or "splash"; under `model.observe.observe` it is xla.
    ring: where the mesh in use splits both lengths, keys go from device to device; otherwise each
      gets all of them.
    dropout: share of the probabilities that is dropped while there is a `key`.

  Raises:
    InputError: if the named kernel cannot serve this call, with the reason.
  """
  dropping = dropout > 0 and key is not None
  parts = seq_parts()
  if observing():
    kernel, ring = "xla", False
  if ring and parts > 1 and q.shape[1] % parts == 0 and k.shape[1] % parts == 0:
    if bias is not None or dropping or bidirectional is not None:
      raise InputError(
        "model.context_attention='ring' knows no biases on scores, dropout of probabilities or "
        "bidirectional prefixes: use 'gather'."
      )
    _announce("ring", f"mesh.seq={parts}")
    return ring_attention(
      q, k, v, q_pos=q_pos, kv_pos=kv_pos, q_seg=q_seg, kv_seg=kv_seg, causal=causal,
      window=window, scale=scale, softcap=softcap, sinks=sinks,
    )  # fmt: skip
  platform, head_limit = device_facts()
  name, reason = choose_kernel(
    kernel, platform=platform, dtype=q.dtype, q_shape=q.shape, k_shape=k.shape, ordered=ordered,
    softcap=softcap is not None, sinks=sinks is not None, bias=bias is not None, dropout=dropping,
    prefix=bidirectional is not None, widths=v.shape != k.shape, scales=scales is not None,
    head_limit=head_limit, parts=parts,
  )  # fmt: skip
  _announce(name, reason)
  if name == "splash":
    seg = jnp.ones_like(q_pos) if q_seg is None else q_seg
    seg = jnp.where(q_pos >= 0, seg, 0)
    return splash_attention(
      q, k, v, seg, causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks,
      balanced=balanced,
    )  # fmt: skip
  k, v = (constrain(x, ("batch", None, "kv_heads", None)) for x in (k, v))
  mask = attention_mask(
    q_pos, kv_pos, q_seg, kv_seg, causal=causal, window=window, bidirectional=bidirectional
  )
  if name == "cudnn":
    return cudnn_attention(q, k, v, mask, scale=scale, causal=causal and ordered)
  dropped = (dropout, key) if dropping else None
  return _xla(
    q, k, v, mask, scale, softcap=softcap, sinks=sinks, bias=bias, scales=scales, dropped=dropped
  )


def _xla(q, k, v, mask, scale: float, *, softcap, sinks, bias, scales, dropped) -> Array:
  """The reference: every kernel must equal it. Keys and values are not repeated for their groups.

  Scales multiply scores and probabilities, which are fewer than elements of keys and values.
  Sinks need no column of their own: the probabilities that a softmax without them gives shrink by
  sigmoid(log-sum-exp − sink).
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  exact = jnp.promote_types(q.dtype, jnp.float32)
  plain = sinks is None and bias is None and scales is None and dropped is None
  if plain and K > 1 and _are_many(B * N * T * k.shape[1]) and not observing():
    # The groups one after the other, of which none leaves its scores to the backward pass.
    split = lambda x: jnp.moveaxis(x.reshape(B, -1, K, x.shape[2] // K, x.shape[3]), 2, 0)
    none = dict(sinks=None, bias=None, scales=None, dropped=None)
    one = jax.checkpoint(
      lambda own: _xla(own[0], own[1], own[2], mask, scale, softcap=softcap, **none)
    )
    y = jax.lax.map(one, (split(q), split(k), split(v)))
    return jnp.moveaxis(y, 0, 2).reshape(B, T, N, v.shape[-1])
  group = lambda x: x.reshape(x.shape[0], K, N // K, *x.shape[2:])
  scores = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=exact
  )
  scores *= jnp.asarray(scale, exact)
  each = lambda a: a[:, :, None, None].astype(exact)
  if scales is not None:
    scores *= each(scales[0])
  if softcap is not None:
    scores = jnp.asarray(softcap, exact) * jnp.tanh(scores / softcap)
  if bias is not None:
    scores += group(bias).astype(exact)
  weights, total = _masked_softmax(scores, mask[:, :, None])
  share = None
  if sinks is not None:
    share = jax.nn.sigmoid(total.reshape(B, N, T) - sinks.astype(exact)[:, None])
  sees = jnp.any(mask, axis=-1)
  if observing():
    told = jnp.where(sees[..., None], weights.reshape(B, N, T, -1), 0)
    observed(told if share is None else told * share[..., None])
  if dropped is not None:
    rate, key = dropped
    kept = jax.random.bernoulli(key, 1 - rate, weights.shape)
    weights = jnp.where(kept, weights / (1 - rate), 0)
  if scales is not None:
    weights *= each(scales[1])
  # In this order XLA need not turn the values around before each step of decoding.
  y = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v)
  y = jnp.moveaxis(y, 3, 1).reshape(B, T, N, v.shape[-1])
  if share is not None:
    y = y * jnp.moveaxis(share, 1, 2)[..., None]
  return jnp.where(sees[:, 0, :, None, None], y, 0).astype(q.dtype)


def _are_many(scores: int) -> bool:
  """Whether all scores of a layer are too many to be held at once; devices have parts of them."""
  mesh = jax.sharding.get_abstract_mesh()
  return scores >= _MANY_SCORES and (mesh.empty or mesh.size == 1)


@jax.custom_jvp
def _masked_softmax(scores: Array, mask: Array) -> tuple[Array, Array]:
  """(probabilities, log-sum-exp) over the last axis; a row without keys is finite but no softmax.

  Its derivative needs the probabilities only, where automatic differentiation keeps four arrays of
  their size: scores are the largest activations of a layer.
  """
  scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  top = jnp.max(scores, axis=-1, keepdims=True)
  powers = jnp.exp(scores - top)
  whole = jnp.sum(powers, axis=-1, keepdims=True)
  return powers / whole, jnp.squeeze(jnp.log(whole) + top, axis=-1)


@_masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
  weights, total = _masked_softmax(*primals)
  change = tangents[0]
  mean = jnp.sum(weights * change, axis=-1, keepdims=True)
  return (weights, total), (weights * (change - mean), jnp.squeeze(mean, axis=-1))


def choose_kernel(
  kernel: str,
  *,
  platform: str,
  dtype: jnp.dtype,
  q_shape: tuple[int, ...],
  k_shape: tuple[int, ...],
  ordered: bool,
  softcap: bool = False,
  sinks: bool = False,
  bias: bool = False,
  dropout: bool = False,
  prefix: bool = False,
  widths: bool = False,
  scales: bool = False,
  head_limit: int = 128,
  parts: int = 1,
) -> tuple[str, str]:
  """The kernel that serves a call, and why: (name, reason).

  Args:
    kernel: a kernel's name, or "auto": splash on TPUs and cuDNN on NVIDIA GPUs where they can serve
      the call, XLA otherwise.
    platform: "cpu", "tpu", "nvidia" or another.
    dtype: of queries, keys and values.
    q_shape, k_shape: (B, T, N, H) and (B, S, K, H).
    ordered: see `attend`.
    softcap, sinks, bias, dropout, prefix, widths, scales: what the call asks for.
    head_limit: widest head of this GPU's cuDNN attention.
    parts: how many devices a text is split over.

  Raises:
    InputError: if `kernel` names one that cannot serve the call.
  """
  asked = dict(
    softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, prefix=prefix, widths=widths,
    scales=scales,
  )  # fmt: skip
  facts = (platform, jnp.dtype(dtype), q_shape, k_shape)
  refusals = {
    "xla": lambda: None,
    "splash": lambda: _splash_refusal(*facts, ordered, parts, asked),
    "cudnn": lambda: _cudnn_refusal(*facts, head_limit, parts, asked),
  }
  if kernel == "auto":
    best = {"tpu": "splash", "nvidia": "cudnn"}.get(platform, "xla")
    refusal = refusals[best]()
    if refusal is not None:
      return "xla", f"{best} {refusal}"
    return best, {"xla": platform}.get(best, f"{platform}, {jnp.dtype(dtype).name}")
  if kernel not in refusals:
    raise InputError(
      f"attention kernel {kernel!r} is not known: use one of auto, {', '.join(refusals)}."
    )
  refusal = refusals[kernel]()
  if refusal is not None:
    raise InputError(
      f"model.attention_kernel={kernel!r} {refusal}: use 'auto' or 'xla' for this model."
    )
  return kernel, "as configured"


def _splash_refusal(platform, dtype, q_shape, k_shape, ordered, parts, asked) -> str | None:
  T, S = q_shape[1], k_shape[1]
  if platform != "tpu":
    return f"runs on TPUs, and this is {platform}"
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"takes bfloat16 and float32, not {dtype.name}"
  if not ordered:
    return "masks by index: it serves training, not a pass with a cache or positions of its own"
  if T != S or T % (128 * parts):
    split = f" on each of mesh.seq={parts} devices" if parts > 1 else ""
    return f"takes sequences of a multiple of 128 tokens{split}, not {T} queries and {S} keys"
  return _feature(asked, ("bias", "dropout", "prefix", "widths", "scales"))


def _cudnn_refusal(platform, dtype, q_shape, k_shape, head_limit, parts, asked) -> str | None:
  T, S, H = q_shape[1], k_shape[1], q_shape[3]
  if platform != "nvidia":
    return f"runs on NVIDIA GPUs, and this is {platform}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"takes bfloat16 and float16, not {dtype.name}"
  if H % 8 or head_limit < H:
    return f"takes heads of a multiple of 8 up to {head_limit} wide on this GPU, not {H}"
  if parts > 1:
    return f"takes whole texts, and mesh.seq={parts} splits them"
  if T % 2 or S % 2:
    return f"takes even lengths, not {T} queries and {S} keys"
  return _feature(asked, ("softcap", "sinks", "bias", "dropout", "widths", "scales"))


_FEATURES = {
  "softcap": "soft caps on scores (model.attention_softcap)",
  "sinks": "attention sinks (model.attention_sinks)",
  "bias": "biases on scores (T5, ALiBi)",
  "dropout": "dropout of probabilities (model.attention_dropout)",
  "prefix": "bidirectional prefixes",
  "scales": "caches in int8",
  "widths": "values of another width than keys (model.v_head_dim)",
}


def _feature(asked: dict[str, bool], unable: tuple[str, ...]) -> str | None:
  wanted = [_FEATURES[name] for name in unable if asked[name]]
  return f"does not know {' or '.join(wanted)}" if wanted else None


def device_facts() -> tuple[str, int]:
  """(platform, cuDNN's head limit) of the mesh in use, or of the default device.

  A mesh may describe devices that are not here, as when a program is compiled ahead of time. The
  platform is "cpu", "tpu", "nvidia" or what the device calls itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  described = None if mesh.empty else mesh.abstract_device
  device = jax.devices()[0]
  kind = device.device_kind if described is None else described.device_kind
  if kind.upper().startswith("TPU"):
    return "tpu", 0
  if device.platform == "gpu" and kind.upper().startswith("NVIDIA"):
    hopper = float(getattr(device, "compute_capability", 0)) >= 9
    return "nvidia", 256 if hopper else 128
  return kind.lower() if described is not None else device.platform, 0


_said: set[str] = set()


def _announce(name: str, reason: str) -> None:
  """Says once per process and kernel that it runs and why, whatever the number of layers."""
  if name not in _said and jax.process_index() == 0:
    print(f"attention: {name} ({reason})", file=sys.stderr, flush=True)
  _said.add(name)
