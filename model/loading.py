"""A trained model as an object: loaded from any checkpoint PATH, called, and saved."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from model import checkpoint, sharding
from model.config import DTYPES, ModelConfig
from model.errors import InputError
from model.heads import abstract, unstack
from model.layers import param_info
from model.mask import positions_of
from model.tokenizer import Tokenizer

FORMATS = ("orbax",)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters and tokenizer. Pure: nothing changes when it is called."""

  config: ModelConfig
  params: dict
  tokenizer: Tokenizer | None = None
  labels: tuple[str, ...] | None = None  # Names of the classes, for heads that have them.

  @functools.cached_property
  def graphdef(self) -> nnx.GraphDef:
    """The network without parameters: `nnx.merge(m.graphdef, m.params)`."""
    return nnx.split(abstract(self.config), nnx.Param)[0]

  @functools.cached_property
  def _unstacked(self) -> tuple[nnx.GraphDef, dict]:
    graphdef = nnx.split(abstract(self.config, stacked=False), nnx.Param)[0]
    return graphdef, jax.jit(functools.partial(unstack, self.config))(self.params)

  def unstacked(self) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params) with separate arrays for each layer, which decodes faster."""
    return self._unstacked

  def __call__(
    self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:  # fmt: skip
    """Logits, compiled once for each shape.

    Args:
      tokens: ids.
      segments: from 1, 0 is nothing; tokens see their own segment only.
      positions: -1 is padding; omitted, they restart in each segment.

    Raises:
      InputError: for ids outside of the vocabulary, or positions that the model does not have.
    """
    return _logits(
      self.graphdef, self.config, self.params, *self._checked(tokens, segments, positions)
    )

  def apply(
    self, params: dict, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:  # fmt: skip
    """As calling the model, pure in `params` and traceable: for jax.grad and jax.jit."""
    return _apply(self.graphdef, self.config, params, *self._checked(tokens, segments, positions))

  def hidden(
    self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:  # fmt: skip
    """Last hidden states, behind the last norm. Arguments and errors as in calling the model."""
    return _hidden_compiled(self.graphdef, self.params, *self._checked(tokens, segments, positions))

  def _checked(self, tokens: Any, segments: Any, positions: Any) -> tuple[Any, Any, Any]:
    """The three as int32 arrays (or None); of what is traced only the shape is checked."""
    tokens = _whole_numbers("tokens", tokens, least=0)
    if segments is not None:
      segments = _whole_numbers("segments", segments, least=0)
    if positions is not None:
      positions = _whole_numbers("positions", positions, least=-1)
    for name, other in (("segments", segments), ("positions", positions)):
      if other is not None and other.shape != tokens.shape:
        raise InputError(f"{name} have shape {other.shape}, but tokens {tokens.shape}.")
    if not isinstance(tokens, Tracer) and np.max(tokens) >= self.config.real_vocab:
      raise InputError(
        f"token {np.max(tokens)} is outside of the vocabulary of {self.config.vocab_size}."
      )
    self._check_positions(tokens.shape[1], segments, positions)
    return tokens, segments, positions

  def _check_positions(self, length: int, segments: Any, positions: Any) -> None:
    limit = self.config.max_positions
    if limit is None or isinstance(positions, Tracer) or isinstance(segments, Tracer):
      return
    last = length - 1
    if positions is not None:
      last = int(np.max(positions))
    elif segments is not None:
      with jax.ensure_compile_time_eval():  # Also where only the parameters are traced.
        last = int(np.max(positions_of(jnp.asarray(segments))))
    if last >= limit:
      raise InputError(
        f"position {last} is beyond the model's max_positions={limit}: shorten the input."
      )


def _whole_numbers(name: str, values: Any, *, least: int) -> Any:
  """int32 (B, T); of a tracer only the shape and dtype are checked."""
  array = values if isinstance(values, Tracer) else np.asarray(values)
  if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
    raise InputError(
      f"{name} have shape {array.shape} and dtype {array.dtype}: whole numbers of shape (B, T), "
      "neither of them 0, are needed."
    )
  if not isinstance(array, Tracer) and array.min() < least:
    raise InputError(f"{name} hold {array.min()}, the least that they may hold is {least}.")
  return array.astype(np.int32)


def _hidden(graphdef, params, tokens, segments, positions):
  if positions is None and segments is not None:
    positions = positions_of(segments)
  elif positions is None:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  net = nnx.merge(graphdef, params)
  return net, net.hidden(tokens, positions, segments)[0]


def _apply(graphdef, cfg, params, tokens, segments, positions):
  net, x = _hidden(graphdef, params, tokens, segments, positions)
  return net.logits(x)[..., : cfg.vocab_size]


_logits = jax.jit(_apply, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def _hidden_compiled(graphdef, params, tokens, segments, positions):
  return _hidden(graphdef, params, tokens, segments, positions)[1]


def load(
  path: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None,
  ema: bool = False,
) -> Model:  # fmt: skip
  """The model at a checkpoint PATH: a workdir (newest good step), a step in it, `WORKDIR@best`.

  Args:
    dtype: of parameters and computation.
    mesh: where the parameters go, straight from disk; None: JAX's default device.
    ema: the moving average of the parameters instead of the parameters.

  Raises:
    InputError: if there is no such checkpoint, or it is damaged, or holds no average.
  """
  if dtype not in DTYPES or dtype == "auto":
    raise InputError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES[1:])}.")
  found = checkpoint.describe(str(path))
  workdir = checkpoint.resolve(str(path))[0]
  here = dict(dtype=dtype, param_dtype=dtype, remat="none", attention_kernel="auto")
  cfg = ModelConfig.from_dict({**found.meta["config"]["model"], **here})
  params = _restore(str(path), cfg, mesh, "ema" if ema else "params")
  return Model(cfg, params, Tokenizer.load(Path(workdir) / "tokenizer"))


def _restore(path: str, cfg: ModelConfig, mesh: jax.sharding.Mesh | None, part: str) -> dict:
  net = abstract(cfg)
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  if mesh is None:
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  else:
    info = param_info(net)
    where = sharding.shardings(shapes, jax.tree.map(lambda i: i.axes, info), mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  wanted = jax.tree.map(place, shapes, where)
  return checkpoint.restore_params(path, {part: wanted}, cast=True).state[part]


def save(m: Model, folder: str | Path, *, format: str = "orbax") -> None:
  """Writes a model.

  Args:
    folder: a new or empty folder.
    format: `orbax`, a workdir with config.json, tokenizer/ and checkpoints/0.

  Raises:
    InputError: for an unknown format, or a folder that holds something.
  """
  if format not in FORMATS:
    raise InputError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}.")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} holds something already: name a new or empty folder.")
  folder.mkdir(parents=True, exist_ok=True)
  meta = {"config": {"model": m.config.to_dict()}}
  (folder / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")
  if m.tokenizer is not None:
    m.tokenizer.save(folder / "tokenizer")
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(0, {"params": m.params}, meta, blocking=True)
  checkpoints.close()
