"""What each method makes of one layer, from what its matrices read."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from infer.calibrate.folding import Params, Path, Site, sites
from infer.calibrate.gptq import gptq
from infer.calibrate.grid import grid_of, recoded
from infer.calibrate.reads import Forms, Read
from infer.calibrate.scales import Reader, awq_scales, error, smooth_scales
from model.config import LayerKind, ModelConfig
from model.quant import Quantized, quantize

METHODS = ("plain", "gptq", "awq", "smoothquant")


@dataclasses.dataclass(frozen=True)
class Part:
  """What became of one matrix.

  Attributes:
    name: its place, as `decoder.3.attn.q_proj`; of an expert with its number at the end.
    format: how it is kept.
    method: what chose its values; `plain` where it met no tokens, or its layer could not help it.
    tokens: that it met in calibration.
    plain_error: squared changes of its outputs beside the squares of its outputs, on what it met,
      if it were rounded plainly; None: it met nothing.
    error: the same as it is now.
  """

  name: str
  format: str
  method: str
  tokens: int
  plain_error: float | None
  error: float | None


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer's parameters as they were and as plain rounding keeps them, both flat, and what its
  matrices read.
  """

  kind: LayerKind
  params: Params
  plain: dict[Path, Any]
  reads: dict[Path, Read]

  def matrices(self, paths: Any = None) -> Iterator["Matrix"]:
    """Those that are quantized, each expert's apart."""
    for path in self.reads if paths is None else paths:
      q = self.plain.get((*path, "w"))
      if path not in self.reads or not isinstance(q, Quantized):
        continue
      for expert in range(len(q.values)) if q.lead else [None]:
        yield Matrix(self, path, expert)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """One of them."""

  layer: Layer
  path: Path
  expert: int | None

  def own(self, tree: Any) -> Any:
    """Its part of what has a leading axis of experts."""
    return tree if self.expert is None else jax.tree.map(lambda a: a[self.expert], tree)

  @property
  def plain(self) -> Quantized:
    return self.own(self.layer.plain[(*self.path, "w")])

  @property
  def read(self) -> Read:
    return self.own(self.layer.reads[self.path])

  def flat(self, params: Params) -> jax.Array:
    """(I, O), float32, of some parameters of the layer."""
    w = self.own(params[(*self.path, "w")]).astype(jnp.float32)
    return w.reshape(math.prod(self.plain.inputs), -1)

  def values(self, q: Quantized) -> jax.Array:
    """(I, O) of a quantized form of it."""
    return q.dequantize().reshape(math.prod(q.inputs), -1)

  def part(self, q: Quantized, scaled: jax.Array | None, method: str) -> Part:
    """What is told of it, kept as `q`, whose values are `scaled` times what they stand for."""
    w, read = self.flat(self.layer.params), self.read
    name = ".".join(self.path) + ("" if self.expert is None else f".{self.expert}")
    if float(read.tokens) == 0:
      return Part(name, q.format.name, "plain", 0, None, None)
    whole = float(jnp.sum(w * jnp.matmul(read.gram, w, precision="highest")))
    off = lambda values: float(error(w, values, read.gram)) / whole if whole else 0.0
    now = self.values(q) if scaled is None else self.values(q) / scaled
    plain = off(self.values(self.plain))
    return Part(name, q.format.name, method, int(read.tokens), plain, off(now))


