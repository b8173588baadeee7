"""Texts that eight devices share are attended to as on one."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import fused, ring
from model.attend import attend, choose_kernel
from model.cache import new_cache
from model.config import ModelConfig
from model.context import balanced, balanced_index, in_row_order, sent_home
from model.errors import InputError
from model.heads import Network
from model.mask import positions_of
from model.sharding import make_mesh
from model.transformer import Inputs
from tests.train import tiny
from train.config import MeshConfig
from train.program import build_program

slow = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SINKS = np.array([-1.0, 0.0, 1.0, 3.0])
RINGS = {"eight": dict(seq=8), "with_heads_and_rows": dict(data=2, seq=2, tensor=2)}


def _texts(T: int, seed: int = 0) -> np.ndarray:
  """Segments of two rows: three documents and padding; padding first and one document."""
  cut = T // 8
  return np.repeat([[1, 2, 3, 0], [0, 1, 1, 1]], [3 * cut, cut, 3 * cut, T - 7 * cut], axis=1)


def _heads(T: int, S: int, dtype=np.float64, *, N: int = 4, K: int = 2, H: int = 4, B: int = 2):
  rng = np.random.default_rng(3)
  shapes = ((T, N), (S, K), (S, K))
  return tuple(rng.standard_normal((B, n, heads, H)).astype(dtype) for n, heads in shapes)


def _attended(q, k, v, sinks, q_seg, kv_seg, *, parts=1, ring=False, **settings):
  """(outputs in the order of the rows, a scalar of them); tokens are dealt out among `parts`."""
  deal = lambda x: balanced(x, parts)
  at = jax.jit(positions_of)
  y = attend(
    *map(deal, (q, k, v)), q_pos=deal(at(q_seg)), kv_pos=deal(at(kv_seg)), q_seg=deal(q_seg),
    kv_seg=deal(kv_seg), sinks=sinks, ring=ring, scale=0.3, ordered=False, kernel="xla", **settings,
  )  # fmt: skip
  y = in_row_order(y, parts)
  return jnp.sum(jnp.sin(3 * y)), y


CASES = {
  "causal_packed": dict(causal=True),
  "window_softcap_sinks": dict(causal=True, window=7, softcap=2.0, sinks=True),
  "two_sided_window": dict(causal=False, window=9),
  "all_to_all_sinks": dict(causal=False, sinks=True),
}
QUICK = {("window_softcap_sinks", "eight", True)}
COMBINED = [
  pytest.param(*case, marks=() if case in QUICK else slow)
  for case in [
    *((name, mesh, True) for name in ("causal_packed", "window_softcap_sinks") for mesh in RINGS),
    *((name, mesh, False) for name in CASES for mesh in RINGS),
  ]
]


@pytest.mark.parametrize(("case", "mesh", "deal"), COMBINED)
def test_a_ring_equals_plain_attention_forward_and_backward(case, mesh, deal, monkeypatch):
  monkeypatch.setattr(ring, "_BLOCK", 4)  # Several blocks on each device.
  T = 64
  settings = {name: value for name, value in CASES[case].items() if name != "sinks"}
  with jax.enable_x64(True):
    seg = jnp.asarray(_texts(T).astype(np.int32))
    args = (*map(jnp.asarray, _heads(T, T)), jnp.asarray(SINKS) if "sinks" in CASES[case] else None)

    def run(**how):
      f = lambda *a: _attended(*a, seg, seg, **settings, **how)
      places = tuple(i for i, a in enumerate(args) if a is not None)
      return jax.jit(jax.grad(f, places, has_aux=True))(*args)

    want = run()
    with jax.set_mesh(make_mesh(**RINGS[mesh])):
      got = run(ring=True, parts=RINGS[mesh]["seq"] if deal else 1)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@slow
def test_a_ring_attends_to_keys_of_another_length_and_shares_one_key_head():
  with jax.enable_x64(True):
    q_seg, kv_seg = (jnp.asarray(_texts(n).astype(np.int32)) for n in (32, 80))
    args = (*map(jnp.asarray, _heads(32, 80, K=1)), None)
    run = lambda ring: jax.jit(
      jax.grad(
        lambda *a: _attended(*a, q_seg, kv_seg, causal=False, ring=ring), (0, 1, 2), has_aux=True
      )
    )(*args)
    want = run(False)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
      got = run(True)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@slow
def test_memory_of_a_ring_falls_in_proportion_to_its_devices(monkeypatch):
  monkeypatch.setattr(ring, "_BLOCK", 64)
  T, seg, held = 4096, jnp.ones((1, 4096), jnp.int32), {}
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _heads(T, T, np.float32, H=32, B=1)]
  for n in (1, 2, 4, 8):
    mesh = make_mesh(seq=n, devices=jax.devices()[:n])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "seq"))
    with jax.set_mesh(mesh):
      f = lambda q, k, v: _attended(q, k, v, None, seg, seg, causal=True, ring=True)[0]
      grad = jax.jit(jax.grad(f, (0, 1, 2)), in_shardings=where, out_shardings=where)
      compiled = grad.lower(*shapes).compile()
    held[n] = compiled.memory_analysis().temp_size_in_bytes
    whole = re.search(r"\bf32\[[^\]]*\b4096\b", compiled.as_text())
    assert bool(whole) == (n == 1), "a device holds the keys of all"
  assert held[2] < 0.5 * held[1] and held[4] < 0.6 * held[2] and held[8] < 0.6 * held[4], held


@pytest.mark.parametrize("parts", [2, 8])
def test_tokens_dealt_out_come_home_and_so_do_their_gradients(parts):
  x = np.random.default_rng(0).standard_normal((2, 16 * parts, 3)).astype(np.float32)
  dealt = balanced(x, parts)
  np.testing.assert_array_equal(dealt, x[:, balanced_index(16 * parts, parts)])
  np.testing.assert_array_equal(in_row_order(dealt, parts), x)
  chunks = balanced_index(2 * parts, parts).reshape(parts, 2)
  assert len(set(chunks.sum(axis=1))) == 1, "a device's chunks should be as late as another's"
  with jax.set_mesh(make_mesh(seq=parts, tensor=8 // parts)):
    weight = jnp.arange(16.0 * parts)[:, None]
    f = lambda x: (lambda y: (jnp.sum(y * weight), y))(sent_home(x, parts))
    grad, home = jax.jit(jax.grad(f, has_aux=True))(dealt)
  np.testing.assert_array_equal(home, x)
  want = balanced(np.broadcast_to(weight, x.shape), parts)
  np.testing.assert_array_equal(grad, want)


@slow
@pytest.mark.parametrize("case", ["causal_packed", "window_softcap_sinks", "two_sided_window",
                                  "all_to_all_sinks"])  # fmt: skip
def test_splash_with_queries_split_equals_one_device(case, monkeypatch):
  monkeypatch.setattr(fused, "_BLOCKS", (128,))
  T = 1024
  settings = dict(window=None, softcap=None) | CASES[case] | dict(scale=0.3, interpret=True)
  settings["window"] = settings["window"] and 200 + settings["window"]
  sinks = SINKS.astype(np.float32) if settings.pop("sinks", False) else None
  args, seg = _heads(T, T, np.float32, H=16), _texts(T).astype(np.int32)

  def run(parts):
    def f(q, k, v):
      dealt = (balanced(x, parts) for x in (q, k, v, seg))
      y = fused.splash_attention(*dealt, sinks=sinks, balanced=parts, **settings)
      return (lambda y: (jnp.sum(jnp.sin(y)), y))(in_row_order(y, parts))

    return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*args)

  want = run(1)
  with jax.set_mesh(make_mesh(seq=4, tensor=2)):
    got = [run(1)] + ([run(4)] if settings["causal"] else [])
  for result in got:
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


CFG = dataclasses.replace(tiny.ROTARY, max_positions=None)


def _compiled(mesh: MeshConfig, devices=None, batch=4, **changes):
  """The training step of a small model on texts of 256 tokens."""
  model = dataclasses.replace(CFG, d_model=24, d_ff=40, **changes)
  config = tiny.config(model, mesh=mesh, batch_size=batch, seq_len=256)
  grid = make_mesh(**dataclasses.asdict(mesh), devices=devices)
  with jax.set_mesh(grid):
    return build_program(config, grid).train_step


@slow
@pytest.mark.parametrize("variant", ["gather", "ring"])
def test_no_device_holds_activations_of_whole_texts(variant, capfd):
  """Batch 4 / fsdp 2, 256 tokens / seq 2, and between blocks / tensor 2 as well."""
  mesh = MeshConfig(data=1, fsdp=2, seq=2, tensor=2)
  text = _compiled(mesh, context_attention=variant).as_text()
  assert "full rematerialization" not in capfd.readouterr().err
  whole = r"f32\[(?:[34],)?[24],256,(?:24|40|20|61|64|32)\]"
  assert not re.search(whole, text), "an activation is not split along its length"
  assert re.search(r"f32\[2,64,24\]", text), "the residual stream is not split over tensor"
  keys = re.findall(r"f32\[2,256,\d,8\]\S* all-gather", text)
  assert bool(keys) == (variant == "gather")
  if variant == "ring":  # Scores of two whole parts at most.
    assert "collective-permute" in text and not re.search(r"f32\[[\d,]*,256,\d+\]", text)


def _run_with_libtpu(code: str) -> str:
  lines = ["import os", "os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1')"]
  done = subprocess.run(
    [sys.executable, "-c", "\n".join([*lines, code])], cwd=ROOT, capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return done.stdout + done.stderr


FOR_A_TPU = """
import dataclasses, re, jax, numpy as np
from jax.experimental import topologies
from model.config import ModelConfig
from model.sharding import make_mesh
from tests.train import tiny
from train.config import MeshConfig
from train.program import build_program
devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
model = ModelConfig(vocab_size=1024, num_layers=4, d_model=256, d_ff=1024, num_heads=8,
                    num_kv_heads=4, head_dim=128, dtype="bfloat16", tie_embeddings=False)
