"""The table of compiler flags: joined with the user's own, documented, known to the compilers."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch.xla_flags import TABLE, VARIABLES, xla_environment
from tests.commands import ROOT


def test_what_a_user_sets_wins_and_is_kept():
  first = TABLE["tpu"][0].name
  own = {"LIBTPU_INIT_ARGS": f"--mine=3 {first}=false"}
  words = xla_environment("tpu", own)["LIBTPU_INIT_ARGS"].split()
  assert words[-2:] == own["LIBTPU_INIT_ARGS"].split()
  assert [w for w in words if w.startswith(first + "=")] == [f"{first}=false"]
  assert words[:-2] == [f"{flag.name}={flag.value}" for flag in TABLE["tpu"][1:]]
  assert xla_environment("tpu", own, table=False) == {}
  assert xla_environment("cpu", {}, 4, table=False) == {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4"
  }


def test_the_table_is_documented():
  text = (ROOT / "docs" / "launch.md").read_text()
  for kind, flags in TABLE.items():
    assert VARIABLES[kind] in text
    for flag in flags:
      assert f"`{flag.name}={flag.value}`" in text, flag.name
      assert flag.text.startswith(flag.text[0].upper()) and flag.source


def starts(variable: str, words: str, code: str) -> bool:
  environment = {**os.environ, variable: words, "JAX_PLATFORMS": "cpu"}
  words = [sys.executable, "-c", code]
  return subprocess.run(words, env=environment, capture_output=True).returncode == 0


@pytest.mark.slow
def test_jaxlib_knows_the_flags():
  known = " ".join(f"{f.name}={f.value}" for f in (*TABLE["cpu"], *TABLE["gpu"]))
  assert starts("XLA_FLAGS", known, "import jax; jax.devices()")
  assert not starts("XLA_FLAGS", f"{known} --xla_nonsense=1", "import jax; jax.devices()")


@pytest.mark.slow
def test_libtpu_knows_the_flags():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
  code = (
    "import os; os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')\n"
    "from jax.experimental import topologies\n"
    "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
  )
  known = " ".join(f"{f.name}={f.value}" for f in TABLE["tpu"])
  assert starts("LIBTPU_INIT_ARGS", known, code)
  assert not starts("LIBTPU_INIT_ARGS", f"{known} --xla_tpu_nonsense=1", code)
