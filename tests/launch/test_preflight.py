"""The command says whether a run fits, and what would make it fit does."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from configs.gpt_small import get_config as gpt_small
from configs.gpt_tiny import get_config
from launch.topologies import devices_of
from model.errors import InputError
from model.sharding import make_mesh
from tests.commands import run
from train.analysis.attempt import attempt
from train.analysis.described import described
from train.analysis.report import device_memory
from train.analysis.variants import fitting
from train.config import Config, DataConfig, MeshConfig, ObjectiveConfig

TINY = dict(num_layers=1, d_model=64, d_ff=128, vocab_size=512)
SMALL = (
  "--config=configs/gpt_tiny.py", "--topology=cpu:8", "--json", "--config.batch_size=64",
  *(f"--config.model.{name}={size}" for name, size in TINY.items()),
)  # fmt: skip
CONTRACT = {
  "fits", "peak_bytes", "memory_bytes", "parameter_bytes", "optimizer_bytes", "activation_bytes",
  "parameters_total", "flops_total", "model_flops_total", "tokens_per_step", "bytes_accessed",
  "collectives", "buffers", "estimate", "suggestions",
}  # fmt: skip
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs TPU's compiler: pip install '.[tpu]'"
)


def small() -> Config:
  config = get_config()
  return dataclasses.replace(config, batch_size=64, model=dataclasses.replace(config.model, **TINY))


def changed(config: Config, words: list[str]) -> Config:
  """The config with the flags of a suggestion."""
  for word in words:
    path, _, value = word.removeprefix("--config.").partition("=")
    *section, name = path.split(".")
    value = int(value) if value.isdigit() else value
    inner = dataclasses.replace(getattr(config, section[0]), **{name: value}) if section else value
    config = dataclasses.replace(config, **{section[0] if section else name: inner})
  return config


def preflight(*arguments: str):
  return run("launch.preflight", *arguments)


def values(done) -> dict:
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_change_that_then_fits():
  config = dataclasses.replace(described(small()), mesh=MeshConfig(data=8))
  whole = attempt(config, jax.devices(), None)
  memory = round(0.5 * (whole.peak_bytes or 0))
  refused = preflight(*SMALL, f"--memory_gib={memory / 2**30}")
  assert refused.returncode == 1, refused.stderr
  told = values(refused)
  assert set(told) >= CONTRACT and told["fits"] is False and told["memory_bytes"] == memory
  assert told["peak_bytes"] == whole.peak_bytes
  assert told["parameter_bytes"] == 4 * told["parameters_total"]  # Each device has all of them.
  assert told["parameters_total"] == config.model.num_params()
  changes = [word for word in told["suggestions"][0].split() if word.startswith("--config.")]
  assert attempt(changed(config, changes), jax.devices(), memory).fits


@pytest.mark.slow
def test_the_search_gives_configs_that_fit_the_fastest_first():
  done = preflight(*SMALL, "--search", "--search_tries=4")
  found = values(done)["search"]
  assert 1 <= len(found) <= 4
  first = found[0]["flags"].split()
  again = preflight(*SMALL, *[word for word in first if word.startswith("--")])
  assert values(again)["peak_bytes"] == found[0]["peak_bytes"]


@pytest.mark.slow
def test_the_table_names_memory_work_and_collectives():
  shown = [a for a in SMALL if a != "--json"]
  done = preflight(*shown, "--config.mesh.fsdp=4", "--config.mesh.data=2")
  for words in ("parameters", "optimizer", "peak", "compiled FLOPs", "all-gather", "fsdp", "fits"):
    assert words in done.stdout, done.stdout


WRONG = {
  "v5p": "a v5p slice has 3 dimensions",
  "v5p:4x4": "a v5p slice has 3 dimensions",
  "v5e:4xfour": "a v5e slice has 2 dimensions",
  "v5e:32x32": "at most 16 chips",
  "v9:4x4": "is not known",
  "v5x:4x4": "Did you mean 'v5p' or 'v5e'|Did you mean 'v5e' or 'v5p'",
  "cpu": "write cpu:N",
  "cpu:0": "write cpu:N",
  "gpu:8": "is not known",
}


@pytest.mark.parametrize(("topology", "told"), WRONG.items())
def test_a_wrong_topology_is_one_error_that_says_what_is_known(topology, told):
  with pytest.raises(InputError, match=told):
    devices_of(topology, 1)


def test_no_or_needless_slices_are_refused():
  with pytest.raises(InputError, match="at least 1"):
    devices_of("cpu:8", 0)
  with pytest.raises(InputError, match="no effect"):
    devices_of("local", 2)


def test_what_only_the_data_knows_must_be_given():
  plain = Config(data=DataConfig(tokenizer="bpe:4096"))
  assert described(plain).model.vocab_size == 4096
  assert described(Config(data=DataConfig(tokenizer="bytes"))).model.real_vocab >= 256
  with pytest.raises(InputError, match=r"--config\.model\.vocab_size=N"):
    described(Config(data=DataConfig(tokenizer="char")))
  task = Config(objective=ObjectiveConfig(name="classification"), data=DataConfig(label="y"))
  with pytest.raises(InputError, match=r"--config\.model\.num_labels=N"):
    described(task)


@pytest.mark.slow
def test_wrong_input_ends_with_one_line_and_status_2():
  cases = {
    ("--config=configs/gpt_tiny.py",): "--topology is missing",
    (*SMALL, "--memory_gib=0"): "must be positive",
    (*SMALL, "--memory_gib=inf"): "must be positive and finite",
    (*SMALL, "extra"): "is no flag",
    (*SMALL, "--config.mesh.fsdp=3"): "does not fit 8 devices",
    (*SMALL, "--config.batch_size=3"): "is not a multiple of the 8 parts",
  }
  for arguments, told in cases.items():
    done = preflight(*arguments)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr


V5E = (
  "--config=configs/gpt_small.py", "--topology=v5e:2x2", "--json", "--config.mesh.fsdp=4",
  "--config.model.num_layers=4", "--config.model.vocab_size=2048", "--config.model.remat=none",
)  # fmt: skip


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_program_runs_splash_attention_and_a_suggestion_for_it_fits():
  config = dataclasses.replace(tpu_config(), batch_size=1024)
  devices = devices_of("v5e:2x2", 1)
  memory = device_memory(make_mesh(fsdp=4, devices=devices))
  assert memory == 15.75 * 2**30
  tried = lambda c: attempt(c, devices, memory)
  refused = tried(config)
  assert refused.fits is False
  suggestion, report = fitting(config, devices, memory, refused, tried)
  assert suggestion.startswith("--config.model.remat=") and report is not None and report.fits
  assert any("splash_mha_fwd" in name for name in report.done.kernels)
  assert any("splash_mha_dkv" in name for name in report.done.kernels)
  assert {c.axis for c in report.crossing} == {"fsdp"}
  assert 0 < report.estimate.mfu < 1
  # All but biases and scales is split four ways.
  assert report.state.parameters == pytest.approx(config.model.num_params(), rel=5e-3)


@needs_libtpu
@pytest.mark.slow
def test_on_a_tpu_skipped_blocks_are_not_counted_and_buffers_add_up_to_the_peak():
  config = tpu_config()
  report = attempt(config, devices_of("v5e:2x2", 1), None)
  rows, layers, width, length = 64 / 4, 4, 768, 1024
  visited = 3 / 4  # Of the blocks of 512 x 512 one is above the diagonal.
  scores = 2 * rows * length**2 * width * layers * visited
  kernels = report.done.kernels
  assert kernels["splash_mha_fwd_segmented_residuals"] == 2 * scores
  back = 5 * scores / visited  # Its blocks of 512 x 1,024 all see something.
  assert kernels["splash_mha_dkv_segmented_no_residuals"] == back
  weights = layers * 12 * width**2 + 2048 * width
  assert report.done.flops == 6 * rows * length * weights + 2 * scores + back
  assert sum(b.bytes for b in report.buffers) == pytest.approx(report.peak_bytes, rel=0.1)


def tpu_config() -> Config:
  config = described(gpt_small())
  model = dataclasses.replace(
    config.model, num_layers=4, vocab_size=2048, dtype="bfloat16", remat="none"
  )
  return dataclasses.replace(config, batch_size=64, model=model, mesh=MeshConfig(fsdp=4))


@needs_libtpu
@pytest.mark.slow
def test_slices_are_joined_by_the_outermost_axis():
  done = preflight(
    *V5E, "--slices=2", "--config.batch_size=32", "--config.mesh.data=None",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  told = values(done)
  assert any("slices" in c["axis"] for c in told["collectives"])
  assert any("network between hosts" in a for a in told["estimate"]["assumptions"])
