"""Virtual tokens in training: packed rows, meshes, runs from a base to a model that writes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import model
from infer import generate
from model.errors import InputError
from model.peft.attach import attached, together
from model.peft.create import adapter_maker
from model.peft.names import KEY
from model.peft.virtual import virtual_tokens
from model.peft.written import written_out
from model.sharding import make_mesh
from model.trained import Model
from tests.train import tiny
from tests.train.objectives import tasks
from tests.train.peft.test_run import BODY, TOKENS, config, refused, same, world  # noqa: F401
from tests.train.peft.test_shapes import three_steps
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig, PeftConfig
from train.data.pipeline import load_data
from train.loop import train
from train.objectives import make_objective
from train.program import build_program, make_loss
from train.resolve import check_fit, resolved

slow = pytest.mark.slow
COUNT = 3
METHODS = {
  "prompt": dict(method="prompt"),
  "vocabulary": dict(method="prompt", init="vocabulary"),
  "prefix": dict(method="prefix"),
  "projected": dict(method="prefix", projection=True, encoder_width=6),
  "mlp": dict(method="ptuning", encoder_width=6),
  "lstm": dict(method="ptuning", encoder="lstm", encoder_width=6, encoder_layers=1),
}


def peft(name, **changes):
  return PeftConfig(**{"virtual_tokens": COUNT, **METHODS[name], **changes})


def gradient(config, batch):
  """(loss, weight, gradients) of fresh virtual tokens on a fresh model, not at their beginning."""
  objective = make_objective(config)
  base = tasks.fresh(config)
  net = nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0)))
  new = adapter_maker(config.peft, config.model, net)(base, jax.random.key(1))
  whole = lambda new: written_out(together(base, new), config.model)
  net = attached(net, whole(new))
  loss_fn = make_loss(nnx.split(net, nnx.Param)[0], objective)

  def total(new, batch):
    loss = loss_fn(whole(new), {}, batch, None)
    return loss.terms["loss"], loss.means

  (value, means), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(new, batch)
  return (
    Model(config.model, whole(new)),
    float(value),
    objective.weights(batch),
    means,
    grads,
  )


CASES = [
  ("classification", "encoder", "vocabulary"),
  pytest.param("span_qa", "encoder", "vocabulary", marks=slow),
  pytest.param("seq2seq", "encoder_decoder", "vocabulary", marks=slow),
  pytest.param("seq2seq", "encoder_decoder", "prefix", marks=slow),
  pytest.param("classification", "encoder_decoder", "vocabulary", marks=slow),
  pytest.param("classification", "decoder", "vocabulary", marks=slow),
  pytest.param("classification", "encoder", "prefix", marks=slow),
  pytest.param("tagging", "encoder", "vocabulary", marks=slow),
  pytest.param("contrastive", "encoder", "vocabulary", marks=slow),
  pytest.param("sft", "decoder", "vocabulary", marks=slow),
  pytest.param("sft", "decoder", "prefix", marks=slow),
]


@pytest.mark.parametrize(("objective", "shape", "method"), CASES)
def test_packed_equals_separate_in_loss_and_gradients(tmp_path, objective, shape, method):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  made = tasks.config(tmp_path, objective, shape, peft=peft(method), init_from="base",
                      max_positions=112)  # fmt: skip
  packed, _, batch = tasks.epoch(made)
  apart = dataclasses.replace(made, data=dataclasses.replace(made.data, packing=False))
  separate, _, single = tasks.epoch(apart)
  assert batch["segments"].max() > 1 == single["segments"].max()
  _, got, weight, means, grads = gradient(packed, batch)
  _, want, want_weight, want_means, want_grads = gradient(separate, single)
  assert weight == want_weight and np.isfinite(want) and want > 0
  np.testing.assert_allclose(got, want, rtol=2e-5)
  largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(want_grads))
  assert largest > 1e-4
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * min(1.0, largest))
  jax.tree.map(near, means, want_means)
  jax.tree.map(near, grads, want_grads)


@slow
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_loss_is_that_of_the_model_called_on_each_text(tmp_path, method):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  made = tasks.config(tmp_path, "sft", "decoder", peft=peft(method), init_from="base",
                      max_positions=112)  # fmt: skip
  resolved_config, _, batch = tasks.epoch(made)
  m, got, *_ = gradient(resolved_config, batch)
  skip, total = (COUNT if method == "prompt" else 0), 0.0
  for row in range(len(batch["tokens"])):
    for number in range(1, batch["segments"][row].max() + 1):
      own = np.flatnonzero(batch["segments"][row] == number)
      assert (batch["weights"][row, own[:skip]] == 0).all()
      own = own[skip:]
      logits = m(batch["tokens"][row, own][None])[0]
      nats = -jax.nn.log_softmax(logits)[np.arange(len(own)), batch["targets"][row, own]]
      total += float(nats @ batch["weights"][row, own])
  np.testing.assert_allclose(got, total, rtol=1e-5)


def run(folder, shape, settings, devices=1, mesh=None, **changes):
  """(the state before, after three float64 steps, losses)."""
  wide = dict(dtype="float64", param_dtype="float64")
  mesh = MeshConfig() if mesh is None else mesh
  more = dict(
    optimizer=OptimizerConfig(warmup_steps=1, learning_rate=0.05), mesh=mesh, peft=settings,
  )  # fmt: skip
  text, cache = str(folder / "text.txt"), str(folder / "cache")
  if shape == "decoder":
    inner = {k: changes.pop(k) for k in list(changes) if hasattr(tiny.ROTARY, k)}
    body = dataclasses.replace(tiny.ROTARY, vocab_size=None, **wide, **inner)
    data = DataConfig(source=text, tokenizer="bytes", documents="line", validation_fraction=0.1)
    made = tiny.config(body, data=data, cache_dir=cache, seq_len=24, **more, **changes)
  else:
    made = tiny.shape_config(shape, text, cache, **wide, **more, **changes)
  data = load_data(made)
  made = resolved(made, data)
  return three_steps(made, data, mesh, devices)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
  words = ["def", "return", "self", "in", "(x)", "= 1"]
  lines = [" ".join(rng.choice(words, rng.integers(1, 5))) for _ in range(200)]
  (folder / "text.txt").write_text("\n".join(lines))
  return folder


def near(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-9), a, b)


MESHES = {
  "mix": MeshConfig(data=2, fsdp=2, tensor=2),
  "seq_tensor": MeshConfig(data=1, seq=4, tensor=2),
  "stage": MeshConfig(data=2, stage=2, fsdp=2),
}
SHARDED = [("decoder", name, mesh) for name in METHODS for mesh in ("mix", "seq_tensor")]
SHARDED += [("decoder", "prompt", "stage"), ("decoder", "prefix", "stage")]
SHARDED += [("encoder", "prompt", "mix"), ("encoder_decoder", "prompt", "mix")]
SHARDED += [("encoder_decoder", "prefix", "mix"), ("encoder_decoder", "lstm", "seq_tensor")]


@slow
@pytest.mark.parametrize(("shape", "name", "mesh"), SHARDED)
def test_eight_devices_equal_one_and_the_rest_is_frozen(text, shape, name, mesh):
  also = ("head",) if shape == "encoder" else ()
  settings = peft(name, dtype="float64", also=also)
  changes = dict(num_layers=4) if mesh == "stage" else {}
  with jax.enable_x64(True):
    before, want, want_losses = run(text, shape, settings, **changes)
    _, got, losses = run(text, shape, settings, 8, MESHES[mesh], **changes)
  assert same(before.frozen, want.frozen)
  leaves = flatten_dict(want.params)
  assert all(KEY in path or path[0] in ("head", "pair") for path in leaves)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, want.params)
  assert all(jax.tree.leaves(changed))
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near(got.params, want.params)
  near(got.opt_state, want.opt_state)


@slow
@pytest.mark.parametrize(
  "changes", [dict(scan_layers=False), dict(remat="full"), dict(accumulation=4)]
)
@pytest.mark.parametrize("name", ["prompt", "prefix", "projected"])
def test_unrolled_rematerialized_and_accumulated_equal_plain(text, name, changes):
  settings = peft(name, dtype="float64")
  with jax.enable_x64(True):
    _, want, want_losses = run(text, "decoder", settings)
    _, got, losses = run(text, "decoder", settings, **changes)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near(got.params, want.params)


@slow
@pytest.mark.parametrize("name", [*METHODS, "text", "quantized"])
def test_a_run_resumes_to_the_bit_loads_writes_and_saves(world, tmp_path, name):  # noqa: F811
  more = {"text": dict(method="prompt", init="text", init_text="1 is"),
          "quantized": dict(method="prompt", init="vocabulary", base_format="int8")}  # fmt: skip
  METHODS_HERE = METHODS | more
  settings = PeftConfig(**{"virtual_tokens": COUNT, **METHODS_HERE[name]})
  made = config(world, peft=settings, mesh=MeshConfig(data=2, fsdp=2, tensor=2), ema_decay=0.5)
  assert train(made, tmp_path / "run") == 0
  shutil.copytree(tmp_path / "run", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
  assert train(made, tmp_path / "again") == 0
  m, again = model.load(tmp_path / "run"), model.load(tmp_path / "again")
  assert same(m.params, again.params) and virtual_tokens(m.params, "decoder") == COUNT
  base = model.load(world / "base")
  assert np.abs(m(TOKENS) - base(TOKENS)).max() > 1e-3
  assert not same(m.params, model.load(tmp_path / "run", ema=True).params)
  read = [list(b"1 is"), list(b"33 is 231 is")]
  for tokens, done in zip(read, generate(m, read, max_new_tokens=6), strict=True):
    for new in done.tokens:
      assert new == int(m(np.array([tokens]))[0, -1].argmax())
      tokens.append(new)
  refused(m.merged, "cannot be merged")
  refused(lambda: model.save(m, tmp_path / "orbax"), "has an adapter")
  model.save(m, tmp_path / "folder", format="peft")
  told = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
  assert told["num_virtual_tokens"] == COUNT
  if name != "quantized":
    back = model.load(world / "base", adapter=tmp_path / "folder")
    np.testing.assert_allclose(back(TOKENS), m(TOKENS), rtol=1e-5, atol=1e-5)
  if name == "text":
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["peft"]["init_tokens"]
    assert saved == m.tokenizer.encode("1 is")


WRONG = {
  "targets": (dict(method="prompt", targets=("attn",)), "peft.targets=('attn',) has no effect"),
  "rank": (dict(method="prefix", rank=4), "peft.rank=4 has no effect on peft.method='prefix'"),
  "none": (dict(method="prompt", virtual_tokens=0), "peft.virtual_tokens=0 must be at least 1"),
  "lora": (dict(method="lora", virtual_tokens=4), "peft.virtual_tokens=4 has no effect"),
  "init": (dict(method="prompt", init="pissa"), "peft.init='pissa' is not known to peft.method"),
  "lora_init": (dict(method="lora", init="text"), "peft.init='text' is not known to peft.method"),
  "no_text": (dict(method="prompt", init="text"), "needs peft.init_text"),
  "idle_text": (dict(method="prompt", init_text="x"), "has no effect on peft.init='default'"),
  "encoder": (dict(method="ptuning", encoder="gru"), "peft.encoder='gru' is not known"),
  "layers": (dict(method="ptuning", encoder_layers=3), "peft.encoder_layers=3 has no effect"),
  "width": (dict(method="prefix", encoder_width=3), "has no effect without peft.projection"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(name):
  settings, message = WRONG[name]
  with pytest.raises(InputError) as error:
    PeftConfig(**settings)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_has_no_place_for_virtual_tokens_is_refused():
  def wrong(method, body=BODY, count=COUNT, **changes):
    settings = PeftConfig(method=method, virtual_tokens=count)
    made = Config(
      model=dataclasses.replace(body, vocab_size=61), peft=settings, init_from="base",
      **{"seq_len": 32, "batch_size": 4, "steps": 2, **changes},
    )  # fmt: skip
    check_fit(made)
    grid = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(grid):
      build_program(made, grid)

  refused(lambda: wrong("prompt", count=31), "leave no room in seq_len=32")
  refused(lambda: wrong("prefix", count=40), "together more than model.max_positions=64")
  latent = dict(num_kv_heads=None, kv_latent_dim=10, q_latent_dim=6, rope_head_dim=2, v_head_dim=3)
  body = dataclasses.replace(BODY, **latent)
  refused(lambda: wrong("prefix", body), "made of latents", "use 'prompt'")
  shared = dataclasses.replace(BODY, num_layers=4, layer_sets=2)
  refused(lambda: wrong("prefix", shared), "layers share their parameters")
  prefixed = tasks.ObjectiveConfig(name="prefix_lm")
  refused(lambda: wrong("prompt", objective=prefixed), "reads prompts in both directions")
