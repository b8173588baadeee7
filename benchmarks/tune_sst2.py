"""LoRA on a pretrained encoder for SST-2 beside PEFT: see benchmarks/tune.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tune_processes import finished, set_all, train
from configs import lora_bert_sst2
from train.config import Config

# In all layers: as ours are named, all matrices of attention and MLPs.
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def settings(
  encoder: str, text: str, validation: str, cache: str, steps: int, seed: int
) -> dict[str, Any]:
  """What is set beside configs/lora_bert_sst2.py."""
  return {
    "init_from": encoder, "data.source": text, "data.validation_source": validation,
    "cache_dir": cache, "steps": steps, "seed": seed, "eval_every": steps,
    "checkpoint_every": steps,
  }  # fmt: skip


def config_of(values: dict[str, Any]) -> Config:
  """The config of these settings, with model and tokenizer of its base."""
  from train.init_from import with_its_model, with_its_tokenizer

  config = set_all(lora_bert_sst2.get_config(), values)
  return with_its_tokenizer(with_its_model(config, None), None)


def write_plan(path: Path, values: dict[str, Any]) -> None:
  """Writes what the peer is to learn: the sentences of each step, and its learning rate."""
  from train.data.pipeline import load_data
  from train.schedules import make_schedule

  config = config_of(values)
  data, o = load_data(config), config.optimizer
  schedule = make_schedule(o, config.steps)
  lines = Path(values["data.validation_source"]).read_text().splitlines()
  held_out = [line.rsplit("\t", 1) for line in lines]
  labels = list(data.labels or ())
  plan = dict(
    task="classification", model=config.init_from, seed=config.seed, rank=config.peft.rank,
    alpha=config.peft.alpha, targets=TARGETS, clip_norm=o.clip_norm, labels=len(labels),
    rates=[float(np.asarray(schedule(step))) for step in range(config.steps)], **o.moments(),
    steps=[sentences(data.batch(step)) for step in range(config.steps)],
    validation=[
      dict(ids=data.tokenizer.encode(text), label=labels.index(label)) for text, label in held_out
    ],
  )  # fmt: skip
  path.write_text(json.dumps(plan))


def sentences(batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
  """Those of a packed batch, with their labels."""
  found = []
  for i, segments in enumerate(batch["segments"]):
    for number in range(1, segments.max() + 1):
      label = int(batch["text_labels"][i, number - 1])
      found.append(dict(ids=batch["tokens"][i, segments == number].tolist(), label=label))
  return found


def ours(folder: Path, values: dict[str, Any]) -> dict[str, float]:
  """`python -m train`, and the share of the validation sentences that `metrics.jsonl` tells."""
  workdir = folder / f"ours_{values['seed']}"
  seconds, peak = train("configs/lora_bert_sst2.py", workdir, values)
  lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
  told = [line["validation_accuracy"] for line in lines if "validation_accuracy" in line][-1]
  return dict(accuracy=100 * told, seconds=seconds, peak_mib=peak)


def theirs(folder: Path, values: dict[str, Any]) -> dict[str, float]:
  """benchmarks/tune_peer.py."""
  plan, target = folder / f"plan_{values['seed']}.json", folder / f"theirs_{values['seed']}"
  write_plan(plan, values)
  target.mkdir()
  seconds, peak = finished(["-m", "benchmarks.tune_peer", f"--plan={plan}", f"--target={target}"])
  return json.loads((target / "told.json").read_text()) | dict(seconds=seconds, peak_mib=peak)
