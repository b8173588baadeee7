"""The mixture of experts against its dense reference, Transformers, and itself on 8 devices."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import dropless
from model.config import ModelConfig
from model.errors import InputError
from model.exchange import slices
from model.layers import param_info
from model.moe import Experts, Router, router_losses
from model.sharding import RULES, batch_sharding, make_mesh, mesh_parts, replicated, shardings

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


def on_mesh(moe: Experts, x, valid, **sizes):
  """(what `grads` gives on a mesh of eight devices, the program)."""
  mesh = make_mesh(**(dict(data=1) | sizes))
  axes = jax.tree.map(lambda i: i.axes, param_info(moe))
  graphdef, state = nnx.split(moe)
  params = nnx.to_pure_dict(state)
  params = jax.device_put(params, shardings(params, axes, mesh))
  whole = len(x) % mesh_parts("batch", mesh)
  placed = jax.device_put((x, valid), replicated(mesh) if whole else batch_sharding(mesh))
  anew = lambda *args: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args)
  with jax.set_mesh(mesh):
    step = jax.jit(anew).lower(nnx.merge(graphdef, params), *placed).compile()
    return step(nnx.merge(graphdef, params), *placed), step.as_text()


@pytest.fixture
def wide():
  with jax.enable_x64(True):
    yield dict(dtype="float64", param_dtype="float64")


def wide_inputs(rows=8):
  x, valid = inputs(rows=rows)
  return x.astype("float64"), valid


def test_eight_devices_equal_one_and_none_holds_the_whole_batch(wide):
  moe, (x, valid) = noised(config(**wide, shared_experts=1), "ragged"), wide_inputs()
  want = grads(moe, x, valid)
  assert all(a.dtype == np.float64 for a in jax.tree.leaves(want))
  got, text = on_mesh(moe, x, valid, data=2, fsdp=2, tensor=2)
  close(got, want, tol=1e-12)
  assert "f64[2,9,8]" in text
  assert not any(shape in text for shape in ("f64[8,9,8]", "f64[144,8]"))


def simulated_exchange(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  """jax.lax.ragged_all_to_all as its documentation has it, which CPUs do not have.

  What it leaves undefined is NaN: a slice whose sender and receiver disagree, and a row that two
  slices are written to.
  """
  gather = lambda a: jax.lax.all_gather(a, axis_name)
  rows, begin, size, to = map(gather, (operand, input_offsets, send_sizes, output_offsets))
  n, me = len(rows), jax.lax.axis_index(axis_name)
  each = size.shape[1] // n
  place = jnp.arange(len(output))
  times = jnp.zeros(len(output), jnp.int32)
  for device in range(n):
    for i in range(each):
      own = me * each + i
      at = place - to[device, own]
      inside = (at >= 0) & (at < size[device, own])
      row = rows[device].at[begin[device, own] + at].get(mode="fill", fill_value=jnp.nan)
      agreed = size[device, own] == recv_sizes[device * each + i]
      output = jnp.where(inside[:, None], jnp.where(agreed, row, jnp.nan), output)
      times += inside
  return jnp.where(times[:, None] < 2, output, jnp.nan)


def careless(original):
  """jax.lax.ragged_dot by a kernel that leaves NaN in rows of no group, as a TPU's may, and that
  multiplies them for the gradient of the last matrix."""

  def real(h, sizes):
    return (jnp.arange(len(h)) < sizes.sum())[:, None]

  @jax.custom_vjp
  def ragged_dot(h, w, sizes):
    return jnp.where(real(h, sizes), original(h, w, sizes), jnp.nan)

  def backward(saved, change):
    h, w, sizes = saved
    last = jnp.arange(len(sizes)) == len(sizes) - 1
    all_rows = sizes + jnp.where(last, len(h) - sizes.sum(), 0).astype(sizes.dtype)
    into_h, into_w = jax.vjp(lambda h, w: original(h, w, all_rows), h, w)[1](change)
    return jnp.where(real(h, sizes), into_h, jnp.nan), into_w, None

  ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), backward)
  return ragged_dot


@pytest.fixture(params=["gathered", "exchanged"])
def route(request, monkeypatch):
  """How tokens come to their experts: as on CPUs, and as on TPUs and GPUs but for the wires."""
  exchange = mock.Mock(side_effect=simulated_exchange)
  monkeypatch.setattr(jax.lax, "ragged_dot", careless(jax.lax.ragged_dot))
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchange)
  if request.param == "exchanged":
    monkeypatch.setattr(dropless, "device_facts", lambda: ("tpu", 0))
  yield request.param
  assert exchange.called == (request.param == "exchanged")


EXPERT_MESHES = {
  "data x expert x tensor": dict(data=2, expert=2, tensor=2),
  "data x expert": dict(data=2, expert=4),
  "fsdp x expert": dict(fsdp=4, expert=2),
  "expert": dict(expert=8),
}
EXPERT_CASES = [("clamped", "data x expert x tensor"), *(
  pytest.param(*case, marks=pytest.mark.slow)
  for case in itertools.product(("mixtral", "plain", "clamped", "shared by a gate"), EXPERT_MESHES)
  if case != ("clamped", "data x expert x tensor")
)]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh"), EXPERT_CASES)
def test_experts_on_a_mesh_equal_one_device(wide, route, name, mesh):
  cfg = config(**wide, **SETTINGS[name], num_experts=8)
  x, valid = wide_inputs()
  want = grads(noised(cfg, "dense"), x, valid)
  got, text = on_mesh(noised(cfg, "ragged"), x, valid, **EXPERT_MESHES[mesh])
  close(got, want, tol=1e-12)
  whole = "f64[8,8,12]", "f64[8,12,8]"
  assert not any(shape in text for shape in whole), "no device has all experts"


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_all_tokens_may_choose_the_same_experts(wide, route, k):
  """The most that one device can get: all tokens of the others, for its last experts."""
  cfg = config(**wide, num_experts=8, router_bias=True, experts_per_token=k)
  x, valid = wide_inputs()
  dense, ragged = noised(cfg, "dense"), noised(cfg, "ragged")
  for moe in (dense, ragged):
    moe.router.b[...] = jnp.full(8, -100.0).at[5 - k : 5].set(100.0)
  valid = valid.at[:, :3].set(True).at[-1].set(False)  # A row of padding too.
  want = grads(dense, x, valid)
  counts = want[0][1][1]["counts"]
  assert counts[4] == valid.sum() and counts.sum() == k * valid.sum()
  close(on_mesh(ragged, x, valid, data=2, expert=4)[0], want, tol=1e-12)


def test_the_exchange_of_tpus_and_gpus_is_in_a_program_four_times(monkeypatch):
  """Tokens there, results back, and both again for gradients. CPUs can lower it but not run it."""
  monkeypatch.setattr(dropless, "device_facts", lambda: ("tpu", 0))
  moe, (x, valid) = noised(config(**SETTINGS["clamped"], num_experts=8), "ragged"), inputs(rows=8)
  anew = lambda *args: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args)
  with jax.set_mesh(make_mesh(data=2, expert=2, tensor=2)):
    text = jax.jit(anew).lower(moe, x, valid).as_text()
  assert text.count("@ragged_all_to_all(") == 4
  room = 2 * (x.shape[0] // 4 * x.shape[1]) * 2  # Devices · tokens of each · experts of a token.
  assert f"tensor<{room}x8xf32>" in text


@pytest.mark.slow
def test_tokens_that_the_mesh_does_not_split_reach_all_experts(wide, monkeypatch):
  """A short batch, as in generation: each device adds what its own experts make of it."""
  monkeypatch.setattr(jax.lax, "ragged_dot", careless(jax.lax.ragged_dot))
  cfg = config(**wide, num_experts=8, mlp_bias=True)
  x, valid = wide_inputs(rows=3)
  want = grads(noised(cfg, "dense"), x, valid)
  got, _ = on_mesh(noised(cfg, "ragged"), x, valid, data=2, expert=2, tensor=2)
  close(got, want, tol=1e-12)


@pytest.mark.slow
def test_texts_split_along_their_length_reach_all_experts(wide, route, monkeypatch):
  monkeypatch.setitem(RULES, "seq", "seq")
  cfg = config(**wide, num_experts=8, mlp_bias=True)
  x, valid = (a[:, :8] for a in wide_inputs())
  want = grads(noised(cfg, "dense"), x, valid)
  got, text = on_mesh(noised(cfg, "ragged"), x, valid, data=2, expert=2, seq=2)
  close(got, want, tol=1e-12)
  assert "f64[2,4,8]" in text


@pytest.mark.slow
def test_layers_mapped_over_the_stages_of_a_pipeline_reach_their_experts(wide, route):
  cfg = config(**wide, num_experts=8, mlp_bias=True)
  x, valid = wide_inputs()
  layers = [noised(cfg, "ragged", seed) for seed in (7, 8)]

  def total(stack, x):
    y, sums = jax.vmap(lambda moe, x: moe(x, valid), spmd_axis_name="stage")(stack, x)
    return jnp.sin(y).sum(), (y, sums)

  def anew(stack, x):
    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(stack, x)

  stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  both = jnp.stack([x, x[::-1]])
  want = jax.jit(anew)(stack, both)
  with jax.set_mesh(make_mesh(stage=2, data=2, expert=2)):
    close(jax.jit(lambda *args: anew(*args))(stack, both), want, tol=1e-12)


@pytest.mark.parametrize(("devices", "experts"), [(1, 3), (2, 4), (4, 4), (4, 12)])
def test_slices_lie_sorted_by_expert_and_come_back_to_where_they_were(devices, experts):
  rng = np.random.default_rng(devices * experts)
  table = rng.integers(0, 5, (devices, experts)) * (rng.random((devices, experts)) < 0.7)
  plans = [slices(jnp.asarray(table), jnp.asarray(i)) for i in range(devices)]

  def exchange(sent, way, rooms):
    """`sent`, a list for each device, moved as the documentation of the collective says."""
    got = [[None] * room for room in rooms]
    each = experts // devices
    for device, plan in enumerate(plans):
      begin, size, to, _ = np.asarray(plan[way])
      for s in range(experts):
        other = s // each
        told = np.asarray(plans[other][way].recv_sizes)[device * each + s % each]
        assert told == size[s], "the receiver knows how much comes"
        for i in range(size[s]):
          assert got[other][to[s] + i] is None, "no row is written twice"
          got[other][to[s] + i] = sent[device][begin[s] + i]
    return got

  rows = [[(e, d, i) for e in range(experts) for i in range(table[d, e])] for d in range(devices)]
  totals = table.sum(0).reshape(devices, -1).sum(1)
  there = exchange(rows, 0, totals)
  assert there == [sorted(got) for got in there]
  assert sorted(itertools.chain(*there)) == sorted(itertools.chain(*rows))
  assert exchange(there, 1, table.sum(1)) == rows
