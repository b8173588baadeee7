"""What an adapter's run takes is known without its base."""

import json

import pytest

from tests.commands import run
from tests.launch.test_preflight import needs_libtpu

GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["cpu:1", pytest.param("v5e:1x1", marks=needs_libtpu)])
def test_8_billion_parameters_in_nf4_are_adapted_within_8_gib(topology):
  done = run(
    "launch.preflight", "--config=configs/qlora_llama3_8b.py", f"--topology={topology}", "--json",
    "--memory_gib=8", "--suggest=False",
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  told = json.loads(done.stdout.splitlines()[-1])
  assert told["tokens_per_step"] == 2048 and told["parameters_total"] == 8_030_261_248
  assert told["fits"] and told["peak_bytes"] <= 8 * GIB
  assert 4 * GIB < told["parameter_bytes"] < 4.6 * GIB
  adapters = 41_943_040
  assert abs(told["optimizer_bytes"] - 2 * 4 * adapters) < 1000
