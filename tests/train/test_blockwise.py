"""8-bit optimizer states against the data type of bitsandbytes and the paper's algorithm."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import InputError
from model.layers import ParamInfo
from tests.commands import ROOT, run
from tests.train.test_optim import INFO, LEAVES, arrays, config
from tests.train.test_optim import run as updated
from tests.train.test_run import Bench, assert_same_run, kill_and_continue, metrics
from train.blockwise import Blocks, block_axis, code_values, narrowed, widened
from train.config import OptimizerConfig
from train.optim import make_optimizer, state_axes

MATRIX = ParamInfo(("embed", "mlp"), "matrix", 1)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_have_the_values_of_bitsandbytes(signed):
  functional = pytest.importorskip("bitsandbytes.functional")
  theirs = functional.create_dynamic_map(signed=signed).numpy()
  np.testing.assert_allclose(code_values(signed), theirs, rtol=0, atol=1e-7)


def nearest(x: np.ndarray, signed: bool) -> np.ndarray:
  """A flat array, in blocks of 256, as the nearest values of the data type: the definition."""
  table, blocks = code_values(signed).astype(np.float64), x.reshape(-1, 256)
  scale = np.abs(blocks).max(axis=1, keepdims=True)
  share = blocks / np.where(scale > 0, scale, 1)
  return (table[np.abs(share[..., None] - table).argmin(-1)] * scale).reshape(x.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_each_element_gets_the_nearest_value_of_its_block(signed):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 1024)) * np.exp(3 * rng.normal(size=(16, 1024)))
  x[0, :256] = 0.0
  x = (x if signed else np.abs(x)).astype(np.float32)
  got = widened(narrowed(jnp.asarray(x), MATRIX, signed=signed), MATRIX, signed=signed)
  np.testing.assert_allclose(got, nearest(x.astype(np.float64), signed), rtol=2e-6, atol=0)


def test_blocks_that_do_not_fill_the_axis_have_a_scale_of_their_own():
  x = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
  blocks = narrowed(jnp.asarray(x), MATRIX, signed=True)
  assert isinstance(blocks, Blocks)
  assert blocks.codes.shape == (20, 300) and blocks.scale.shape == (20, 2)
  np.testing.assert_array_equal(blocks.scale[:, 1], np.abs(x[:, 256:]).max(axis=1))
  back = widened(blocks, MATRIX, signed=True)
  assert np.abs(back - x).max() <= 0.01 * np.abs(x).max()


def by_hand(name: str, start: np.ndarray, gradients: list[np.ndarray], cfg: OptimizerConfig):
  """The paper's algorithm: moments are rounded after an update, which has used the exact ones."""
  p, m, v = start, np.zeros_like(start), np.zeros_like(start)
  b1, b2 = cfg.moments()["b1"], cfg.moments()["b2"]
  for count, g in enumerate(gradients, start=1):
    if name == "adamw":
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      move = (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + 1e-8)
      v = nearest(v, False)
    else:
      move, m = np.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g
    m = nearest(m, True)
    p = p - cfg.learning_rate * (move + cfg.weight_decay * p)
  return p


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_twenty_updates_equal_the_algorithm_of_the_paper(name):
  cfg = config(
    name, state_bits=8, clip_norm=None, schedule="constant", warmup_steps=0, learning_rate=1e-2
  )
  draw = lambda seed: np.random.default_rng(seed).normal(size=(8, 1024))
  with jax.enable_x64(True):
    gradients = [{"w": jnp.asarray(draw(i))} for i in range(1, 21)]
    tx = make_optimizer(cfg, 20, {"w": MATRIX})
    got, _ = updated(tx, {"w": jnp.asarray(draw(0))}, gradients)
  want = by_hand(name, draw(0), [np.asarray(g["w"]) for g in gradients], cfg)
  # A number half-way between two values may be rounded either way.
  assert np.mean(np.abs(np.asarray(got["w"]) - want) > 1e-6) < 1e-3


def test_moments_of_matrices_take_a_quarter_and_vectors_stay_as_they_are():
  params = arrays(0, np.float32)
  bits = lambda b: make_optimizer(config("adamw", state_bits=b), 10, INFO)
  state = jax.eval_shape(bits(8).init, params)
  axes = state_axes(bits(8), params, INFO).inner[1]
  for name, (shape, names, *_) in LEAVES.items():
    mu, where = state.inner[1].mu["net"][name], axes.mu["net"][name]
    along = block_axis(INFO["net"][name], shape)
    if along is None:
      assert mu.dtype == jnp.float32 and where == names
      continue
    assert mu.codes.dtype == jnp.uint8 and where.codes == names
    assert where.scale[along] is None and len(where.scale) == len(mu.scale.shape)
    assert mu.codes.size + 4 * mu.scale.size < 1.13 * np.prod(shape), name  # Heads of width 32.
  assert isinstance(state.inner[1].mu["net"]["head"], Blocks)
  assert not isinstance(state.inner[1].nu["net"]["norm"], Blocks)


def test_settings_that_do_not_fit_are_refused():
  with pytest.raises(InputError, match="state_bits=4"):
    OptimizerConfig(state_bits=4)
  with pytest.raises(InputError, match=r"state_bits=8 .* muon"):
    OptimizerConfig(name="muon", state_bits=8)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_codes(tmp_path):
  bench, wide = Bench(tmp_path), ("--config.model.d_ff=256", "--config.optimizer.state_bits=8")
  began = time.monotonic()
  status, _, err = bench.run(tmp_path / "whole", *wide)
  assert status == 0, err
  seconds = time.monotonic() - began
  kill_and_continue(bench, tmp_path / "killed", tmp_path / "whole", seconds, 2, 0, *wide)
  assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_gpt_tiny_learns_as_much_with_8_bits(name, tmp_path):
  rate = "3e-3" if name == "adamw" else "3e-4"
  losses = {}
  for bits in (32, 8):
    workdir = tmp_path / str(bits)
    done = run(
      "train", f"--config={ROOT / 'configs' / 'gpt_tiny.py'}", f"--workdir={workdir}",
      f"--config.optimizer.name={name}", f"--config.optimizer.learning_rate={rate}",
      f"--config.optimizer.state_bits={bits}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses[bits] = [m["validation_loss"] for m in metrics(workdir) if "validation_loss" in m][-1]
  assert losses[8] <= 1.01 * losses[32], losses
  assert losses[8] != losses[32]
