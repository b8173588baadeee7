"""Preflights of the large configs on real TPU topologies, written to docs/scale.md.

    python -m benchmarks.scale [--rows=1,4] [--write_only]

runs `python -m launch.preflight` for each row, one after the other, keeps what it reports in
benchmarks/results/scale.json and writes the page from that file. Needs the extra `tpu`, and no
TPU. A row takes one to five minutes on two idle cores.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.measure import RESULTS, commit
from train.config import Config, checked

PAGE, GIB = Path("docs/scale.md"), 2**30
STATE = ("parameter", "optimizer", "activation")


@dataclasses.dataclass(frozen=True)
class Row:
  """A config on a topology, with what is overridden there."""

  config: str
  topology: str
  slices: int = 1
  overrides: tuple[str, ...] = ()

  @property
  def command(self) -> list[str]:
    """Of the preflight."""
    slices = [f"--slices={self.slices}"] if self.slices > 1 else []
    changes = [f"--config.{change}" for change in self.overrides]
    where = [f"--config=configs/{self.config}.py", f"--topology={self.topology}"]
    return ["-m", "launch.preflight", *where, *slices, *changes]

  @property
  def devices(self) -> int:
    return math.prod(map(int, self.topology.partition(":")[2].split("x"))) * self.slices

  def settings(self) -> Config:
    """The config with its overrides."""
    config = importlib.import_module(f"configs.{self.config}").get_config()
    for change in self.overrides:
      path, _, value = change.partition("=")
      *sections, name = path.split(".")
      section: Any = config
      for part in sections:
        section = getattr(section, part)
      try:
        setattr(section, name, ast.literal_eval(value))
      except (SyntaxError, ValueError):
        setattr(section, name, value)
    return checked(config)


ROWS = (
  Row("llama3_8b", "v5e:16x16"),
  Row("llama3_8b", "v6e:8x8", overrides=("mesh.data=1", "mesh.fsdp=None", "accumulation=4")),
  Row("llama3_8b", "v5e:16x16", 4, ("mesh.slices=4", "batch_size=1024")),
  Row("llama3_70b", "v5p:8x8x8"),
  Row("llama3_70b", "v6e:16x16", overrides=("accumulation=2", "objective.loss_parts=8")),
  Row("mixtral_8x7b", "v5p:4x4x4"),
  Row("llama3_405b", "v5p:8x16x16"),
  Row("bert_large", "v5e:4x4"),
  Row("t5_base", "v5e:4x4"),
)  # fmt: skip
INTRODUCTION = """# Large configs on real topologies

Made by `python -m benchmarks.scale`: the training step of each config, compiled ahead of time by
TPU's own compiler for the devices of the row, on a machine without a TPU. Memory, FLOPs and
collectives are read from the compiled program; nothing was run on a TPU. The estimate is a
roofline: the slowest of products, memory and network at their peaks, as if each overlapped the
others wholly. A real step takes longer.

Bytes are those of one device. `FLOPs` is what the program computes over what the model needs (6ND
and causal attention): full remat computes the forward pass twice, about 1.33. Collectives: bytes
that leave a device in a step, by kind and mesh axis, where rings are used.

What the compiler made of a mesh decides more than the mesh itself:

* A slice has to be described with its rings (cubes of 4 in every dimension, v5e and v6e along 16).
  Without them a gather over the whole slice becomes a sum, of twice the bytes.
* Where `fsdp` is one ring of the torus, gathers of weights run beside the products that need them
  (async_collective_fusion), and gradients are scattered (all-reduce-scatter). Over two or three
  dimensions there is no scatter, whatever the program asks for: gradients are summed whole and
  cut, twice the bytes, over all links at once.
* `objective.loss_parts` saves the memory of scores of the vocabulary and costs network: the head is
  gathered, and its gradient summed, for each part.