@dataclasses.dataclass(frozen=True)
class Made:
  """A layer's parameters with quantized matrices, flat, and what became of each.

  `times` is what its parameters were multiplied by beforehand; None: by nothing.
  """

  params: dict[Path, Any]
  parts: list[Part]
  times: Params | None = None

  def forms(self, layer: Layer) -> dict[Path, Forms]:
    """The matrices that round what they read."""
    found = {}
    for m in layer.matrices():
      q = self.params[(*m.path, "w")]
      if m.expert is None and q.format.dynamic:
        w = m.flat(layer.params)
        times = jnp.ones_like(w) if self.times is None else m.flat(self.times)
        found[m.path] = Forms(w, m.plain, q, times[:, 0], times[0, 0] / times[0])
    return found

  def with_errors(self, sums: dict[Path, Any]) -> "Made":
    """With errors from `reads.changes` where they were measured."""
    parts = []
    for part in self.parts:
      found = sums.get(tuple(part.name.split(".")))
      if found is not None and found[0] > 0:
        errors = dict(plain_error=float(found[1] / found[0]), error=float(found[2] / found[0]))
        part = dataclasses.replace(part, **errors)
      parts.append(part)
    return dataclasses.replace(self, parts=parts)


def plainly(cfg: ModelConfig, layer: Layer) -> Made:
  """The layer rounded to the nearest values."""
  return Made(layer.plain, [m.part(m.plain, None, "plain") for m in layer.matrices()])


def by_gptq(cfg: ModelConfig, layer: Layer) -> Made:
  """The layer with the values that GPTQ chooses."""
  made, parts, experts = dict(layer.plain), [], {}
  for matrix in layer.matrices():
    q, path = matrix.plain, (*matrix.path, "w")
    if float(matrix.read.tokens) > 0:
      w = matrix.flat(layer.params)
      values = gptq(w, matrix.read.gram, q.format.kind, grid_of(q))
      q = recoded(q, values)
    parts.append(matrix.part(q, None, "gptq"))
    if matrix.expert is None:
      made[path] = q
    else:
      experts.setdefault(path, []).append(q)
  stacked = {path: jax.tree.map(lambda *a: jnp.stack(a), *all) for path, all in experts.items()}
  return Made(made | stacked, parts)


def by_awq(cfg: ModelConfig, layer: Layer) -> Made:
  """The layer with its channels scaled as AWQ does, rounded plainly."""

  def scales(site: Site, matrices: list[Matrix], params: Params) -> jax.Array:
    readers = [Reader(m.flat(params), m.read.gram, m.plain.format) for m in matrices]
    total = functools.reduce(jnp.add, (m.read.total for m in matrices))
    mean = total / sum(float(m.read.tokens) for m in matrices)
    return awq_scales(readers, mean, site.channel)

  return _scaled(cfg, layer, "awq", scales)


def by_smoothquant(cfg: ModelConfig, layer: Layer, strength: float) -> Made:
  """The layer with its channels scaled as SmoothQuant does, rounded plainly."""

  def scales(site: Site, matrices: list[Matrix], params: Params) -> jax.Array:
    largest = jnp.max(jnp.stack([m.read.largest for m in matrices]), axis=0)
    return smooth_scales([m.flat(params) for m in matrices], largest, site.channel, strength)

  return _scaled(cfg, layer, "smoothquant", scales)


def _scaled(cfg: ModelConfig, layer: Layer, method: str, scales: Callable) -> Made:
  params = layer.params
  times = {path: jnp.ones(a.shape) for path, a in params.items()}
  touched = set()
  for site in sites(cfg, layer.kind, {path: a.shape for path, a in params.items()}):
    matrices = [m for m in layer.matrices(site.readers) if site.expert in (None, m.expert)]
    matrices = [m for m in matrices if float(m.read.tokens) > 0]
    if not matrices:
      continue
    found = scales(site, matrices, params)
    params, times = site.folded(params, found), site.folded(times, found)
    touched |= {(m.path, m.expert) for m in matrices}
  made = {path: _as(layer.plain[path], a) for path, a in params.items()}
  parts = []
  for m in layer.matrices():
    q = m.own(made[(*m.path, "w")])
    how = method if (m.path, m.expert) in touched else "plain"
    parts.append(m.part(q, m.flat(times), how))
  return Made(made, parts, times)


def _as(plain: Any, a: jax.Array) -> Any:
  """A parameter kept as `plain` is."""
  if not isinstance(plain, Quantized):
    return a
  return quantize(a, plain.format, inputs=len(plain.inputs), lead=len(plain.lead))
