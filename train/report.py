"""What a person sees on stderr: the run before its first step, and a line of progress."""

import dataclasses
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from model.flops import matmul_params
from model.hardware import hardware, peak_flops
from model.layers import ParamInfo
from model.pipeline import plan
from model.quant import Quantized
from model.quant_tree import resident_bytes
from train.config import Config
from train.data.pipeline import Data
from train.program import Program

PARTS: tuple[str, ...] = (
  "token embedding", "position embedding", "type embedding", "attention", "MLP", "experts",
  "norms", "head", "adapters", "generator", "other",
)  # fmt: skip
PLAIN_SECONDS = 15.0  # Between lines where the output is no terminal.
REDRAW_SECONDS = 0.1


def before(config: Config, program: Program, data: Data, mesh: Mesh, start: int) -> None:
  """Prints what is about to run, from process 0."""
  if jax.process_index() == 0:
    text = "\n".join(
      [*config_lines(config), "", *parameter_lines(config, program), "",
       *run_lines(config, program, data, mesh, start)]
    )  # fmt: skip
    print(text, file=sys.stderr, flush=True)


def config_lines(config: Any, name: str = "config") -> list[str]:
  """The resolved config: a paragraph for each section, `field=value` for each field."""
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  flat = [f"{k}={v!r}" for k, v in values.items() if not dataclasses.is_dataclass(v)]
  fields = textwrap.wrap(
    "  ".join(f.replace(" ", "\0") for f in flat), 98, break_long_words=False,
    break_on_hyphens=False,
  )  # fmt: skip
  lines = [name, *("  " + line.replace("\0", " ") for line in fields)]
  for section, value in values.items():
    if dataclasses.is_dataclass(value):
      lines += config_lines(value, f"{name}.{section}")
  return lines


def parameter_lines(config: Config, program: Program) -> list[str]:
  """A table of the parameters by part: how many, their share and their bytes in memory.

  Bytes include the padding of the vocabulary; counts do not.
  """
  counts, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
  totals = {"trained": [0, 0], "frozen": [0, 0]}
  infos = dict(_leaves(program.info))
  for kind, tree in (("trained", program.state.params), ("frozen", program.state.frozen)):
    for path, leaf in _leaves(tree):
      part, size = _part(path, infos[path]), resident_bytes(leaf)
      count = infos[path].count(leaf.shape, config.model.real_vocab)
      counts[part], sizes[part] = counts[part] + count, sizes[part] + size
      totals[kind] = [totals[kind][0] + count, totals[kind][1] + size]
  everything = sum(counts.values())
  row = lambda name, count, size: (
    f"  {name:<20}{count:>20,}{_share(count / everything):>8}{byte_text(size):>12}"
  )
  lines = [f"  {'parameters':<20}{'count':>20}{'share':>8}{'memory':>12}"]
  lines += [row(part, counts[part], sizes[part]) for part in PARTS if counts[part]]
  shown = [kind for kind in totals if totals[kind][0]]
  lines += [row(kind, *totals[kind]) for kind in shown]
  if len(shown) > 1:
    lines.append(row("total", everything, sum(sizes.values())))
  if config.model.num_experts:
    lines.append(
      f"  each token is multiplied with {sum(matmul_params(config.model).values()):,.0f} of them"
    )
  return lines


def _share(part: float) -> str:
  """As per cent; a small one, such as an adapter's, with a further digit."""
  return f"{part:.2%}" if 0 < part < 0.01 else f"{part:.1%}"


