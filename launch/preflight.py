"""Whether a run fits its devices, and what it does there, without them.

    python -m launch.preflight --config=configs/X.py --topology=v5p:4x4x4 [--slices=N] [--json]

compiles the very step that training runs and prints what a device holds, what a step computes,
moves and sends, and how long it takes at best. Status 0: it fits; 1: it does not; 2: wrong input.
"""

import dataclasses
import json
import math
import sys

from absl import flags

from model.errors import DONE, InputError
from train.flags import config_flag, run

_CONFIG = config_flag()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v4:4x4x4, v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4 (any sizes), cpu:N, local."
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of this topology.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of the table.")
_SEARCH = flags.DEFINE_bool(
  "search", False, "Compile other meshes, remat and parts of a batch, and print the best few."
)
_TRIES = flags.DEFINE_integer("search_tries", 12, "Programs that --search compiles at most.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for a change that fits where a run does not.")
_MEMORY = flags.DEFINE_float("memory_gib", None, "Memory of a device in GiB, in place of its own.")
DOES_NOT_FIT = 1


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is no flag: settings are written --config.name=value.")
  if not _TOPOLOGY.value:
    raise InputError("--topology is missing: name one, for example v5p:4x4x4, cpu:8 or local.")
  if _MEMORY.value is not None and not 0 < _MEMORY.value < math.inf:
    raise InputError(f"--memory_gib={_MEMORY.value} must be positive and finite.")
  if _TRIES.value < 1:
    raise InputError(f"--search_tries={_TRIES.value} must be at least 1.")
  config = _CONFIG.value
  from launch.topologies import devices_of

  devices = devices_of(_TOPOLOGY.value, _SLICES.value)
  return preflight(_for_devices(config, devices, _SLICES.value), devices)


def preflight(config, devices: list) -> int:
  """Reports on a config that `_for_devices` has prepared; returns the exit status."""
  from model.sharding import make_mesh
  from train.analysis.attempt import attempt
  from train.analysis.report import device_memory
  from train.analysis.search import best
  from train.analysis.variants import fitting

  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  memory = device_memory(mesh) if _MEMORY.value is None else round(_MEMORY.value * 2**30)
  tried = lambda c: _told(attempt(c, devices, memory))
  report, changed = attempt(config, devices, memory), None
  found = best(config, devices, memory, tried, _TRIES.value) if _SEARCH.value else []
  if report.fits is False and memory is not None and (found or _SUGGEST.value):
    if found:
      suggestion = found[0].flags
    else:
      suggestion, changed = fitting(config, devices, memory, report, tried)
    report = dataclasses.replace(report, suggestions=(suggestion,))
  _print(report, changed, found)
  return DOES_NOT_FIT if report.fits is False else DONE


def _print(report, changed, found: list) -> None:
  """The report, that of the change which fits, and what a search has found."""
  if _JSON.value:
    values = report.values()
    values |= {} if changed is None else {"suggested": changed.values()}
    values |= {"search": [f.values() for f in found]} if _SEARCH.value else {}
    print(json.dumps(values))
    return
  lines = report.lines()
  lines += [] if changed is None else ["", "with that change:", *changed.lines()]
  if _SEARCH.value:
    lines += ["", "the best found" if found else "nothing that was tried fits"]
    lines += [f"  {f.line()}" for f in found]
  print("\n".join(lines))


def _told(report):
  """Says on stderr what has been compiled: each takes minutes for large models."""
  state = {True: "fits", False: "does not fit", None: "compiled"}[report.fits]
  print(f"tried: {report.title}: {state}", file=sys.stderr, flush=True)
  return report


def _for_devices(config, devices: list, slices: int):
  """The config for devices that are not here: their dtype, the slices, what data would decide."""
  from train.analysis.described import described

  config = described(config)
  if devices[0].platform != "cpu" and config.model.dtype == "auto":
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
  if slices > 1 and config.mesh.slices == 1:
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
  return config


if __name__ == "__main__":
  run(main)
