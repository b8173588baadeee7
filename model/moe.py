"""Mixture of experts: the router, its experts, and the sums that its losses are formed from."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.dropless import apart, of_numbers, ragged_experts
from model.layers import MLP, Initializer, Linear, activated, param, residual_init
from model.quant import beside, dense
from model.sharding import constrain


class Router(nnx.Module):
  """Scores every expert for every token and chooses among them, in float32 or wider."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.w = param(cfg, rngs, (cfg.d_model, cfg.num_experts), ("embed", "expert"))
    if cfg.router_bias:
      zeros = jax.nn.initializers.zeros
      self.b = param(cfg, rngs, (cfg.num_experts,), ("expert",), role="vector", init=zeros)
    self.per_token, self.scores = cfg.experts_per_token, cfg.router_scores
    self.renormalize, self.scale = cfg.router_renormalize, cfg.router_scale
    self.groups, self.kept = cfg.router_groups, cfg.router_groups_kept
    self.group_best = cfg.router_group_best
    if cfg.router_choice_bias:
      zeros = jax.nn.initializers.zeros
      self.bias = param(
        cfg, rngs, (cfg.num_experts,), ("expert",), role="vector", init=zeros, least=jnp.float32
      )

  def __call__(
    self, x: Float[Array, "B T D"]
  ) -> tuple[
    Float[Array, "B T E"], Float[Array, "B T E"], Float[Array, "B T k"], Int[Array, "B T k"]
  ]:
    """Returns logits, probabilities, and the weights and numbers of the chosen experts.

    Probabilities sum to 1 over the experts and enter the balance loss: sigmoid scores are divided
    by their sum, as in DeepSeek-V3 (arXiv:2412.19437, eq. 17-20).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST  # The choice must not hang on how a device rounds.
    # Experts of all devices: which of them a token needs is told where the token is.
    w = constrain(self.w[...].astype(wide), (None, None))
    logits = constrain(jnp.matmul(x.astype(wide), w, precision=precision), ("batch", "seq", None))
    if hasattr(self, "b"):
      logits += self.b[...].astype(wide)
    if self.scores == "softmax":
      scores = probs = jax.nn.softmax(logits, axis=-1)
    else:
      scores = jax.nn.sigmoid(logits)
      probs = scores / scores.sum(axis=-1, keepdims=True)
    chosen = self._chosen(scores)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if self.renormalize:
      weights = weights / weights.sum(axis=-1, keepdims=True)
    return logits, probs, weights * self.scale, chosen

  def _chosen(self, scores: Float[Array, "B T E"]) -> Int[Array, "B T k"]:
    """Numbers of the experts with the best scores, in the best groups of experts where asked for.

    Sources: groups, DeepSeek-V2 (arXiv:2405.04434, section 2.2.2); a bias that only the choice
    sees, so that no gradient reaches it: arXiv:2408.15664.
    """
    if hasattr(self, "bias"):
      scores = scores + self.bias[...].astype(scores.dtype)
    if self.groups > 1:
      grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
      best = jax.lax.top_k(grouped, self.group_best)[0].sum(axis=-1)
      kept = jax.lax.top_k(best, self.kept)[1]
      stays = jnp.any(kept[..., None, :] == jnp.arange(self.groups)[:, None], axis=-1)
      scores = jnp.where(stays[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, self.per_token)[1]


class ExpertMatrix(nnx.Module):
  """The same matrix of every expert: `w` (E, in, out) and, where asked for, `b` (E, out)."""

  adapter: Any

  def __init__(
    self,
    cfg: ModelConfig,
    axes: tuple[str, str],
    *,
    rngs: nnx.Rngs,
    init: Initializer | None = None,
  ):
    size = {"embed": cfg.d_model, "mlp": cfg.expert_width}
    E, I, O = cfg.num_experts, *(size[a] for a in axes)  # noqa: E741
    self.w = param(cfg, rngs, (E, I, O), ("expert", *axes), init=init)
    if cfg.mlp_bias:
      zeros = jax.nn.initializers.zeros
      self.b = param(cfg, rngs, (E, O), ("expert", axes[1]), role="vector", init=zeros)

  def stored(self) -> dict[str, Any]:
    """The parameters as they are kept, without an adapter's."""
    return {name: getattr(self, name).get_value() for name in "wb" if hasattr(self, name)}

  def added(self, dtype: jnp.dtype) -> dict[str, Array]:
    """An adapter's arrays in the compute dtype."""
    return self.adapter.arrays(dtype) if hasattr(self, "adapter") else {}

  def axes(self) -> dict[str, tuple[str, ...]]:
    """Their logical axes."""
    own = {name: getattr(self, name).axes for name in "wb" if hasattr(self, name)}
    return own | self.adapter.axes() if hasattr(self, "adapter") else own


