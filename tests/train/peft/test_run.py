"""A run of an adapter from a base to a model that writes: its files, its resume, its errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import model
from infer import generate
from model.checkpoint import describe
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.peft.attach import KEY, apart, is_adapted
from model.peft.combine import combined
from model.peft.named import named
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests import commands
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig, PeftConfig
from train.loop import train

BODY = ModelConfig(
  vocab_size=259, vocab_multiple=8, num_layers=3, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2,
  max_positions=64,
)  # fmt: skip
LORA = dict(method="lora", rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A folder with a text, and a base that knows nothing of it."""
  folder = tmp_path_factory.mktemp("world")
  (folder / "text.txt").write_text("\n".join(f"{i} is {i * 7} is {i * 3}" for i in range(300)))
  tokenizer = build_tokenizer("bytes", None, [])
  params = init_params(
    dataclasses.replace(BODY, vocab_size=tokenizer.vocab_size), jax.random.key(5)
  )
  config = dataclasses.replace(BODY, vocab_size=tokenizer.vocab_size)
  model.save(Model(config, params, tokenizer), folder / "base")
  return folder


def config(world, **changes) -> Config:
  body = dataclasses.replace(BODY, vocab_size=None)
  return Config(**{
    **dict(steps=4, batch_size=4, seq_len=32, checkpoint_every=2, eval_every=4, keep_checkpoints=4,
           init_from=str(world / "base"), cache_dir=str(world / "cache"), model=body,
           mesh=MeshConfig(data=1, fsdp=2, tensor=4),
           data=DataConfig(source=str(world / "text.txt"), documents="line"),
           optimizer=OptimizerConfig(warmup_steps=1, learning_rate=0.03),
           peft=PeftConfig(**LORA)),
    **changes,
  })  # fmt: skip


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


