"""A tiny random model with a byte tokenizer, which the tests of inference share."""

import dataclasses

import jax

from model.config import ModelConfig
from model.heads import abstract, init_params
from model.peft.attach import together
from model.peft.config import PeftConfig
from model.peft.create import adapter_maker
from model.trained import Model
from model.vocabulary import build_tokenizer

CONFIG = ModelConfig(
  vocab_size=260, vocab_multiple=8, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
  head_dim=8, max_positions=96, init_std=0.3, layer_pattern=("local", "global"), window=5,
)  # fmt: skip
PROMPTS = ("Hi", "Some words: é", "x", "def f(n):\n")


def model(seed: int = 0, **changes) -> Model:
  """Random and sure of itself: without repeating one token for ever, as smaller weights do."""
  cfg = dataclasses.replace(CONFIG, **changes)
  params = init_params(cfg, jax.random.key(seed))
  return Model(cfg, params, build_tokenizer("bytes", None, []))


def adapted(m: Model, seed: int, noise: float = 0.1, **settings) -> Model:
  """`m` with a random adapter that does something."""
  config = PeftConfig(**{**dict(method="lora", alpha=3.0), **settings})
  new = adapter_maker(config, m.config, abstract(m.config))(m.params, jax.random.key(seed))
  moved = lambda a: a + noise * jax.random.normal(jax.random.key(seed), a.shape)
  stays = ("scale", "start_a", "start_b")
  new = jax.tree_util.tree_map_with_path(lambda p, a: a if p[-1].key in stays else moved(a), new)
  return dataclasses.replace(m, params=together(m.params, new))
