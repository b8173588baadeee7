"""The mixture of experts against its dense reference, Transformers, and itself on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.errors import InputError
from model.layers import param_info
from model.moe import Experts, Router, router_losses
from model.sharding import batch_sharding, make_mesh, shardings

SETTINGS = {
  "mixtral": {},
  "plain": dict(
    router_scores="sigmoid",
    router_renormalize=False,
    experts_per_token=3,
    gated=False,
    activation="relu",
    mlp_bias=True,
  ),
  "shared": dict(shared_experts=2, experts_per_token=1, d_expert=6),
  "shared by a gate": dict(shared_experts=1, shared_gate=True, router_renormalize=False),
  "clamped": dict(gate_limit=0.5, gate_offset=1.0, mlp_bias=True, router_bias=True),
}


def config(**changes) -> ModelConfig:
  settings = dict(
    vocab_size=8, num_layers=2, d_model=8, d_ff=12, num_heads=2, num_experts=4, init_std=0.5,
    layer_pattern=("global+experts",), dtype="float32",
  )  # fmt: skip
  return ModelConfig(**(settings | changes))


def noised(cfg: ModelConfig, kernel: str, seed=7) -> Experts:
  """Experts whose biases, too, are random."""
  moe = nnx.eval_shape(lambda: Experts(cfg, rngs=nnx.Rngs(0)))
  random = np.random.default_rng(seed)
  moe = jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.5, p.shape), p.dtype), moe)
  moe.kernel = kernel
  return moe


def inputs(rows=4, length=9, width=8):
  random = np.random.default_rng(1)
  x = random.normal(size=(rows, length, width)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(random.random((rows, length)) < 0.7)


def loss(moe: Experts, x, valid):
  y, sums = moe(x, valid)
  losses = router_losses(sums)
  return jnp.sin(y).sum() + losses["balance_loss"] + losses["router_z_loss"], (y, sums)


forward = jax.jit(Experts.__call__)
grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def close(got, want, tol=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", SETTINGS)
def test_ragged_experts_equal_the_dense_reference_in_outputs_and_gradients(name):
  cfg = config(**SETTINGS[name])
  got, want = (grads(noised(cfg, k), *inputs()) for k in ("ragged", "dense"))
  close(got, want)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got[1]))


@pytest.mark.parametrize(
  "fields",
  [dict(shared_gate=True), dict(gated=False, gate_limit=1.0), dict(gate_offset=1.0, gated=False)],
  ids=str,
)
def test_settings_without_an_effect_are_refused(fields):
  with pytest.raises(InputError, match="no effect"):
    config(**fields)


def test_the_router_weighs_the_best_scores_as_deepseek_v3_does():
  cfg = config(router_scores="sigmoid", experts_per_token=3)
  router, (x, _) = noised(cfg, "ragged").router, inputs()
  _, probs, weights, chosen = jax.jit(Router.__call__)(router, x)
  scores = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(router.w[...])))
  best = np.argsort(-scores, axis=-1)[..., :3]
  np.testing.assert_array_equal(chosen, best)
  top = np.take_along_axis(scores, best, axis=-1)
  close(weights, top / top.sum(-1, keepdims=True))
  close(probs, scores / scores.sum(-1, keepdims=True))


@pytest.mark.parametrize("version", [2, 3])
def test_groups_a_bias_and_a_scale_choose_and_weigh_as_deepseek_does(version):
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip(f"transformers.models.deepseek_v{version}")
  sizes = dict(hidden_size=8, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=3,
               n_group=4, topk_group=2)  # fmt: skip
  more = dict(topk_method="group_limited_greedy") if version == 2 else {}
  named = lambda kind: getattr(theirs, f"DeepseekV{version}{kind}")
  source = pytest.importorskip(f"{theirs.__name__}.modeling_deepseek_v{version}")
  gate = getattr(source, f"DeepseekV{version}TopkRouter")(
    named("Config")(**sizes, **more, routed_scaling_factor=2.5)
  )
  grouped = dict(num_experts=8, experts_per_token=3, router_groups=4, router_groups_kept=2,
                 router_scale=2.5)  # fmt: skip
  ours = (
    dict(router_renormalize=False) if version == 2
    else dict(router_scores="sigmoid", router_choice_bias=True, router_group_best=2)
  )  # fmt: skip
  router, (x, _) = noised(config(**grouped, **ours), "ragged").router, inputs(rows=40)
  tensor = lambda a: torch.tensor(np.asarray(a))
  with torch.no_grad():
    gate.weight.copy_(tensor(router.w[...].T))
    if version == 3:
      gate.e_score_correction_bias.copy_(tensor(router.bias[...]))
    want = gate(tensor(x))
  logits, _, weights, chosen = jax.jit(Router.__call__)(router, x)
  shares = lambda w, e: (np.eye(8)[np.asarray(e)] * np.asarray(w)[..., None]).sum(-2).reshape(-1, 8)
  close(logits.reshape(-1, 8), want[0].numpy())
  close(shares(weights, chosen), shares(*want[1:]))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(router_groups_kept=2), "router_groups_kept"),
    (dict(router_groups=3), "router_groups=3"),
    (dict(router_groups=2, router_group_best=3), "router_group_best=3"),
    (dict(router_groups=4, router_groups_kept=1), "router_groups_kept=1"),
    (dict(num_experts=0, layer_pattern=("global",), router_bias=True), "router_bias"),
  ],
  ids=str,
)
def test_groups_that_cannot_be_are_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=said):
    config(**changes)


def test_padding_changes_no_output_no_gradient_and_no_sum():
  moe, (x, valid) = noised(config(**SETTINGS["plain"], shared_experts=1), "ragged"), inputs()
  garbage = jnp.where(valid[..., None], x, jnp.nan)
  got, want = grads(moe, garbage, valid), grads(moe, x, valid)
  close(got, want, tol=0)
  (_, (y, sums)), (_, into_x) = want
  assert not np.any(y[~valid]) and not np.any(into_x[~valid]) and sums["tokens"] == valid.sum()
  tokens = x[valid][None]
  alone, alone_sums = forward(moe, tokens, jnp.ones(tokens.shape[:2], bool))
  close((alone[0], alone_sums), (y[valid], sums))


def test_sums_of_parts_give_the_router_losses_of_the_whole_batch():
  moe, (x, valid) = noised(config(), "ragged"), inputs()
  whole = router_losses(forward(moe, x, valid)[1])
  parts = [forward(moe, x[i : i + 2], valid[i : i + 2])[1] for i in (0, 2)]
  close(router_losses(jax.tree.map(lambda *p: sum(p), *parts)), whole)


def test_outputs_and_losses_equal_transformers_mixtral():
  torch = pytest.importorskip("torch")
  mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
  cfg, (x, valid) = config(), inputs()
  moe = noised(cfg, "ragged")
  theirs = mixtral.MixtralSparseMoeBlock(
    mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
  ).eval()
  tensor = lambda a: torch.tensor(np.asarray(a))
  both = jnp.concatenate([moe.gate_proj.w[...], moe.up_proj.w[...]], axis=-1)
  with torch.no_grad():
    theirs.gate.weight.copy_(tensor(moe.router.w[...].T))
    theirs.experts.gate_up_proj.copy_(tensor(both.swapaxes(1, 2)))
    theirs.experts.down_proj.copy_(tensor(moe.down_proj.w[...].swapaxes(1, 2)))
    want = theirs(tensor(x)).numpy()
  close(forward(moe, x, jnp.ones_like(valid))[0], want)
  for mask in (None, valid):
    _, sums = forward(moe, x, jnp.ones_like(valid) if mask is None else mask)
    logits = tensor(x.reshape(-1, 8) @ moe.router.w[...])
    kept = None if mask is None else tensor(mask.astype(np.int32))
    balance = mixtral.load_balancing_loss_func((logits,), 4, 2, kept)
    keep = slice(None) if mask is None else tensor(mask.reshape(-1))
    z = (torch.logsumexp(logits[keep], dim=-1) ** 2).mean()
    losses = router_losses(sums)
    close((losses["balance_loss"], losses["router_z_loss"]), (balance.numpy(), z.numpy()))


def test_scanned_and_rematerialized_layers_equal_a_loop():
  cfg, (x, valid) = config(), inputs()
  stack = jax.vmap(lambda key: Experts(cfg, rngs=nnx.Rngs(key)))(
    jax.random.split(jax.random.key(3))
  )

  def total(x, sums):
    losses = router_losses(sums)
    return (x**2).sum() + losses["balance_loss"] + losses["router_z_loss"]

  def scanned(stack):
    def layer(x, moe):
      y, sums = moe(x, valid)
      return x + y, sums

    return total(*jax.lax.scan(jax.checkpoint(layer), x, stack))

  def looped(stack):
    h, all_sums = x, []
    for i in range(2):
      y, sums = forward(jax.tree.map(lambda a, i=i: a[i], stack), h, valid)
      h, all_sums = h + y, [*all_sums, sums]
    return total(h, jax.tree.map(lambda *s: jnp.stack(s), *all_sums))

  close(jax.jit(jax.value_and_grad(scanned))(stack), jax.jit(jax.value_and_grad(looped))(stack))


def test_eight_devices_equal_one_and_none_holds_the_whole_batch():
  with jax.enable_x64(True):
    cfg = config(dtype="float64", param_dtype="float64", shared_experts=1)
    moe, (x, valid) = noised(cfg, "ragged"), inputs(rows=8)
    x = x.astype("float64")
    want = grads(moe, x, valid)
    assert all(a.dtype == np.float64 for a in jax.tree.leaves(want))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    axes = jax.tree.map(lambda i: i.axes, param_info(moe))
    graphdef, state = nnx.split(moe)
    params = nnx.to_pure_dict(state)
    params = jax.device_put(params, shardings(params, axes, mesh))
    placed = jax.device_put((x, valid), batch_sharding(mesh))
    with jax.set_mesh(mesh):
      step = grads.lower(nnx.merge(graphdef, params), *placed).compile()
      close(step(nnx.merge(graphdef, params), *placed), want, tol=1e-12)
    text = step.as_text()
    assert "f64[2,9,8]" in text
    assert not any(shape in text for shape in ("f64[8,9,8]", "f64[144,8]"))
