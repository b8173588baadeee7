"""Attention kernels against a loop over queries, PyTorch and one another."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from model import fused
from model.attend import attend, choose_kernel
from model.errors import InputError
from model.mask import positions_of

ROOT = Path(__file__).parents[2]
SEG = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
SINKS = np.array([-1.0, 0.0, 1.0, 3.0], np.float32)


def _heads(T, *, B=2, N=4, K=2, H=8, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return tuple(rng.standard_normal((B, T, h, H)).astype(dtype) for h in (N, K, K))


COMPILED = jax.jit(
  attend,
  static_argnames=("causal", "window", "scale", "softcap", "ordered", "kernel", "dropout"),
)
POSITIONS = jax.jit(positions_of)


def _attend(q, k, v, seg=None, *, kernel="xla", **settings):
  seg = np.ones(q.shape[:2], np.int32) if seg is None else seg
  pos = POSITIONS(seg)
  defaults = dict(causal=True, scale=q.shape[-1] ** -0.5, ordered=True)
  places = dict(q_pos=pos, kv_pos=pos, q_seg=seg, kv_seg=seg)
  return COMPILED(q, k, v, **places, kernel=kernel, **(defaults | settings))


def _loop(
  q, k, v, seg, *, causal=True, window=None, softcap=None, sinks=None, bias=None, marks=None
):
  """Attention one query and head at a time in float64; `marks` tell the tokens of prefixes."""
  B, T, N, H = q.shape
  y = np.zeros(q.shape, np.float64)
  for b in range(B):
    for t in range(T):
      seen = []
      for s in range(T):
        same = seg[b, s] == seg[b, t] > 0
        near = window is None or (t - s < window if causal else abs(t - s) <= window // 2)
        both = marks is not None and marks[b, s] and marks[b, t]
        if same and near and (s <= t or not causal or both):
          seen.append(s)
      for n in range(N if seen else 0):
        g = n // (N // k.shape[2])
        score = k[b, seen, g].astype(np.float64) @ q[b, t, n] / np.sqrt(H)
        score = score if softcap is None else softcap * np.tanh(score / softcap)
        score = score if bias is None else score + bias[min(b, len(bias) - 1), n, t, seen]
        weight = np.exp(score)
        total = weight.sum() + (0 if sinks is None else np.exp(np.float64(sinks[n])))
        y[b, t, n] = weight @ v[b, seen, g] / total
  return y


BIAS = np.random.default_rng(7).standard_normal((1, 4, 9, 9)).astype(np.float32)
MARKS = np.array([[1, 1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(causal=False),
    dict(window=2),
    dict(window=3, causal=False),
    dict(softcap=0.7, sinks=SINKS),
    dict(bias=BIAS, softcap=2.0, window=3),
    dict(bias=np.repeat(BIAS, 2, axis=0), causal=False, sinks=SINKS),
    dict(marks=MARKS),
  ],
  ids=lambda s: "-".join(s) or "causal",
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_xla_equals_a_loop_over_queries(settings, kv_heads):
  q, k, v = _heads(9, K=kv_heads)
  ours = {("bidirectional" if name == "marks" else name): x for name, x in settings.items()}
  y = _attend(q, k, v, SEG, **ours)
  np.testing.assert_allclose(y, _loop(q, k, v, SEG, **settings), atol=2e-6)


def test_output_and_gradients_equal_pytorch_with_padding_on_either_side():
  torch = pytest.importorskip("torch")
  q, k, v = _heads(9)
  weight = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
  loss = lambda q, k, v: jnp.sum(_attend(q, k, v, SEG) * weight)
  ours = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  allowed = (SEG[:, :, None] == SEG[:, None]) & (SEG[:, :, None] > 0) & np.tri(9, dtype=bool)
  theirs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
  y = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in theirs), attn_mask=torch.tensor(allowed[:, None]), enable_gqa=True
  )
  real = torch.tensor(SEG > 0)[:, :, None, None]
  y = torch.where(real, y.transpose(1, 2), 0)
  (y * torch.tensor(weight)).sum().backward()
  np.testing.assert_allclose(_attend(q, k, v, SEG), y.detach().numpy(), atol=1e-6)
  for got, expected in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(got, expected.grad.numpy(), atol=5e-6)


def test_every_setting_has_right_gradients():
  with jax.enable_x64(True):
    q, k, v = _heads(9, H=4, dtype=np.float64)
    rest = (SINKS.astype(np.float64), BIAS.astype(np.float64))
    f = lambda q, k, v, sinks, bias: _attend(q, k, v, SEG, softcap=1.5, sinks=sinks, bias=bias)
    check_grads(jax.jit(f), (q, k, v, *rest), order=1, modes=["rev"])
    assert f(q, k, v, *rest).dtype == np.float64


def test_packed_documents_equal_each_alone_in_output_and_gradient():
  settings = dict(window=3, sinks=SINKS, softcap=2.0)
  lengths, T = (5, 2, 5), 14
  q, k, v = _heads(T, B=1)
  seg = np.repeat([1, 2, 3, 0], [*lengths, T - sum(lengths)])[None].astype(np.int32)
  loss = lambda q, k, v, seg: (lambda y: (jnp.sum(jnp.sin(3 * y)), y))(
    _attend(q, k, v, seg, **settings)
  )
  grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  together, packed = grad(q, k, v, seg)
  start = 0
  for n in lengths:
    part = slice(start, start + n)
    apart, alone = grad(q[:, part], k[:, part], v[:, part], np.ones((1, n), np.int32))
    np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)
    for a, b in zip(together, apart, strict=True):
      np.testing.assert_allclose(a[:, part], b, atol=3e-6)
    start += n
  assert not np.any(packed[:, start:]) and not any(np.any(g[:, start:]) for g in together)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_padding_gives_zeros_and_reaches_neither_outputs_nor_gradients(sinks):
  q, k, v = _heads(9)
  pad = (SEG == 0)[:, :, None, None]
  loss = lambda q, k, v: jnp.sum(jnp.cos(_attend(q, k, v, SEG, sinks=sinks, causal=False)))
  with jax.debug_nans(True):
    grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    plain = grads(q, k, v)
    other = grads(*(np.where(pad, np.float32(1e4), x) for x in (q, k, v)))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)
  for g in plain[1]:
    assert not np.any(np.where(pad, g, 0))
  empty = _attend(q, k, v, np.zeros_like(SEG), sinks=sinks)
  np.testing.assert_array_equal(empty, np.zeros_like(q))


def test_queries_over_a_cache_in_any_slot_order_equal_the_last_rows_of_a_full_pass():
  q, k, v = _heads(9, B=1)
  full = _attend(q, k, v, window=4)
  order = np.random.default_rng(0).permutation(9)
  pos = np.arange(9, dtype=np.int32)[None]
  y = COMPILED(
    q[:, 7:], k[:, order], v[:, order], q_pos=pos[:, 7:], kv_pos=pos[:, order], causal=True,
    window=4, scale=8**-0.5, ordered=False, kernel="auto",
  )  # fmt: skip
  np.testing.assert_allclose(y, full[:, 7:], atol=1e-6)


def test_bfloat16_keeps_scores_in_float32():
  q, k, v = (jnp.asarray(x * 4, jnp.bfloat16) for x in _heads(9, H=32))
  y = _attend(q, k, v, SEG)
  exact = _loop(*(np.asarray(x, np.float32) for x in (q, k, v)), SEG)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.04, rtol=0.01)


def test_dropout_drops_its_share_of_probabilities_and_scales_the_rest():
  T = 64
  q, k, _ = _heads(T, B=1, N=2, K=1, H=T)
  v = np.eye(T, dtype=np.float32)[None, :, None]  # The output is the probabilities.
  whole = np.asarray(_attend(q, k, v, causal=False))
  drop = functools.partial(_attend, q, k, v, causal=False, dropout=0.25)
  np.testing.assert_array_equal(drop(), whole)
  some = np.asarray(drop(key=jax.random.key(0)))
  kept = some != 0
  assert abs(kept.mean() - 0.75) < 0.02
  np.testing.assert_allclose(some[kept], whole[kept] / 0.75, rtol=1e-5)
  np.testing.assert_array_equal(some, drop(key=jax.random.key(0)))
  assert np.any(some != drop(key=jax.random.key(1)))


def _value_and_grads(f, *args):
  """(output, gradients of a fixed random projection of it) of one compiled program."""
  weight = np.random.default_rng(5).standard_normal(args[0].shape).astype(np.float32)
  loss = lambda *a: (lambda y: (jnp.sum(y.astype(jnp.float32) * weight), y))(f(*a))
  places = tuple(range(len(args)))
  (_, y), grads = jax.jit(jax.value_and_grad(loss, places, has_aux=True))(*args)
  return y, grads


LONG_SEG = np.repeat([[1, 2, 3, 0], [0, 1, 1, 1]], [100, 20, 90, 46], axis=1).astype(np.int32)


@pytest.mark.parametrize(
  "settings",
  [
    dict(causal=True, window=None, softcap=None, sinks=None),
    dict(causal=True, window=70, softcap=2.0, sinks=SINKS),
    dict(causal=False, window=61, softcap=None, sinks=None),
  ],
  ids=["causal", "window-softcap-sinks", "two-sided"],
)
def test_splash_equals_xla_in_output_and_gradients_for_packed_gqa(settings, monkeypatch):
  monkeypatch.setattr(fused, "_BLOCKS", (128,))
  args = _heads(256, H=16)
  rest = {} if settings["sinks"] is None else {"sinks": settings["sinks"]}
  fixed = {name: x for name, x in settings.items() if name != "sinks"}

  def splash(q, k, v, *sinks):
    given = dict(zip(rest, sinks, strict=True))
    return fused.splash_attention(q, k, v, LONG_SEG, scale=0.25, interpret=True, **(fixed | given))

  def xla(q, k, v, *sinks):
    given = dict(zip(rest, sinks, strict=True))
    return _attend(q, k, v, LONG_SEG, scale=0.25, **(fixed | given))

  y, grads = _value_and_grads(splash, *args, *rest.values())
  expected, true = _value_and_grads(xla, *args, *rest.values())
  np.testing.assert_allclose(y, expected, atol=2e-6)
  for got, want in zip(grads, true, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def _run(code: str, *, libtpu: bool = False) -> str:
  """The output of a Python process of its own, for another set of devices."""
  lines = ["import os", "os.environ['JAX_PLATFORMS'] = 'cpu'"]
  if libtpu:
    lines.append("os.environ['TPU_SKIP_MDS_QUERY'] = '1'")
  else:
    lines.append("os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'")
  program = "\n".join([*lines, code])
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return done.stdout + done.stderr


ON_A_MESH = """
import jax, numpy as np
from model.fused import splash_attention
rng = np.random.default_rng(0)
seg = np.repeat([[1, 2, 0, 3]], 32, axis=1).repeat(2, axis=0).astype(np.int32)
sinks = np.arange(4, dtype=np.float32)
settings = dict(causal=True, window=50, scale=0.3, softcap=None, interpret=True)
run = lambda q, k, v: splash_attention(q, k, v, seg, sinks=sinks, **settings)
axes = (jax.sharding.AxisType.Auto,) * 3
q, k, v = (rng.standard_normal((2, 128, h, 8)).astype(np.float32) for h in (4, 2, 2))
alone = jax.jit(run)(q, k, v)
for shape in ((2, 1, 2), (1, 1, 4)):
  with jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=axes)):
    spread = jax.jit(lambda q, k, v: run(q, k, v))(q, k, v)
  print(shape, np.abs(np.asarray(alone) - np.asarray(spread)).max() < 1e-6)
