"""Bottleneck adapters beside hooks into Transformers' models, and what they compute elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import model.loading
from infer import generate
from model.errors import InputError
from model.layers import activation
from model.peft.attach import apart
from model.peft.combine import combined
from model.sharding import make_mesh
from model.transformer import Inputs
from tests.infer import tiny
from tests.model.peft import theirs
from tests.model.peft.test_quantized_base import adapted, plain, quantized
from tests.model.peft.test_training import close, trained_here, trained_there

torch = theirs.torch
slow = pytest.mark.slow
SIZE = 3
ACTIVATIONS = {"relu": torch.nn.functional.relu, "gelu": torch.nn.functional.gelu,
               "silu": torch.nn.functional.silu, "tanh": torch.tanh}  # fmt: skip


class Narrow(torch.nn.Module):
  """scale · up(f(down(x))), with parameters of ours."""

  def __init__(self, ours, layer, kind):
    super().__init__()
    of = lambda name: torch.tensor(np.array(ours[name][layer]))
    for name in ("down", "down_bias", "up", "up_bias"):
      setattr(self, name, torch.nn.Parameter(of(name)))
    self.scale, self.f = of("scale"), ACTIVATIONS[kind]

  def forward(self, x):
    narrow = self.f(x @ self.down + self.down_bias)
    return self.scale * (narrow @ self.up + self.up_bias)


def parts_there(base, name):
  """{(stack, layer, part): (the module that reads, the module that gives)}."""
  if name == "llama":
    found = {}
    for i, layer in enumerate(base.model.layers):
      found["decoder", i, "attn"] = (layer.self_attn,) * 2
      found["decoder", i, "mlp"] = (layer.mlp,) * 2
    return found
  if name == "bert":
    found = {}
    for i, layer in enumerate(base.bert.encoder.layer):
      found["encoder", i, "attn"] = layer.attention.self, layer.attention.output.dense
      found["encoder", i, "mlp"] = layer.intermediate, layer.output.dense
    return found
  found = {}
  for stack in ("encoder", "decoder"):
    for i, block in enumerate(getattr(base, stack).block):
      own = {"attn": block.layer[0].SelfAttention, "mlp": block.layer[-1].DenseReluDense}
      own |= {"cross_attn": block.layer[1].EncDecAttention} if stack == "decoder" else {}
      found |= {(stack, i, part): (module, module) for part, module in own.items()}
  return found


def hook(reads, gives, narrow, serial):
  """Lets `gives` add what `narrow` makes of its output, or of what `reads` has read."""
  seen = {}

  def read(_, args, kwargs):
    seen["x"] = args[0] if args else kwargs["hidden_states"]

  def give(_, args, out):
    y = out[0] if isinstance(out, tuple) else out
    y = y + narrow(y if serial else seen["x"])
    return (y, *out[1:]) if isinstance(out, tuple) else y

  reads.register_forward_pre_hook(read, with_kwargs=True)
  gives.register_forward_hook(give)


CASES = [
  ("llama", "houlsby", "relu", None),
  *(pytest.param(*case, marks=slow) for case in (
    ("t5", "houlsby", "gelu", None), ("llama", "pfeiffer", "silu", 0.5),
    ("llama", "parallel", "relu", None), ("bert", "houlsby", "gelu", None),
    ("bert", "pfeiffer", "relu", None), ("bert", "parallel", "tanh", 2.0),
    ("t5", "pfeiffer", "relu", None), ("t5", "parallel", "relu", None),
  )),
]  # fmt: skip
PARTS = {"houlsby": ("attn", "cross_attn", "mlp"), "pfeiffer": ("mlp",), "parallel": ("mlp",)}


@pytest.mark.parametrize(("name", "method", "kind", "scale"), CASES)
def test_outputs_gradients_and_twenty_steps_equal_those_of_hooks(
  tmp_path, name, method, kind, scale
):
  base = theirs.base(name, tmp_path)
  plain_model = model.load(tmp_path)
  m = adapted(plain_model, method=method, bottleneck=SIZE, activation=kind, scale=scale)
  leaves, narrows = flatten_dict(m.params), {}
  form = f"{'parallel' if method == 'parallel' else 'serial'}_{kind}"
  for p in base.parameters():
    p.requires_grad_(False)
  for (stack, layer, part), (reads, gives) in parts_there(base, name).items():
    if part in PARTS[method]:
      path = (stack, "layers", 0, part, "adapter", form)
      own = {p[-1]: leaf for p, leaf in leaves.items() if p[:-1] == path}
      assert own["down"].shape == (2, 16, SIZE)
      want = scale or (4 if method == "parallel" else 1)
      np.testing.assert_array_equal(own["scale"], np.full(2, want))
      narrows[path, layer] = Narrow(own, layer, kind)
      hook(reads, gives, narrows[path, layer], method != "parallel")
  base.narrows = torch.nn.ModuleList(narrows.values())
  close(theirs.ours(m, name), theirs.logits(base, name))
  assert np.abs(theirs.ours(m, name) - theirs.ours(plain_model, name)).max() > 1e-2
  first, their_losses = trained_there(base, name)
  grads, losses, params = trained_here(m, name)
  close(losses, their_losses)
  assert losses[-1] < losses[0] - 1e-3
  ended = flatten_dict(params)
  assert len(grads) == 4 * len({path for path, _ in narrows})
  for number, (path, layer) in enumerate(narrows):
    for one, p in narrows[path, layer].named_parameters():
      close(grads[(*path, one)][layer], first[f"narrows.{number}.{one}"])
      close(ended[(*path, one)][layer], p.detach().numpy())
  assert all(np.array_equal(ended[p], a) for p, a in flatten_dict(apart(m.params)[0]).items())


BODIES = {
  "pre": {}, "post": dict(norm_placement="post"), "sandwich": dict(norm_placement="sandwich"),
  "output": dict(norm_placement="output"), "parallel_residual": dict(residual="parallel"),
  "scaled_residual": dict(residual_scale=0.5),
  "experts": dict(layer_pattern=("global", "global+experts"), num_experts=4),
}  # fmt: skip


def block_by_hand(cfg, block, x, where, method, pick):
  """What a block of one layer makes of x, part by part."""
  norm = lambda name, a: getattr(block, name)(a) if hasattr(block, name) else a

  def part(owner, run, read):
    y = run(read)
    own = {k: p[...] for k, p in vars(pick(owner)).items() if isinstance(p, nnx.Variable)}
    narrow = activation("gelu")((y if method == "houlsby" else read) @ own["down"]
                                + own["down_bias"])  # fmt: skip
    return y + own["scale"] * (narrow @ own["up"] + own["up_bias"])

  def added(x, y, name):
    scale = cfg.residual_scale or 1
    post = cfg.norm_placement == "post"
    return norm(name, x + scale * y) if post else x + scale * norm(name, y)

  def mlp(a):
    made = block.mlp(a, where.pos >= 0) if hasattr(block.mlp, "router") else block.mlp(a)
    return made[0] if isinstance(made, tuple) else made

  read = norm("attn_norm", x)
  y = part(block.attn, lambda a: block.attn(a, where)[0], read)
  if cfg.residual == "parallel":
    z = part(block.mlp, mlp, read)
    return added(added(x, y, "attn_post_norm"), z, "mlp_post_norm")
  x = added(x, y, "attn_post_norm")
  return added(x, part(block.mlp, mlp, norm("mlp_norm", x)), "mlp_post_norm")


@slow
@pytest.mark.parametrize("method", ["houlsby", "parallel"])
@pytest.mark.parametrize("body", BODIES)
def test_an_adapter_changes_what_a_part_gives_before_its_norm_and_the_residual_sum(body, method):
  m = adapted(
    tiny.model(**dict(layer_pattern=("global",), window=None) | BODIES[body]), method=method,
    bottleneck=5, activation="gelu", targets=("attn", "mlp"),
  )  # fmt: skip
  net = nnx.merge(*m.unstacked())
  tokens = np.arange(14).reshape(2, 7)
  pos = jnp.broadcast_to(jnp.arange(7), (2, 7))
  inputs = Inputs(jnp.asarray(tokens), pos)
  where = net.decoder.placed(inputs)
  x = net.decoder.embedded(net.embed, inputs)
  name = f"{'serial' if method == 'houlsby' else 'parallel'}_gelu"
  pick = lambda owner: getattr(owner.adapter, name)
  for block in net.decoder.layers:
    want = block_by_hand(m.config, block, x, where, method, pick)
    x = block(x, where)[0]
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


WIDE = dict(d_model=64, d_ff=128, head_dim=16)
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


def refused(call, *words):
  with pytest.raises(InputError) as error:
    call()
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "\n" not in str(error.value)


@slow
@pytest.mark.parametrize("method", ["houlsby", "parallel"])
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_what_is_generated_is_what_full_passes_choose(method, shape):
  more = {} if shape == "decoder" else dict(
    shape=shape, layer_pattern=("global",), window=None, decoder_start_id=1,
  )  # fmt: skip
  m = adapted(tiny.model(**more), method=method, bottleneck=5)
  assert (("cross_attn" in str(list(flatten_dict(m.params)))) and method == "houlsby") == (
    shape == "encoder_decoder" and method == "houlsby"
  )
  prompt = m.tokenizer.encode("def f(n):")
  (made,) = generate(m, [prompt], max_new_tokens=8)
  reads = list(prompt) if shape == "decoder" else [1]
  for token in made.tokens:
    row = dict(decoder_tokens=np.array([reads])) if shape != "decoder" else {}
    logits = m(np.array([prompt if row else reads]), **row)
    assert int(np.argmax(logits[0, -1])) == token
    reads.append(token)
  beams = generate(m, [prompt, prompt[:3]], max_new_tokens=6, num_beams=3)
  alone = generate(m, [prompt], max_new_tokens=6, num_beams=3)
  assert beams[0].tokens == alone[0].tokens


@slow
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_packed_is_separate_and_a_target_leaves_other_layers_as_they_are(method):
  m = adapted(tiny.model(), method=method, bottleneck=5)
  row, seg = TOKENS[:1], np.array([[1] * 5 + [2] * 7])
  packed = m(row, segments=seg)
  np.testing.assert_allclose(packed[:, :5], m(row[:, :5]), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(packed[:, 5:], m(row[:, 5:]), rtol=1e-4, atol=1e-4)
  base = tiny.model(layer_pattern=("global",), window=None)
  one = adapted(base, method=method, bottleneck=5, targets=("layers.1.mlp",))
  (down,) = [a for p, a in flatten_dict(one.params).items() if p[-1] == "down"]
  assert down.shape == (2, 32, 5)


@slow
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_over_quantized_matrices_they_compute_as_over_the_values_these_stand_for(name):
  m = adapted(quantized(tiny.model(**WIDE), name), method="houlsby", bottleneck=5)
  got, want = m(TOKENS), plain(m)(TOKENS)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@slow
def test_a_saved_model_keeps_its_bottlenecks_quantized_too_and_on_a_mesh(tmp_path):
  m = adapted(tiny.model(**WIDE), method="parallel", bottleneck=5, activation="gelu_tanh")
  model.save(m, tmp_path / "m")
  back = model.load(tmp_path / "m")
  jax.tree.map(np.testing.assert_array_equal, back.params, m.params)
  np.testing.assert_array_equal(back(TOKENS), m(TOKENS))
  small = model.load(tmp_path / "m", quantize="int8")
  model.save(small, tmp_path / "small")
  np.testing.assert_array_equal(model.load(tmp_path / "small")(TOKENS), small(TOKENS))
  assert np.abs(small(TOKENS) - m(TOKENS)).max() > 1e-3
  grid = make_mesh(data=2, fsdp=2, tensor=2)
  many = model.load(tmp_path / "m", mesh=grid)
  with jax.set_mesh(grid):
    np.testing.assert_allclose(many(TOKENS), m(TOKENS), atol=1e-4 * np.abs(m(TOKENS)).max())
  refused(lambda: model.loading.source(tmp_path / "m"), "has bottleneck adapters", "of its base")


def test_what_has_no_place_for_bottlenecks_is_refused(tmp_path):
  m = adapted(tiny.model(), method="houlsby")
  refused(m.merged, "no matrix of it can hold", "format='orbax'")
  refused(lambda: model.save(m, tmp_path / "a", format="peft"), "torch PEFT has no method for")
  refused(lambda: model.save(m, tmp_path / "b", format="hf"), "folders of Hugging Face's")
  refused(lambda: combined([m, m], [0.5, 0.5]), "is not LoRA's")
  base = tiny.model()
  refused(lambda: adapted(base, method="pfeiffer", targets=("attn",)), "has 'attn', which matches")
  refused(lambda: adapted(base, method="houlsby", targets=("q_proj",)), "matches nothing")
  refused(lambda: adapted(base, method="lora", bottleneck=4), "peft.bottleneck=4 has no effect")
  refused(lambda: adapted(base, method="houlsby", rank=4), "peft.rank=4 has no effect")
  refused(lambda: adapted(base, method="houlsby", bottleneck=0), "peft.bottleneck=0 must be at")
  refused(
    lambda: adapted(base, method="parallel", scale=-1.0), "peft.scale=-1.0 must be a positive"
  )
  refused(lambda: adapted(base, method="houlsby", activation="swish"), "peft.activation='swish'")