def run_lines(config: Config, program: Program, data: Data, mesh: Mesh, start: int) -> list[str]:
  """Mesh, device and its peak, tokens per step, data, memory, and where the run begins."""
  axes = mesh_text(mesh)
  kind = mesh.devices.flat[0].device_kind
  lengths = [n for n in (config.seq_len, config.target_len) if n is not None]
  tokens = config.batch_size * sum(lengths)
  parts = f" in {config.accumulation} parts" if config.accumulation > 1 else ""
  began = time.perf_counter()
  memory = memory_text(program.train_step, kind)
  seconds = time.perf_counter() - began
  rows = {
    "mesh": f"{axes} ({_count_text(mesh.size, 'device')}, "
    + f"{_count_text(jax.process_count(), 'process')})",
    "device": f"{kind}, {_peak_text(kind, str(config.model.compute_dtype))}",
    "step": f"{config.batch_size} x {' + '.join(map(str, lengths))} = {tokens:,} tokens{parts}",
    "data": _data_text(config, data),
    "validation": f"{data.validation_tokens:,} tokens in {data.num_validation_batches:,} batches",
    "vocabulary": f"{data.tokenizer.vocab_size:,} tokens",
    "memory": memory,
    "compiled": f"in {seconds:.1f} s",
    "steps": f"{start:,} of {config.steps:,} done"
    + (", continuing" if 0 < start < config.steps else ""),
  }
  schedule = plan(config.model, mesh, config.batch_size // config.accumulation)
  if schedule is not None:
    rows["pipeline"] = (
      f"{schedule.stages} stages, {schedule.parts} micro-batches, {schedule.ticks} ticks, of which "
      f"a stage is idle {schedule.bubble:.0%}"
    )
  return [f"  {name:<12}{text}" for name, text in rows.items()]


def mesh_text(mesh: Mesh) -> str:
  """The axes of a mesh that are longer than one device."""
  return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "1"


def memory_text(step: jax.stages.Compiled, device_kind: str) -> str:
  """What the compiled step needs on each device, by the compiler's own analysis."""
  sizes = program_bytes(step, device_kind)
  if sizes is None:
    return "not known: this backend does not analyse its programs"
  held, temporary = sizes
  entry = hardware(device_kind)
  limit = "" if entry is None else f" of {byte_text(entry.memory_bytes)}"
  return (
    f"{byte_text(held + temporary)}{limit} a device: {byte_text(held)} state and batch, "
    f"{byte_text(temporary)} temporary"
  )


def program_bytes(step: jax.stages.Compiled, device_kind: str) -> tuple[int, int] | None:
  """(state and batch, temporaries) of a device at the fullest moment, by the compiler's account.

  For TPUs its peak is right: the sum of temporaries there counts some memory twice. Elsewhere its
  peak leaves temporaries out, and their sum is right. None: the backend does not tell.
  """
  stats = step.memory_analysis()
  if stats is None:
    return None
  held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  if device_kind.upper().startswith("TPU"):
    return held, stats.peak_memory_in_bytes - held
  return held, stats.temp_size_in_bytes


def byte_text(size: float) -> str:
  """Bytes in the unit that a person reads: '1.2 GiB'."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if size < 1024:
      return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:.1f} TiB"


class Progress:
  """One line that is redrawn on a terminal; elsewhere plain lines, at intervals."""

  def __init__(
    self, total: int, start: int, stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):  # fmt: skip
    self._stream, self._clock = sys.stderr if stream is None else stream, clock
    self._total, self._start, self._began = total, start, clock()
    self._terminal = self._stream.isatty()
    self._shown = -math.inf  # When a line was last shown.
    self._line, self._validation, self._rest = "", "", ""

  def step(self, step: int, loss: float, tokens_per_second: float, mfu: float | None) -> None:
    """Shows where the run is; `mfu` None means that the device is not in the table."""
    left = (self._total - step) * (self._clock() - self._began) / max(1, step - self._start)
    utilization = "unknown device" if mfu is None else f"MFU {mfu:.1%}"
    self._line = f"step {step:,}/{self._total:,}  loss {loss:.4f}"
    self._rest = f"  {tokens_per_second:,.0f} tokens/s  {_time_text(left)} left  {utilization}"
    due = self._clock() - self._shown >= (REDRAW_SECONDS if self._terminal else PLAIN_SECONDS)
    if due or step == self._total:
      self._show()

  def validation(self, step: int, loss: float) -> None:
    """Shows a validation loss, and keeps it in the line."""
    self._validation = f"  val {loss:.4f}"
    if self._terminal:
      self._show()
    else:
      self._write(f"step {step:,}/{self._total:,}  validation loss {loss:.4f}\n")

  def close(self) -> None:
    """Leaves the last line on the terminal."""
    if self._terminal and self._line:
      self._show()
      self._write("\n")

  def _show(self) -> None:
    self._shown = self._clock()
    line = self._line + self._validation + self._rest
    columns = shutil.get_terminal_size().columns
    self._write(f"\r\x1b[K{line[: columns - 1]}" if self._terminal else line + "\n")

  def _write(self, text: str) -> None:
    self._stream.write(text)
    self._stream.flush()


def _time_text(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _peak_text(kind: str, dtype: str) -> str:
  peak = peak_flops(kind, dtype)
  if peak is None:
    return "unknown device: its peak and the MFU are not known"
  return f"peak {peak / 1e12:,.0f} TFLOP/s in {dtype} each"


def _data_text(config: Config, data: Data) -> str:
  epochs = config.steps * config.batch_size / max(1, data.rows_per_epoch)
  text = (
    f"{config.data.source}: {data.tokens_per_epoch:,} tokens in {data.rows_per_epoch:,} rows, "
    f"read {epochs:.2f} times"
  )
  if data.truncated_documents:
    text += f"; {data.truncated_tokens:,} of {data.truncated_documents:,} documents are cut off"
  if data.dropped_documents:
    text += f"; {data.dropped_documents:,} documents are too long and left out"
  return text


def _count_text(count: int, noun: str) -> str:
  return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def _leaves(tree: dict) -> list[tuple[tuple[str, ...], Any]]:
  whole = lambda leaf: isinstance(leaf, Quantized)
  flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)[0]
  return [(tuple(str(k.key) for k in path), leaf) for path, leaf in flat]


def _part(path: tuple[str, ...], info: ParamInfo) -> str:
  """The part of the model that a parameter belongs to."""
  if path[0] == "generator":
    return "generator"
  if "adapter" in path:
    return "adapters"
  if "attn" in path or "cross_attn" in path:
    return "attention"
  if "mlp" in path:
    return "experts" if "expert" in info.axes or "shared" in path else "MLP"
  if any("norm" in name for name in path):
    return "norms"
  named = {
    "embed": "token embedding", "position_embed": "position embedding",
    "relative_bias": "position embedding", "type_embed": "type embedding", "head": "head",
    "pair": "head",
  }  # fmt: skip
  return next((part for name, part in named.items() if name in path), "other")