class Experts(nnx.Module):
  """A mixture of experts in place of the MLP; no token is ever dropped.

  Each token goes through `experts_per_token` experts, whose outputs are summed with the router's
  weights, and through the shared experts besides. Sources: Shazeer et al., arXiv:1701.06538;
  Mixtral, arXiv:2401.04088; shared experts: DeepSeekMoE, arXiv:2401.06066.
  """

  adapter: Any  # Of model.peft: what is added around all of it.

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg, self.kernel, self.dtype = cfg, cfg.expert_kernel, cfg.compute_dtype
    self.router = Router(cfg, rngs=rngs)
    if cfg.gated:
      self.gate_proj = ExpertMatrix(cfg, ("embed", "mlp"), rngs=rngs)
    self.up_proj = ExpertMatrix(cfg, ("embed", "mlp"), rngs=rngs)
    self.down_proj = ExpertMatrix(cfg, ("mlp", "embed"), rngs=rngs, init=residual_init(cfg))
    if cfg.shared_experts:
      self.shared = MLP(cfg, rngs=rngs, width=cfg.shared_experts * cfg.expert_width)
    if cfg.shared_gate:
      self.shared_gate = Linear(cfg, (cfg.d_model, 1), ("embed", "label"), rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
  ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """Returns outputs (0 where not valid, in the compute dtype) and the router's sums.

    Sums are over the valid tokens of the batch, in float32 or wider, for `router_losses`: `tokens`
    [] their number, `counts` [E] how often each expert was chosen (no gradient), `probs` [E] its
    summed probabilities, `z` [] the summed squares of the logits' log-sum-exp.
    """
    keep = valid[..., None]
    x = jnp.where(keep, x.astype(self.dtype), 0)
    logits, probs, weights, chosen = self.router(x)
    sums = router_sums(logits, probs, chosen, valid)
    weights = jnp.where(keep, weights, 0)
    names = [n for n in ("gate_proj", "up_proj", "down_proj") if hasattr(self, n)]
    x, stored = beside(x, {name: getattr(self, name).stored() for name in names})
    matrices = {
      name: {part: dense(a, self.dtype) for part, a in own.items()}
      | getattr(self, name).added(self.dtype)
      for name, own in stored.items()
    }
    read = with_numbers(x, [getattr(self, name) for name in names])
    act = functools.partial(activated, self.cfg)
    if self.kernel == "dense":
      y = dense_experts(read, weights, chosen, matrices, act)
    else:
      axes = {name: getattr(self, name).axes() for name in names}
      y = ragged_experts(read, weights, chosen, valid, matrices, axes, act)
    if hasattr(self, "shared"):
      shared = self.shared(x)
      if hasattr(self, "shared_gate"):
        shared *= jax.nn.sigmoid(self.shared_gate(x))
      y += jnp.where(keep, shared, 0)
    return y, sums


def with_numbers(x: Float[Array, "B T D"], matrices: list[ExpertMatrix]) -> Array:
  """`x`, with the number of each row's adapter behind it where rows have their own."""
  several = [m.adapter for m in matrices if hasattr(m, "adapter") and hasattr(m.adapter, "rows")]
  if not several:
    return x
  numbers = several[0].numbers(len(x)).astype(x.dtype)
  return jnp.concatenate((x, jnp.broadcast_to(numbers[:, None, None], (*x.shape[:2], 1))), axis=-1)


def dense_experts(
  x: Float[Array, "B T D"],
  weights: Float[Array, "B T k"],
  chosen: Int[Array, "B T k"],
  matrices: dict[str, dict[str, Array]],
  act: Callable[[Array, Array | None], Array],
) -> Float[Array, "B T D"]:
  """The reference: every token through every expert, weighted by 0 where it was not chosen."""

  def through(h, name, equation):
    own = matrices[name]
    y = jnp.einsum(equation, h, own["w"])
    if "lora_a" in own:
      a, b, mask = of_numbers(own, numbers, h.dtype)
      reads, back = equation.split(",")[0], equation.split("->")[1]
      low = jnp.einsum(f"{reads},E{reads[-1]}R->EBTR", h, a) * mask
      y += jnp.einsum(f"EBTR,ER{back[-1]}->{back}", low, b)
    return y + matrices[name]["b"][:, None, None] if "b" in matrices[name] else y

  x, numbers = apart(x, matrices)
  into = "BTD,EDF->EBTF"
  gate = through(x, "gate_proj", into) if "gate_proj" in matrices else None
  hidden = act(through(x, "up_proj", into), gate)
  y = through(hidden, "down_proj", "EBTF,EFD->EBTD")
  picked = chosen[..., None] == jnp.arange(y.shape[0])
  share = jnp.where(picked, weights[..., None], 0).sum(axis=2)
  return jnp.einsum("EBTD,BTE->BTD", y.astype(weights.dtype), share).astype(x.dtype)


def router_sums(
  logits: Float[Array, "B T E"],
  probs: Float[Array, "B T E"],
  chosen: Int[Array, "B T k"],
  valid: Bool[Array, "B T"],
) -> dict[str, Array]:
  """What the router's losses need of one layer, summed over valid tokens; see Experts."""
  picked = chosen[..., None] == jnp.arange(logits.shape[-1])
  keep = valid[..., None]
  return {
    "tokens": valid.sum(dtype=logits.dtype),
    "counts": (picked & keep[..., None]).sum(axis=(0, 1, 2), dtype=logits.dtype),
    "probs": jnp.where(keep, probs, 0).sum(axis=(0, 1)),
    "z": jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0).sum(),
  }


