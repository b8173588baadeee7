"""Tasks on texts and pairs are learned by adapters on every shape, and the configs of them run."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

import infer
import model
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.peft.attach import apart
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests.train.objectives import tasks
from tests.train.objectives.test_replaced_token import DISCRIMINATOR, electra
from tests.train.test_init_from import BERT
from train.config import Config, DataConfig, OptimizerConfig, PeftConfig
from train.loop import train

T5 = dict(positions="t5_bias", norm_eps=1e-6, activation="gelu_tanh", max_positions=None)


def base(folder, shape, head=None, **changes):
  """A random model with a tokenizer, as a workdir, and a table of its words."""
  tokenizer = build_tokenizer("wordpiece", 60, [" ".join(tasks.WORDS) + " 0123456789"])
  tokenizer.config["trained_as"] = "wordpiece:60"
  made = tasks.config(folder, "classification", shape, **changes).model
  made = dataclasses.replace(made, vocab_size=tokenizer.vocab_size, head=head, pooling=None)
  if shape == "encoder_decoder":
    made = dataclasses.replace(made, decoder_start_id=tokenizer.pad_id)
  rows = tasks.rows(60)
  for row in rows:
    row["label"] = "yes" if "bee" in row["text"] else "no"
  tasks.write(folder / "rows.jsonl", rows)
  m = Model(made, init_params(made, jax.random.key(3)), tokenizer)
  model.save(m, folder / "base")
  return m


def config_of(name: str, folder, **changes) -> Config:
  """A config of the repository, for so few steps on so small a table."""
  made = importlib.import_module(f"configs.{name}").get_config()
  data = dataclasses.replace(made.data, source=str(folder / "rows.jsonl"), **changes)
  return dataclasses.replace(
    made, steps=3, batch_size=8, seq_len=32, log_every=1, eval_every=3, checkpoint_every=3,
    cache_dir=str(folder / "cache"), data=data,
    optimizer=dataclasses.replace(made.optimizer, warmup_steps=1),
  )  # fmt: skip


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


@pytest.mark.slow
def test_an_adapter_and_a_generator_of_replaced_tokens_are_loaded_without_the_generator(tmp_path):
  tokenizer = build_tokenizer("bytes", None, [])
  body = dataclasses.replace(DISCRIMINATOR, vocab_size=tokenizer.vocab_size)
  m = Model(body, init_params(body, jax.random.key(3)), tokenizer)
  model.save(m, tmp_path / "base")
  (tmp_path / "text.txt").write_text("\n".join(f"{i} is {i * 7}" for i in range(100)))
  made = electra(
    init_from=str(tmp_path / "base"), cache_dir=str(tmp_path / "cache"), model=ModelConfig(),
    data=DataConfig(source=str(tmp_path / "text.txt"), documents="line"), steps=1, batch_size=8,
    seq_len=16, checkpoint_every=1, peft=PeftConfig(method="lora", rank=2, also=("generator",)),
    optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.03),
  )  # fmt: skip
  alone = dataclasses.replace(made, peft=PeftConfig(method="full", targets=("encoder",)))
  with pytest.raises(InputError, match=r"name 'generator' in peft\.targets"):
    train(alone, tmp_path / "none")
  assert train(made, tmp_path / "run") == 0
  tuned = model.load(tmp_path / "run")
  assert "generator" not in tuned.params and same(apart(tuned.params)[0], m.params)
  tokens = np.random.default_rng(0).integers(1, 250, (2, 12))
  assert np.abs(tuned(tokens) - m(tokens)).max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
def test_labels_are_learned_by_an_adapter_and_a_new_head(tmp_path, shape):
  m = base(tmp_path, shape)
  made = tasks.config(
    tmp_path, "classification", shape, tokenizer="bpe:4096", init_from=str(tmp_path / "base"),
    batch_size=8, steps=60, eval_every=60, checkpoint_every=60, seq_len=48,
  )  # fmt: skip
  made = dataclasses.replace(
    made, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=3),
    peft=PeftConfig(rank=4, method="lora", also=("head",)),
  )  # fmt: skip
  assert train(made, tmp_path / "run") == 0
  tuned = model.load(tmp_path / "run")
  frozen = {k: v for k, v in apart(tuned.params)[0].items() if k != "head"}
  assert same(frozen, {k: v for k, v in m.params.items() if k in frozen})
  texts = ["a bee can dig", "fine green hat", "in july bee", "every hat"]
  assert [told[0].label for told in infer.classify(tuned, texts)] == ["yes", "no", "yes", "no"]


@pytest.mark.slow
def test_the_config_of_sentiment_runs_on_a_small_folder(tmp_path):
  m = base(tmp_path, "encoder", "masked_lm", **BERT, head_dense=True, logit_bias=True)
  masked = dataclasses.replace(m.config, head_norm=True)
  m = Model(masked, init_params(masked, jax.random.key(3)), m.tokenizer)
  model.save(m, tmp_path / "folder", format="hf")
  made = config_of("lora_bert_sst2", tmp_path, text="text", label="label", validation_source=None)
  made = dataclasses.replace(made, init_from=str(tmp_path / "folder"))
  assert train(made, tmp_path / "run") == 0
  tuned = model.load(tmp_path / "run")
  assert tuned.labels == ("no", "yes") and tuned.config.pooling == "mean"
  assert infer.classify(tuned, ["a bee"])[0][0].label in ("no", "yes")


@pytest.mark.slow
def test_the_config_of_summaries_runs_on_a_small_checkpoint(tmp_path, capsys):
  base(tmp_path, "encoder_decoder", **T5)
  made = config_of("lora_t5_summarize", tmp_path, text="text", target="other")
  made = dataclasses.replace(made, init_from=str(tmp_path / "base"), target_len=24)
  assert train(made, tmp_path / "run") == 0
  assert " -> " in capsys.readouterr().out  # A summary of what was held out.
  tuned = model.load(tmp_path / "run")
  assert infer.generate(tuned, ["a bee can dig"], max_new_tokens=4)[0].tokens
