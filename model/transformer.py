"""The Stack of blocks: encoder or decoder, layers that are scanned, or unrolled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model import positions
from model.attention import Context, Where, relative_bias, relative_table
from model.block import Aux, Block, fold
from model.cache import Cache, LayerCache
from model.config import LayerKind, ModelConfig
from model.context import balanced, balanced_parts, sent_home
from model.disentangled import RelativeTable
from model.layers import Embed, Linear, Norm, dropout, noisy
from model.peft.attach import dropout_rate, with_folded_keys
from model.peft.virtual import Prompt, later, with_positions
from model.pipeline import Plan, current_plan, of_round, pipelined, stage_policy
from model.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """The tokens that a stack reads, and where they are.

  `seg` counts segments from 1, 0 is nothing. `types` are token types. `bidirectional` marks the
  tokens of prefixes, which a decoder reads in both directions. `length` is that of each row's text,
  of which these tokens may be a part. `ordered` promises, statically, that tokens lie in row order
  with positions rising by one in each segment. `noise`, static too, is what embeddings get in
  training (`model.layers.noisy`). `placed`, static, says that where a network has a prompt, its
  virtual tokens lie among these at the first positions of each text; else `texts`, static, are the
  most segments of a row, before which they are put.
  """

  tokens: Int[Array, "B T"]
  pos: Int[Array, "B T"]  # -1: nothing here.
  seg: Int[Array, "B T"] | None = None
  types: Int[Array, "B T"] | None = None
  bidirectional: Bool[Array, "B T"] | None = None
  length: Int[Array, "B"] | None = None
  ordered: bool = dataclasses.field(default=False, metadata={"static": True})
  noise: float = dataclasses.field(default=0.0, metadata={"static": True})
  placed: bool = dataclasses.field(default=False, metadata={"static": True})
  texts: int = dataclasses.field(default=1, metadata={"static": True})


class Stack(nnx.Module):
  """An encoder or a decoder: what positions and token types add to embeddings, blocks, last norm.

  `layers` holds one stack of blocks for each place of the layer pattern (`ModelConfig.groups`),
  parameters with a leading layer axis, as long as there are sets of parameters; or, with
  `stacked=False`, one block for each layer, which is faster to decode with. An `adapter` is a
  prompt (model.peft.virtual).
  """

  adapter: Prompt

  def __init__(self, cfg: ModelConfig, name: str, *, rngs: nnx.Rngs, stacked: bool = True):
    self.cfg, self.name, self.stacked = cfg, name, stacked
    if cfg.positions == "learned":
      rows = (cfg.max_positions or 0) + cfg.position_offset
      self.position_embed = Embed(cfg, rows, "position", rngs=rngs)
    if cfg.token_types and name == cfg.stacks[0]:
      self.type_embed = Embed(cfg, cfg.token_types, None, rngs=rngs)
    if cfg.bucketed and not cfg.relative_bias_per_layer:
      self.relative_bias = relative_table(cfg, rngs)
    if cfg.positions == "disentangled":
      self.relative = RelativeTable(cfg, rngs=rngs)
    if cfg.embed_norm:
      self.embed_norm = Norm(cfg, rngs=rngs, shape=(cfg.embed_width,))
    if cfg.d_embed is not None:
      shape, axes = (cfg.d_embed, cfg.d_model), ("embed", "embed_out")
      self.embed_proj = Linear(cfg, shape, axes, rngs=rngs, bias=True)
    if stacked:
      groups = cfg.groups(name)
      own = lambda n: n // cfg.layer_uses(name)
      stacks = [_stack(cfg, kind, own(n), rngs) for pattern, n in groups for kind in pattern]
    else:
      stacks = [Block(cfg, kind, rngs=rngs) for kind in cfg.layers(name)]
    self.layers = nnx.List(stacks)
    if cfg.final_norm:
      self.final_norm = Norm(cfg, rngs=rngs)

  def __call__(
    self, embed: Embed, inputs: Inputs, *, x: Float[Array, "B T D"] | None = None,
    context: Context | None = None, cache: Cache | None = None, key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache | None, Aux]:  # fmt: skip
    """Returns (last hidden states, the cache after these tokens, sums that router losses need).

    Args:
      embed: the table of tokens.
      x: what the first layer reads in the place of embedded tokens.
      context: what the encoder has read, for a decoder that attends to one; not needed with a
        cache that holds it (`read`).
    """
    inputs = later(inputs, self.prefix_tokens + (0 if inputs.placed else self.prompt_tokens))
    parts = 1
    if self.name == "decoder" and cache is None and not self._draws(key, inputs):
      parts = balanced_parts(inputs.pos.shape[1])
    inputs, x = jax.tree.map(functools.partial(balanced, parts=parts), (inputs, x))
    where = Where(
      inputs.pos, inputs.seg, bidirectional=inputs.bidirectional, length=inputs.length,
      context=context, ordered=inputs.ordered, balanced=parts,
    )  # fmt: skip
    where = self._derived(where, cached=cache is not None)
    h = self.embedded(embed, inputs) if x is None else x
    if key is not None:
      depth = self.cfg.depth(self.name)
      if inputs.noise:
        seg = (inputs.pos >= 0).astype(jnp.int32) if inputs.seg is None else inputs.seg
        own = inputs.pos >= (self.prompt_tokens if inputs.placed else 0)  # Virtual ones get none.
        louder = noisy(h, seg * own, inputs.noise, jax.random.fold_in(key, depth + 1))
        h = jnp.where(own[..., None], louder, h)
      h = dropout(h, self.cfg.dropout, jax.random.fold_in(key, depth))
    if x is None and self.cfg.d_embed is not None:
      h = self.embed_proj(h)
    run = self._run_stacked if self.stacked else self._run_unstacked
    h, cache, aux = run(h, where, cache, key)
    h = constrain_rows(self.final_norm(h) if self.cfg.final_norm else h)
    return sent_home(h, parts), cache, aux

  @property
  def prompt_tokens(self) -> int:
    """Virtual tokens of each text that the first layer reads."""
    return self.adapter.tokens if hasattr(self, "adapter") else 0

  @property
  def prefix_tokens(self) -> int:
    """Virtual tokens of each text that are keys and values in each layer."""
    return self.layers[0].attn.prefix_tokens if len(self.layers) else 0

  def begun(self, embed: Embed, cache: Cache, length: Int[Array, "B"]) -> Cache:
    """An empty cache with the virtual tokens that stand before each text.

    Args:
      length: of the text of each row.
    """
    count, prefix = self.prompt_tokens, self.prefix_tokens
    if count:
      pos = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(length), count))
      inputs = Inputs(jnp.zeros_like(pos), pos, length=length + count, placed=True)
      return self(embed, inputs, cache=cache)[1] or cache
    if not prefix:
      return cache
    put = lambda block, own: LayerCache(block.attn.prefix.written(own.own), own.cross)
    put = jax.vmap(put) if self.stacked else put
    return tuple(put(*pair) for pair in zip(tuple(self.layers), cache, strict=True))

  def _draws(self, key: jax.Array | None, inputs: Inputs) -> bool:
    """Whether dropout or noise draws by place: tokens then stay where they are, so that any mesh
    draws the same.
    """
    cfg = self.cfg
    rates = cfg.dropout, cfg.attention_dropout, cfg.mlp_dropout, inputs.noise, dropout_rate(self)
    return key is not None and max(rates) > 0

  def read(self, cache: Cache, context: Context) -> Cache:
    """The cache with keys and values of what the encoder has read, once for all steps."""

    def fill(block: Block, cache: LayerCache) -> LayerCache:
      if cache.cross is None:
        return cache
      k, v = block.cross_attn.keys_values(context.x, context)
      return LayerCache(cache.own, cache.cross.update(k, v, context.pos))

    layers, uses = tuple(self.layers), self.cfg.layer_uses(self.name)
    if self.stacked:
      fill = jax.vmap(fill)
      if uses > 1:
        layers = jax.tree.map(lambda a: jnp.repeat(a, uses, axis=0), layers)
    return tuple(fill(block, slots) for block, slots in zip(layers, cache, strict=True))

  def embedded(self, embed: Embed, inputs: Inputs) -> Float[Array, "B T D"]:
    """What the first layer reads: tokens with what positions and token types add to them; as wide
    as their tables, while the first layer reads their projection.
    """
    cfg = self.cfg
    x = embed(inputs.tokens)
    if cfg.scale_embeddings:
      x *= jnp.asarray(cfg.d_model**0.5, x.dtype)
    if self.prompt_tokens and inputs.placed:
      x = self.adapter.put(x, inputs.pos)
    if cfg.embed_scale is not None:
      x *= jnp.asarray(cfg.embed_scale, x.dtype)
    if hasattr(self, "type_embed"):
      types = jnp.zeros_like(inputs.tokens) if inputs.types is None else inputs.types
      x += self.type_embed(types)
    if cfg.positions == "learned":
      row = jnp.maximum(inputs.pos, 0) + cfg.position_offset
      x += self.position_embed(row)
    if cfg.positions == "sinusoidal":
      place = inputs.pos + cfg.position_offset
      waves = positions.sinusoidal(place, cfg.embed_width, inclusive=cfg.sinusoid_inclusive)
      x += waves.astype(x.dtype)
    return self.embed_norm(x) if cfg.embed_norm else x

  def placed(self, inputs: Inputs, context: Context | None = None) -> Where:
    """Where the tokens of a pass without a cache are, as each layer is told, on one device."""
    where = Where(inputs.pos, inputs.seg, bidirectional=inputs.bidirectional, context=context)
    return self._derived(where, cached=False)

  def _derived(self, where: Where, *, cached: bool) -> Where:
    """With what every layer needs of these positions."""
    cfg, angles, local, pos = self.cfg, None, None, where.pos
    if cfg.positions == "rotary":
      turn = functools.partial(
        positions.rotary_angles, pos, cfg, seg=where.seg, length=where.length
      )
      angles = turn(local=False)
      if cfg.rope_local_theta is not None:
        local = turn(local=True)
    table = self.relative_bias[...] if hasattr(self, "relative_bias") else None
    causal = self.name == "decoder"
    keys = with_positions(pos, self.prefix_tokens) if self.prefix_tokens else pos
    bias = None if cached else relative_bias(cfg, table, pos, keys, causal=causal)
    relative = self.relative(pos) if cfg.positions == "disentangled" else None
    return dataclasses.replace(
      where, angles=angles, local_angles=local, bias=bias, table=table, relative=relative
    )

  def _run_stacked(self, x, where, caches, key):
    """Scans over the repeats of each group, with the places of its pattern unrolled inside."""
    plan = current_plan(self.cfg, len(x)) if caches is None else None
    if plan is not None:
      return self._run_pipelined(x, where, key, plan)
    first, start, out, auxes = 0, 0, [], []
    for pattern, repeats in self.cfg.groups(self.name):
      places = slice(first, first + len(pattern))
      stacks = tuple(self.layers)[places]
      slots = (None,) * len(pattern) if caches is None else caches[places]
      index = start + jnp.arange(repeats) * len(pattern)
      body = functools.partial(_one_repeat, cfg=self.cfg, where=where, key=key)
      scan = jax.lax.scan if self.cfg.scan_layers else _unrolled
      uses = self.cfg.layer_uses(self.name)
      if uses == 1:
        x, (slots, aux) = scan(body, x, (stacks, slots, index))
      else:
        x, (slots, aux) = _shared(scan, body, x, (stacks, slots, index), uses)
      out.extend(slots)
      auxes.extend(a for a in aux if a)
      first, start = first + len(pattern), start + repeats * len(pattern)
    return x, (None if caches is None else tuple(out)), join_aux(auxes)

  def _run_pipelined(self, x, where, key, plan: Plan):
    """The groups one after the other, each over all stages; see `pipelined`."""
    cfg, first, start, auxes = self.cfg, 0, 0, []
    where = dataclasses.replace(
      where, angles=None, local_angles=None, bias=None, table=None, relative=None
    )

    def stage(layers, x, where, turn, part):
      own = self._derived(where, cached=False)
      body = functools.partial(_one_repeat, cfg=cfg, where=own, key=fold(key, part), turn=turn)
      blocks, index = layers
      for block in blocks:
        with_folded_keys(block, part)
      scan = jax.lax.scan if cfg.scan_layers else _unrolled
      x, (_, aux) = scan(body, x, (blocks, (None,) * len(blocks), index))
      return x, aux

    for pattern, repeats in cfg.groups(self.name):
      blocks = tuple(self.layers)[first : first + len(pattern)]
      index = start + jnp.arange(repeats) * len(pattern)
      x, aux = pipelined(stage, (blocks, index), x, where, plan)
      auxes.extend(a for a in aux if a)
      first, start = first + len(pattern), start + repeats * len(pattern)
    return x, None, join_aux(auxes)

  def _run_unstacked(self, x, where, caches, key):
    out, auxes = [], []
    for i, block in enumerate(self.layers):
      cache = None if caches is None else caches[i]
      x, cache, aux = block(x, where, cache=cache, key=fold(key, i))
      out.append(cache)
      auxes.extend([jax.tree.map(lambda a: a[None], aux)] if aux else [])
    return x, (None if caches is None else tuple(out)), join_aux(auxes)


def _stack(cfg: ModelConfig, kind: LayerKind, repeats: int, rngs: nnx.Rngs) -> Block:
  keys = jax.random.split(rngs.params(), repeats)
  return jax.vmap(lambda key: Block(cfg, kind, rngs=nnx.Rngs(key)))(keys)


def _shared(scan, body, x, layers, uses: int):
  """`scan` where each set of parameters has `uses` layers in a row."""
  stacks, caches, index = layers
  split = lambda a: a.reshape(-1, uses, *a.shape[1:])
  joined = lambda a: a.reshape(-1, *a.shape[2:])

  def one_set(x, own):
    blocks, *each = own
    return scan(lambda x, one: body(x, (blocks, *one)), x, tuple(each))

  x, out = scan(one_set, x, (stacks, *jax.tree.map(split, (caches, index))))
  return x, jax.tree.map(joined, out)


def _one_repeat(
  x, layers, *, cfg: ModelConfig, where: Where, key: jax.Array | None, turn: Array | None = None
):
  """`turn`: the round of a pipeline whose layers are meant; None: there are no rounds."""
  stacks, caches, index = layers
  own = lambda block: block if turn is None else of_round(block, turn)
  index, out = own(index), []
  for place, (block, cache) in enumerate(zip(stacks, caches, strict=True)):
    call = lambda block, x, where, cache, key: own(block)(x, where, cache=cache, key=key)
    run = _remat(cfg, call, piped=turn is not None)
    x, cache, aux = run(block, x, where, cache, fold(key, index + place))
    out.append((cache, aux))
  return x, tuple(zip(*out, strict=True))


def _unrolled(body, x, layers):
  """jax.lax.scan's contract as a Python loop."""
  outs = []
  for i in range(len(layers[-1])):
    x, out = body(x, jax.tree.map(lambda a: a[i], layers))  # noqa: B023
    outs.append(out)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _remat(cfg: ModelConfig, block: Any, *, piped: bool):
  """Which activations of a block are kept for the backward pass (`ModelConfig.remat`).

  full: only its input. dots: results of matrix products without batch axes. offload: as dots, in
  host memory. attention: all but what lies inside attention, which sees to that itself. `piped`:
  the block runs in a pipeline's stage.
  """
  policies = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
  }
  if cfg.remat not in policies:
    return block
  policy = policies[cfg.remat]
  return jax.checkpoint(block, policy=stage_policy(policy) if piped else policy)


def join_aux(auxes: list[Aux]) -> Aux:
  """Sums of several groups of layers, one behind the other."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *auxes) if auxes else {}