@pytest.mark.slow
def test_an_adapter_is_trained_resumed_loaded_merged_and_writes(world, capfd):
  assert train(config(world), world / "run") == 0
  said = capfd.readouterr().err
  trained = next(line.split() for line in said.splitlines() if line.split()[:1] == ["trained"])
  steps = world / "run" / "checkpoints"
  saved = describe(steps / "4")
  leaves = flatten_dict(saved.state["params"])
  assert leaves and all(KEY in path for path in leaves)
  assert all(KEY in path for path in flatten_dict(saved.state["frozen"]))
  assert trained[1] == f"{sum(np.prod(a.shape) for a in leaves.values()):,}"
  assert saved.meta["base"]["path"] == str(world / "base" / "checkpoints" / "0")

  # Continued from step 2 with a base that lies elsewhere, it arrives where it had arrived.
  shutil.copytree(world / "run", world / "again")
  shutil.copytree(world / "base", world / "moved")
  for step in ("3", "4"):
    shutil.rmtree(world / "again" / "checkpoints" / step, ignore_errors=True)
  moved = dict(init_from=str(world / "moved"), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  assert train(config(world, **moved), world / "again") == 0
  m, again = model.load(world / "run"), model.load(world / "again")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), m.params, again.params)

  base = model.load(world / "base")
  assert same(apart(m.params)[0], base.params) and is_adapted(m.params)
  merged = m.merged()
  assert np.abs(m(TOKENS) - base(TOKENS)).max() > 1e-3
  np.testing.assert_allclose(merged(TOKENS), m(TOKENS), rtol=1e-4, atol=1e-5)
  prompts = ["1 is 7", "33 is"]
  settings = dict(max_new_tokens=12)
  got = [c.tokens for c in generate(m, prompts, **settings)]
  assert got == [c.tokens for c in generate(merged, prompts, **settings)]
  beams = [c.tokens for c in generate(m, prompts, num_beams=2, **settings)]
  assert beams == [c.tokens for c in generate(merged, prompts, num_beams=2, **settings)]

  done = commands.run(
    "infer", f"--checkpoint={world / 'base'}", f"--adapter={world / 'run'}", "--prompt=1 is 7",
    "--max_new_tokens=12", "--json", f"--cache_dir={world / 'cache'}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["tokens"] == got[0]

  model.save(m, world / "folder", format="peft")
  told = json.loads((world / "folder" / "adapter_config.json").read_text())
  assert told["r"] == 2 and told["lora_alpha"] == 4
  back = model.load(world / "base", adapter=world / "folder")
  np.testing.assert_allclose(back(TOKENS), m(TOKENS), rtol=1e-5, atol=1e-5)
  by_run = model.load(world / "base", adapter=world / "run")
  assert same(by_run.params, m.params)


def refused(call, *words):
  with pytest.raises(InputError) as error:
    call()
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_adapter_is_not_taken_for_a_model_nor_put_on_another_base(world, tmp_path):
  run = world / "run"
  if not run.exists():
    train(config(world), run)
  m, base = model.load(run), world / "base"
  refused(lambda: model.save(m, tmp_path / "hf", format="hf"), "m.merged()")
  refused(lambda: model.save(m, tmp_path / "orbax"), "m.merged()")
  refused(lambda: model.load(base, adapter=run, base=base), "name the base as the checkpoint")
  refused(lambda: model.load(run, adapter=run), "is an adapter itself")
  plain = model.load(base)
  other = Model(plain.config, init_params(plain.config, jax.random.key(9)), plain.tokenizer)
  model.save(other, tmp_path / "other")
  refused(lambda: model.load(run, base=tmp_path / "other"), "another hash", "base=")
  refused(lambda: train(config(world, init_from=str(run)), tmp_path / "b"), "holds an adapter")
  on_other = config(world, init_from=str(tmp_path / "other"))
  refused(lambda: train(on_other, run), "holds other weights than when the run began")


def test_what_has_no_adapter_or_would_not_learn_is_refused(world, tmp_path):
  base = world / "base"
  plain = model.load(base)
  refused(lambda: model.save(plain, tmp_path / "peft", format="peft"), "has no adapter")
  refused(plain.merged, "has no adapter")
  refused(lambda: model.load(base, base=base), "is no adapter, and needs none")
  refused(lambda: model.load(base, adapter=base), "is no adapter")
  refused(lambda: train(config(world, init_from=None), tmp_path / "a"), "init_from is not set")
  tiny = OptimizerConfig(warmup_steps=1, learning_rate=1e-30)
  frozen = dict(peft=PeftConfig(method="full", targets=("mlp",)), optimizer=tiny)
  refused(lambda: train(config(world, **frozen), tmp_path / "c"), "after the first update")


@pytest.mark.slow
def test_adapters_of_one_base_go_together_wherever_it_lies_and_whatever_their_runs_dropped(
  world, tmp_path
):
  one = dict(steps=1, checkpoint_every=1, eval_every=1)
  one |= dict(optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.03))
  shutil.copytree(world / "base", tmp_path / "base")
  begin = str(tmp_path / "base")
  dropping = dataclasses.replace(BODY, vocab_size=None, dropout=0.5)
  assert train(config(world, init_from=begin, **one), tmp_path / "a") == 0
  assert train(config(world, init_from=begin, **one | dict(model=dropping)), tmp_path / "b") == 0
  shutil.move(begin, tmp_path / "moved")
  refused(lambda: model.load(tmp_path / "a"), "which is not there", "--adapter=")
  a, b = (model.load(tmp_path / name, base=tmp_path / "moved") for name in "ab")
  assert a.config == b.config and np.abs(a(TOKENS) - b(TOKENS)).max() > 1e-3
  model.save(a, tmp_path / "folder", format="peft")  # Where the base is now is in the file.
  folder, there = model.load(tmp_path / "folder"), world / "base"
  np.testing.assert_allclose(folder(TOKENS), a(TOKENS), rtol=1e-5, atol=1e-5)
  several = named({"a": folder}).with_adapter("b", tmp_path / "b")
  np.testing.assert_allclose(several.using("b")(TOKENS), b(TOKENS), rtol=1e-4, atol=1e-5)
  both = combined([folder, b], [0.0, 1.0])(TOKENS)
  np.testing.assert_allclose(both, b(TOKENS), rtol=1e-4, atol=1e-5)
  copied = model.load(tmp_path / "a", base=there)  # The same base, by its hash.
  assert np.array_equal(combined([copied, b], [0.0, 1.0])(TOKENS), both)
  elsewhere = model.load(there, adapter=tmp_path / "folder")  # Its file has no hash.
  refused(lambda: combined([elsewhere, b], [1.0, 1.0]), "different bases")


@pytest.mark.slow
@pytest.mark.parametrize("peft", [
  dict(method="full", freeze=("embed", "layers.0")), dict(method="lora", init="pissa", rank=2),
  dict(method="dora", rank=2, targets=("layers.1", "layers.2.mlp")), dict(method="ia3"),
  dict(method="lora", rank=2, targets=("embed", "attn"), dropout=0.0),
])  # fmt: skip
def test_every_method_loads_as_it_was_trained_and_resumes(world, tmp_path, peft):
  settings = dict(peft=PeftConfig(**peft), mesh=MeshConfig(data=2, fsdp=2, tensor=2), ema_decay=0.5)
  assert train(config(world, **settings), tmp_path / "run") == 0
  shutil.copytree(tmp_path / "run", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
  assert train(config(world, **settings), tmp_path / "again") == 0
  m, again = model.load(tmp_path / "run"), model.load(tmp_path / "again")
  assert same(m.params, again.params)
  losses = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert any("validation_loss" in line for line in losses)
  averaged = model.load(tmp_path / "run", ema=True)
  assert not same(m.params, averaged.params)
  settings = dict(max_new_tokens=8)
  if is_adapted(m.params):
    merged = m.merged()
    np.testing.assert_allclose(merged(TOKENS), m(TOKENS), rtol=1e-4, atol=1e-5)
    got = [c.tokens for c in generate(m, ["1 is"], **settings)]
    assert got == [c.tokens for c in generate(merged, ["1 is"], **settings)]
    model.save(m, tmp_path / "folder", format="peft")
    back = model.load(tmp_path / "folder")
    np.testing.assert_allclose(back(TOKENS), m(TOKENS), rtol=1e-4, atol=1e-5)
