"""Small tables and models that the tests of tasks share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from model.config import ModelConfig
from model.heads import init_params
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig
from train.data.pipeline import Data, load_data
from train.objectives import make_objective
from train.program import make_loss
from train.resolve import check_fit, resolved

COLUMNS = {
  "seq2seq": dict(target="other"),
  "classification": dict(label="label"),
  "pairs": dict(text_pair="other", label="label"),
  "tagging": dict(text="words", label="tags"),
  "span_qa": dict(text_pair="other", label="answer"),
  "contrastive": dict(text_pair="other", negative="third"),
  "sft": {},
}
WORDS = ["a", "bee", "can", "dig", "every", "fine", "green", "hat", "in", "july"]


def rows(
  number: int, seed: int = 0, words: int = 7, others: int | None = None
) -> list[dict[str, Any]]:
  """Rows with a column for every objective; texts have 1 to `words` words, second ones `others`."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(number):
    sizes = (words, others or words, words)
    texts = [rng.choice(WORDS, rng.integers(1, size + 1)).tolist() for size in sizes]
    text, other, third = map(" ".join, texts)
    first = int(rng.integers(0, len(texts[1])))
    start = len(" ".join([*texts[1][:first], ""])) if first else 0
    answer: dict[str, Any] = dict(text=[texts[1][first]], answer_start=[start])
    out.append(dict(
      text=f"{text} {i}", other=other, third=third, label=["no", "yes", 7][rng.integers(0, 3)],
      labels=[w for w in ("x", "y", "z") if rng.random() < 0.5], number=float(rng.normal()),
      prompt=text, completion=other, words=texts[0], tags=[w[0] for w in texts[0]],
      answer=answer if i % 4 else dict(text=[], answer_start=[]),
    ))  # fmt: skip
  return out


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def config(folder: Path, objective: str, shape: str = "encoder", **changes) -> Config:
  """A tiny run; `changes` are of any section, by name of field."""
  split = lambda cls: {
    f.name: changes.pop(f.name) for f in dataclasses.fields(cls) if f.name in changes
  }
  model: dict[str, Any] = dict(
    num_layers=1, d_model=16, d_ff=32, num_heads=2, max_positions=96, vocab_multiple=8,
    dtype="float32", pooling="first" if shape == "encoder" else "last",
  ) | split(ModelConfig)  # fmt: skip
  columns = COLUMNS[objective]
  name = "classification" if objective == "pairs" else objective
  data: dict[str, Any] = dict(
    source=str(folder / "rows.jsonl"), tokenizer="bytes", validation_fraction=0.0
  ) | columns  # fmt: skip
  data |= split(DataConfig)
  writes = shape == "encoder_decoder" and name == "seq2seq"
  rest: dict[str, Any] = dict(
    steps=50, batch_size=1, seq_len=96, target_len=80 if writes else None,
    cache_dir=str(folder / "cache"),
  )  # fmt: skip
  settings = {"stride": 8} if name == "span_qa" else {}
  names = {f.name for f in dataclasses.fields(ObjectiveConfig)}
  settings |= {k: changes.pop(k) for k in list(changes) if k in names}
  made = Config(
    optimizer=OptimizerConfig(name="sgd", warmup_steps=0), **(rest | changes),
    model=ModelConfig(shape=shape, **model), data=DataConfig(**data),
    objective=ObjectiveConfig(name=name, **settings),
  )  # fmt: skip
  check_fit(made)
  return made


def epoch(config: Config) -> tuple[Config, Data, dict[str, np.ndarray]]:
  """(resolved config, data, all rows of an epoch as one batch)."""
  data = load_data(config)
  found = [data.batch(step) for step in range(data.rows_per_epoch)]
  return resolved(config, data), data, {k: np.concatenate([b[k] for b in found]) for k in found[0]}


def fresh(config: Config, seed: int = 0) -> dict:
  return init_params(config.model, jax.random.key(seed))


def network(config: Config, params: dict) -> Any:
  objective = make_objective(config)
  net = nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0)))
  return nnx.merge(nnx.split(net, nnx.Param)[0], params)


def gradient(config: Config, params: dict, batch: dict[str, np.ndarray]):
  """(sum of the loss, weight, means, gradients of the sum)."""
  objective = make_objective(config)
  net = nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0)))
  loss_fn = make_loss(nnx.split(net, nnx.Param)[0], objective)

  def total(params, batch):
    loss = loss_fn(params, {}, batch, None)
    return loss.terms["loss"], loss.means

  (value, means), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)
  weight = float(objective.weights(batch)["loss"])
  return float(value), weight, jax.device_get(means), jax.device_get(grads)