"""


def test_splash_on_a_mesh_of_four_devices_equals_one_device():
  assert _run(ON_A_MESH).count("True") == 2


FOR_A_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from model.attend import attend
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
axes = (jax.sharding.AxisType.Auto,) * 3
grid = np.array(devices).reshape(2, 2, 2)
mesh = jax.sharding.Mesh(grid, ("data", "fsdp", "tensor"), axis_types=axes)
P = jax.sharding.PartitionSpec
at = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
  shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P(("data", "fsdp"), None, *spec)))
def loss(q, k, v, seg, pos):
  y = attend(q, k, v, q_pos=pos, kv_pos=pos, q_seg=seg, kv_seg=seg, causal=True, window=100,
             softcap=30.0, scale=0.125, ordered=True, kernel="auto")
  return jnp.sum(y.astype(jnp.float32) ** 2)
heads = [at((4, 256, 4, 64), jnp.bfloat16, "tensor")]
heads += [at((4, 256, 1, 64), jnp.bfloat16)] * 2
ints = [at((4, 256), jnp.int32)] * 2
with jax.set_mesh(mesh):
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*heads, *ints).compile()
print("kernels:", compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is missing"
)
@pytest.mark.skipif(
  os.environ.get("JAX_PLATFORMS") != "cpu", reason="JAX_PLATFORMS=cpu keeps libtpu free for this"
)
def test_splash_is_chosen_and_compiles_forward_and_backward_for_a_tpu_slice():
  said = _run(FOR_A_TPU, libtpu=True)
  assert "attention: splash (tpu, bfloat16)" in said
  assert "kernels: 2" in said  # Forward; dq, dk and dv.


@pytest.mark.parametrize("causal", [True, False])
def test_what_cudnn_is_asked_for_equals_xla(causal, monkeypatch):
  """The arguments that cuDNN gets, computed by the same function's other implementation."""
  real = jax.nn.dot_product_attention
  plain = lambda *a, implementation, **settings: real(*a, implementation="xla", **settings)
  monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
  monkeypatch.setattr("model.attend.device_facts", lambda: ("nvidia", 256))
  args = [jnp.asarray(x, jnp.bfloat16) for x in _heads(10)]
  seg = np.pad(SEG, ((0, 0), (0, 1)))
  run = lambda kernel, **s: np.asarray(
    _attend(*args, seg, kernel=kernel, causal=causal, **s), np.float32
  )
  for settings in (dict(), dict(window=3), dict(ordered=False)):
    np.testing.assert_allclose(run("cudnn", **settings), run("xla", **settings), atol=0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_equals_xla_in_output_and_gradients_on_a_gpu(causal, window):
  args = [jnp.asarray(x, jnp.bfloat16) for x in _heads(256, H=64)]
  run = lambda kernel: _value_and_grads(
    lambda q, k, v: _attend(q, k, v, LONG_SEG, kernel=kernel, causal=causal, window=window), *args
  )
  for a, b in zip(jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("xla")), strict=True):
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=0.03, rtol=0.03)