"""
_NUMBERS = flags.DEFINE_list("rows", None, "Rows to compile, counted from 1; all by default.")
_WRITE_ONLY = flags.DEFINE_bool("write_only", False, "Compile nothing; write the page again.")


def main(_: list[str]) -> None:
  path = RESULTS / "scale.json"
  kept = json.loads(path.read_text())["rows"] if path.exists() else {}
  chosen = [ROWS[int(n) - 1] for n in _NUMBERS.value] if _NUMBERS.value else ROWS
  for row in () if _WRITE_ONLY.value else chosen:
    found = preflight(row)
    if found is not None:
      kept[name(row)] = found
      result = dict(rows={name(row): kept[name(row)] for row in ROWS if name(row) in kept})
      path.write_text(json.dumps(result, indent=2) + "\n")
  PAGE.write_text(page([(row, kept[name(row)]) for row in ROWS if name(row) in kept]))
  print(f"written: {PAGE}")


def name(row: Row) -> str:
  """What a row is found by, in the file of results."""
  return " ".join(row.command[2:])


def preflight(row: Row) -> dict[str, Any] | None:
  """The report of a row, with what it was made with; None where there was none."""
  print(f"compiling: python {' '.join(row.command)}", file=sys.stderr, flush=True)
  command = [sys.executable, *row.command, "--json", "--nosuggest"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode not in (0, 1) or not done.stdout.strip():
    print(done.stderr[-2000:], file=sys.stderr)
    return None
  versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
  return json.loads(done.stdout.splitlines()[-1]) | dict(commit=commit(), **versions)


def page(rows: list[tuple[Row, dict[str, Any]]]) -> str:
  """The whole of docs/scale.md."""
  made = sorted({f"jax {r['jax']}, libtpu {r['libtpu']}" for _, r in rows})
  head = "| | config | topology | mesh | batch | remat | peak of memory, GiB | FLOPs | step | MFU |"
  lines = [INTRODUCTION, f"Compiled with {'; '.join(made)}.", "", head, "|---" * 10 + "|"]
  lines += [line(i, row, report) for i, (row, report) in enumerate(rows, start=1)]
  for i, (row, report) in enumerate(rows, start=1):
    lines += ["", *details(i, row, report)]
  return "\n".join(lines) + "\n"


def line(number: int, row: Row, report: dict[str, Any]) -> str:
  """A row of the table."""
  config = row.settings()
  lengths = "+".join(str(n) for n in (config.seq_len, config.target_len) if n is not None)
  parts = f" in {config.accumulation} parts" if config.accumulation > 1 else ""
  done, fits = report["estimate"], "" if report["fits"] else " **does not fit**"
  flops = report["flops_total"]
  step, mfu = done["step_seconds"], done["mfu"]
  cells = [
    f"{number}", f"`{row.config}`", row.topology + (f" × {row.slices}" if row.slices > 1 else ""),
    mesh(row), f"{config.batch_size} × {lengths}{parts}", config.model.remat,
    f"{gib(report['peak_bytes'])} of {gib(report['memory_bytes'])}{fits}",
    "" if flops is None else f"{flops / report['model_flops_total']:.3f}",
    "" if step is None else f"{step:.2f} s", "" if mfu is None else f"{mfu:.1%}",
  ]  # fmt: skip
  return f"| {' | '.join(cells)} |"


def mesh(row: Row) -> str:
  """The axes of a row's mesh that have more than one device."""
  sizes = dataclasses.asdict(row.settings().mesh)
  known = math.prod(size for size in sizes.values() if size is not None)
  full = {axis: row.devices // known if size is None else size for axis, size in sizes.items()}
  return " × ".join(f"{axis} {size}" for axis, size in full.items() if size > 1) or "1"


def details(number: int, row: Row, report: dict[str, Any]) -> list[str]:
  """What else is known of a row."""
  lines = [f"## {number}. {row.config} on {row.topology}", "", "```"]
  lines += [f"python {' '.join(row.command)}", "```", ""]
  state = [f"{kind}s {gib(report[f'{kind}_bytes'])}" for kind in STATE]
  largest = [f"{b['name']} {gib(b['bytes'])}" for b in report["buffers"][:3]]
  lines += [f"GiB: {', '.join(state)}; the largest buffers: {', '.join(largest)}."]
  if report["collectives"]:
    lines += ["", "| collective | mesh axis | times | GiB sent |", "|---|---|---|---|"]
    lines += [f"| {c['kind']} | {c['axis']} | {c['count']:,.0f} | {gib(c['bytes'])} |"
              for c in report["collectives"] if c["bytes"] > GIB / 200]  # fmt: skip
  kernels, assumed = ", ".join(report["kernels"]), "; ".join(report["estimate"]["assumptions"])
  lines += ["", f"Kernels: {kernels or 'none'}. Assumed: {assumed}."]
  return lines


def gib(size: float | None) -> str:
  """Bytes in GiB."""
  return "?" if size is None else f"{size / GIB:,.2f}"


if __name__ == "__main__":
  app.run(main)