mesh = MeshConfig(data=1, fsdp=2, seq=2, tensor=2)
config = tiny.config(model, mesh=mesh, batch_size=8, seq_len=1024)
grid = make_mesh(**dataclasses.asdict(mesh), devices=devices)
with jax.set_mesh(grid):
  text = build_program(config, grid).train_step.as_text()
print("kernels:", text.count('custom_call_target="tpu_custom_call"'))
print("whole:", len(re.findall(r"\\w+\\[4,1024,(?:256|512|1024)\\]", text)))
print("residual:", len(re.findall(r"bf16\\[4,256,256\\]", text)) > 0)
print("keys come together:", len(re.findall(r"bf16\\[4,1024,2,128\\]\\S* all-gather", text)) > 0)
print("their gradients part:", len(re.findall(r"\\[4,512,2,128\\]\\S* reduce-scatter", text)) > 0)
"""


@slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is missing"
)
@pytest.mark.skipif(
  os.environ.get("JAX_PLATFORMS") != "cpu", reason="JAX_PLATFORMS=cpu keeps libtpu free for this"
)
def test_a_tpu_program_has_splash_with_queries_split_and_no_whole_activation():
  said = _run_with_libtpu(FOR_A_TPU)
  assert "attention: splash (tpu, bfloat16)" in said and "kernels: 2" in said
  assert "whole: 0\n" in said and said.count("True") == 3
  assert "full rematerialization" not in said


@slow
def test_decoding_with_a_cache_is_the_same_where_texts_are_split():
  net = Network(CFG, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(net, nnx.Param)
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 24)).astype(np.int32)
  pos = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)

  def full(params):
    net = nnx.merge(graphdef, params)
    return net.logits(net.hidden(Inputs(tokens, pos))[0])

  def cached(params):
    net, out = nnx.merge(graphdef, params), []
    cache = new_cache(CFG, 2, 24, stacked=True)
    for part in (slice(0, 16), *(slice(i, i + 1) for i in range(16, 24))):
      x, cache, _ = net.hidden(Inputs(tokens[:, part], pos[:, part]), cache=cache)
      out.append(net.logits(x))
    return jnp.concatenate(out, axis=1)

  want = jax.jit(full)(params)
  with jax.set_mesh(make_mesh(seq=4, tensor=2)):
    split, got = jax.jit(lambda p: full(p))(params), jax.jit(cached)(params)
  np.testing.assert_allclose(split, want, rtol=0, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "change",
  [
    dict(positions="alibi"), dict(positions="t5_bias"), dict(attention_dropout=0.1),
    dict(positions="learned", relative_bias=True), dict(attention_kernel="splash"),
    dict(prefix_attention=True), dict(shape="encoder", positions="disentangled"),
  ],
  ids=lambda change: "_".join(change),
)  # fmt: skip
def test_what_a_ring_does_not_know_is_refused(change):
  ModelConfig(**change)
  with pytest.raises(InputError, match=f"{list(change)[-1]}=.*context_attention='gather'"):
    ModelConfig(**change, context_attention="ring")


@pytest.mark.parametrize(
  ("mesh", "change", "said"),
  [
    (dict(data=1, seq=8), dict(seq_len=24), "seq_len=24 .* 16.* mesh.seq=8 .*seq_len=32"),
    (dict(data=8), dict(context_attention="ring"), "no effect with mesh.seq=1"),
  ],
)
def test_lengths_that_devices_cannot_share_are_refused(mesh, change, said):
  model = dataclasses.replace(
    tiny.ROTARY, context_attention=change.pop("context_attention", "gather")
  )
  grid = make_mesh(**mesh)
  with jax.set_mesh(grid), pytest.raises(InputError, match=said):
    build_program(tiny.config(model, mesh=MeshConfig(**mesh), **change), grid)


def test_only_kernels_that_serve_split_texts_are_chosen():
  shape = (2, 512, 4, 64)
  shapes: dict = dict(q_shape=shape, k_shape=shape, ordered=True, dtype=jnp.bfloat16)
  assert choose_kernel("auto", platform="tpu", parts=4, **shapes)[0] == "splash"
  name, reason = choose_kernel("auto", platform="tpu", parts=8, **shapes)
  assert name == "xla" and "mesh.seq=8" in reason
  name, reason = choose_kernel("auto", platform="nvidia", parts=4, **shapes)
  assert name == "xla" and "mesh.seq=4" in reason
