"""New adapters for a model: where they go, and what they begin as."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.config import ModelConfig
from model.errors import InputError
from model.layers import Embed
from model.moe import ExpertMatrix
from model.peft.attach import KEY, Owner, owners
from model.peft.bottleneck import Place, places
from model.peft.config import BOTTLENECKS, LOW_RANK, VIRTUAL, PeftConfig
from model.peft.create_virtual import check_virtual, new_virtual
from model.peft.lora import begin, magnitude, sides
from model.peft.names import Names, Path, any_matches, check_used, matches
from model.quant import Quantized

IA3_TARGETS = ("k_proj", "v_proj", "mlp.down_proj")  # Where a model has them.
READS = "mlp.down_proj"  # Of these IA3 scales what they read.


@dataclasses.dataclass(frozen=True)
class Site:
  """A module that gets an adapter: axes of stacked layers and experts, inputs, outputs, rank."""

  path: Path
  stacked: tuple[int, ...]
  experts: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  table: bool  # A table of vectors.
  rank: int
  scale: float
  rows: tuple[int, ...] | None  # Layers of the stack that are adapted; None: all.

  @property
  def lead(self) -> tuple[int, ...]:
    """Stacked layers and experts."""
    return self.stacked + self.experts

  @property
  def weight(self) -> Path:
    """Path of what is adapted."""
    return (*self.path, "table" if self.table else "w")


def scale_of(alpha: float | None, rank: int, *, rslora: bool) -> float:
  """What an update of this rank is multiplied by."""
  alpha = rank if alpha is None else alpha
  return alpha / math.sqrt(rank) if rslora else alpha / rank


def sites(config: PeftConfig, model: ModelConfig, net: nnx.Module) -> list[Site | Place]:
  """Where the adapters of `config` go in `net`, which may be abstract.

  Raises:
    InputError: for a pattern that matches nothing, what the method cannot adapt, or ranks that
      differ among layers that are stacked.
  """
  if config.method in BOTTLENECKS:
    return [*places(config, model, net)]
  names, all_owners = Names(model), list(owners(net))
  known = [name for path, _ in all_owners for name in names.of(path)]
  for field in ("targets", "ranks", "alphas"):
    given = config.targets if field == "targets" else [p for p, _ in config.numbers(field)]
    check_used(field, given, known)
  found = []
  for path, owner in all_owners:
    own = names.of(path)
    taken = [i for i, name in enumerate(own) if _wanted(config, name, path, owner)]
    if taken:
      _check_kind(config, own[taken[0]], owner)
      rows = None if len(taken) == len(own) else tuple(taken)
      found.append(_site(config, path, owner, [own[i] for i in taken], rows))
  if not found:
    raise InputError(f"peft.method={config.method!r} finds nothing to adapt: set peft.targets.")
  _check_dropout(config, found)
  chosen = [name for site in found for name in names.of(site.path)]
  for field in ("ranks", "alphas"):
    check_used(field, [p for p, _ in config.numbers(field)], chosen)
  return [*found]


def _wanted(config: PeftConfig, name: str, path: Path, owner: Owner) -> bool:
  if config.targets:
    return any_matches(config.targets, name)
  if config.method == "ia3":
    return any_matches(IA3_TARGETS, name) and not isinstance(owner, ExpertMatrix)
  return "layers" in path and not isinstance(owner, Embed)


def _check_kind(config: PeftConfig, name: str, owner: Owner) -> None:
  what = "a table of vectors" if isinstance(owner, Embed) else (
    "experts" if isinstance(owner, ExpertMatrix) else None
  )  # fmt: skip
  if what is not None and config.method != "lora":
    raise InputError(
      f"peft.method={config.method!r} does not adapt {what} ({name}): use lora, or other "
      "peft.targets."
    )


def _check_dropout(config: PeftConfig, found: list[Site]) -> None:
  deaf = [site for site in found if site.table or site.experts]
  if config.dropout and deaf:
    name = ".".join(map(str, deaf[0].path))
    raise InputError(
      f"peft.dropout={config.dropout} has no effect on tables and experts ({name}): set it to 0, "
      "or leave them out of peft.targets."
    )


def _site(config: PeftConfig, path: Path, owner: Owner, names: list[str], rows) -> Site:
  ranks = {_of(config, "ranks", config.rank, name) for name in names}
  alphas = {_of(config, "alphas", config.alpha, name) for name in names}
  if len(ranks) > 1 or len(alphas) > 1:
    what, values = ("ranks", ranks) if len(ranks) > 1 else ("alphas", alphas)
    raise InputError(
      f"peft.{what} gives {names[0]} to {names[-1]} the {what} "
      f"{', '.join(sorted(map(str, values)))}: equal layers are one stack and have one of them. "
      "Leave the number of the layer out of the pattern."
    )
  rank = int(ranks.pop() or config.rank)
  weight = owner.table if isinstance(owner, Embed) else owner.w
  experts, inputs, outputs = map(len, sides(owner))
  shape = tuple(weight.shape)
  stacked = len(shape) - experts - inputs - outputs
  cut = lambda a, n: shape[a : a + n]
  site = Site(
    path, cut(0, stacked), cut(stacked, experts), cut(stacked + experts, inputs),
    cut(stacked + experts + inputs, outputs), isinstance(owner, Embed), rank,
    scale_of(alphas.pop(), rank, rslora=config.rslora), rows,
  )  # fmt: skip
  if config.method in LOW_RANK:
    _check_rank(config, site, names[0])
  return site


def _of(config: PeftConfig, field: str, default: float | None, name: str) -> float | None:
  return next((n for p, n in reversed(config.numbers(field)) if matches(p, name)), default)


def _check_rank(config: PeftConfig, site: Site, name: str) -> None:
  least = min(math.prod(site.inputs), math.prod(site.outputs))
  if config.init == "pissa" and (site.table or site.rank > least):
    raise InputError(
      f"peft.init='pissa' takes the {site.rank} largest singular values of {name}, "
      + (
        "a table of vectors: leave it out." if site.table else f"which has {least}: lower the rank."
      )
    )
  if config.init == "orthogonal" and site.rank % 2:
    raise InputError(f"peft.init='orthogonal' needs an even rank; {name} has {site.rank}.")


def adapter_maker(
  config: PeftConfig, model: ModelConfig, net: nnx.Module
) -> Callable[[dict, jax.Array], dict]:
  """(parameters of the base, key) -> new adapters for `net`, which may be abstract.

  Raises:
    InputError: as `sites` does, or for a model that cannot have virtual tokens.
  """
  if config.method in VIRTUAL:
    check_virtual(config, model)
    return lambda base, key: new_virtual(config, model, base, key)
  found = sites(config, model, net) if config.adds else []
  return lambda base, key: new_adapters(config, found, base, key)


def new_adapters(config: PeftConfig, found: list[Site | Place], base: dict, key: jax.Array) -> dict:
  """What the adapters at `found` begin as: a nested dict, to be put beside `base`.

  Args:
    base: the model's parameters; read by `pissa` and DoRA only.
  """
  leaves: Any = flatten_dict(base)
  out = {}
  for site in found:
    own = jax.random.fold_in(key, zlib.crc32(".".join(map(str, site.path)).encode()) % 2**31)
    if isinstance(site, Place):
      made = site.begin(own)
    else:
      plain = _ia3(site) if config.method == "ia3" else _low_rank(config, site, own, leaves)
      made = {(name,): value for name, value in plain.items()}
    for name, value in made.items():
      dtype = jnp.float32 if name[-1] == "scale" else config.dtype
      out[(*site.path, KEY, *name)] = value.astype(dtype)
  return unflatten_dict(out)


def _ia3(site: Site) -> dict[str, jax.Array]:
  reads = matches(READS, ".".join(map(str, site.path)))
  inside = site.inputs if reads else site.outputs
  return {"inputs" if reads else "outputs": jnp.ones((*site.lead, *inside))}


def _low_rank(config: PeftConfig, site: Site, key: jax.Array, leaves: Any) -> dict[str, jax.Array]:
  reads_base = config.init == "pissa" or config.method == "dora"
  w = dense(leaves[site.weight]) if reads_base else None
  a, b = begin(
    config.init, key, w, lead=site.lead, inputs=site.inputs, outputs=site.outputs, rank=site.rank,
    scale=site.scale, table=site.table,
  )  # fmt: skip
  if site.rows is not None:  # Layers without an adapter have one of zeros, which stays.
    kept = jnp.zeros(site.stacked, bool).at[jnp.array(site.rows)].set(True)
    a, b = (jnp.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, 0) for x in (a, b))
  made = {"a": a, "b": b, "scale": jnp.full(site.stacked, site.scale)}
  if config.init == "pissa":
    made |= {"start_a": a, "start_b": b}
  if config.method == "dora" and w is not None:
    # What begins at nothing leaves the norms of the base.
    made["magnitude"] = magnitude(w, len(site.stacked), len(site.inputs))
  return made


def dense(weight: Any) -> jax.Array:
  """A matrix in at least float32, whatever it is stored as."""
  if isinstance(weight, Quantized):
    return weight.dequantize(jnp.float32)
  return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