def _choose(kernel="auto", platform="cpu", *, T=256, S=None, H=64, dtype="bfloat16", **rest):
  shapes = dict(q_shape=(2, T, 4, H), k_shape=(2, T if S is None else S, 2, H))
  facts = dict(platform=platform, dtype=jnp.dtype(dtype), ordered=True, head_limit=128)
  return choose_kernel(kernel, **shapes, **(facts | rest))


def test_auto_takes_the_devices_kernel_where_it_can_serve_the_call():
  assert _choose(platform="cpu")[0] == "xla"
  assert _choose(platform="rocm")[0] == "xla"
  assert _choose(platform="tpu", softcap=True, sinks=True)[0] == "splash"
  assert _choose(platform="tpu", ordered=False)[0] == "xla"
  assert _choose(platform="tpu", T=200)[0] == "xla"
  assert _choose(platform="nvidia", prefix=True, ordered=False)[0] == "cudnn"
  assert _choose(platform="nvidia", H=256)[0] == "xla"
  assert _choose(platform="nvidia", H=256, head_limit=256)[0] == "cudnn"
  assert _choose(platform="nvidia", T=1, S=256)[0] == "xla"
  assert _choose(platform="nvidia", dtype="float32")[0] == "xla"


@pytest.mark.parametrize(
  ("kernel", "platform", "call", "reason"),
  [
    ("splash", "cpu", dict(), "runs on TPUs"),
    ("splash", "tpu", dict(dtype="float16"), "float16"),
    ("splash", "tpu", dict(ordered=False), "masks by index"),
    ("splash", "tpu", dict(T=192), "128"),
    ("splash", "tpu", dict(bias=True), "biases"),
    ("splash", "tpu", dict(dropout=True), "dropout"),
    ("splash", "tpu", dict(prefix=True), "prefixes"),
    ("splash", "tpu", dict(widths=True), "another width"),
    ("cudnn", "cpu", dict(), "NVIDIA"),
    ("cudnn", "nvidia", dict(dtype="float32"), "float32"),
    ("cudnn", "nvidia", dict(H=256), "256"),
    ("cudnn", "nvidia", dict(H=36), "multiple of 8"),
    ("cudnn", "nvidia", dict(T=255), "even"),
    ("cudnn", "nvidia", dict(softcap=True), "soft caps"),
    ("cudnn", "nvidia", dict(sinks=True), "sinks"),
    ("cudnn", "nvidia", dict(bias=True), "biases"),
    ("cudnn", "nvidia", dict(dropout=True), "dropout"),
    ("cudnn", "nvidia", dict(widths=True), "another width"),
    ("flash", "cpu", dict(), "not known"),
  ],
)
def test_a_named_kernel_refuses_what_it_cannot_honour(kernel, platform, call, reason):
  with pytest.raises(InputError, match=reason):
    _choose(kernel, platform, **call)


def test_the_choice_is_said_once_however_many_layers_there_are(capfd, monkeypatch):
  monkeypatch.setattr("model.attend._said", set())
  x, pos = jnp.zeros((1, 9, 2, 8)), jnp.arange(9)[None]
  layer = lambda x: attend(
    x, x, x, q_pos=pos, kv_pos=pos, causal=True, scale=1.0, ordered=True, kernel="auto"
  )
  jax.eval_shape(lambda x: layer(layer(layer(x))), x)
  assert capfd.readouterr().err.count("attention: xla (cpu)") == 1