def router_losses(sums: dict[str, Array]) -> dict[str, Float[Array, ""]]:
  """Forms `balance_loss` and `router_z_loss`, unweighted, from the sums of a whole batch.

  Args:
    sums: of Experts, each with a leading axis of layers or, for one layer, without.

  Both are means over the layers. Balance: E Σ_e f_e P_e, where f_e is the share of tokens that
  chose expert e and P_e its mean probability (Switch, arXiv:2101.03961, eq. 4-6, for k = 1; with k
  experts a token the f_e sum to k, as in Transformers' Mixtral, so that k is the balanced value).
  z: the mean over tokens of log²Σexp (ST-MoE, arXiv:2202.08906, eq. 5).

  Add the sums of micro-batches, shards or rows first, then form the losses: z is then the same
  however the batch was cut. Balance is a product of sums: it is the same for any packing and any
  number of devices, but where each micro-batch forms its own loss, as gradient accumulation does,
  the result is the mean of the micro-batches' balance instead of the balance of the whole.
  """
  tokens = jnp.maximum(sums["tokens"], 1)
  share = sums["counts"] / tokens[..., None]
  prob = sums["probs"] / tokens[..., None]
  experts = sums["counts"].shape[-1]
  balance = experts * (jax.lax.stop_gradient(share) * prob).sum(axis=-1)
  return {"balance_loss": balance.mean(), "router_z_loss": (sums["z"] / tokens).mean()}
