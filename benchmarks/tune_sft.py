"""SmolLM2 tuned to instructions by LoRA beside PEFT and TRL: see benchmarks/tune.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks.tune_processes import finished, set_all, train
from configs import sft_smollm2
from train.config import Config

# As all of them are in models like this one.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings(folder: str, data: str, cache: str, steps: int) -> dict[str, object]:
  """What is set beside configs/sft_smollm2.py: rows as short as these conversations allow."""
  return {
    "init_from": folder, "data.source": data, "cache_dir": cache, "steps": steps,
    "seq_len": 256, "batch_size": 4, "log_every": 1, "eval_every": steps, "checkpoint_every": steps,
  }  # fmt: skip


def config_of(values: dict[str, object]) -> Config:
  """The config of these settings, with the tokenizer of its base."""
  config = set_all(sft_smollm2.get_config(), values)
  config.data.tokenizer = config.init_from or ""
  return config


def write_plan(path: Path, values: dict[str, object]) -> None:
  """Writes what the peer is to learn: the conversations of each step, and its learning rate."""
  from train.data.pipeline import load_data
  from train.schedules import make_schedule

  config = config_of(values)
  data, o = load_data(config), config.optimizer
  schedule = make_schedule(o, config.steps)
  plan = dict(
    task="sft", model=config.init_from, seed=config.seed, rank=config.peft.rank,
    alpha=config.peft.alpha, targets=TARGETS, clip_norm=o.clip_norm,
    rates=[float(np.asarray(schedule(step))) for step in range(config.steps)], **o.moments(),
    steps=[conversations(data.batch(step)) for step in range(config.steps)],
  )  # fmt: skip
  path.write_text(json.dumps(plan))


def conversations(batch: dict[str, np.ndarray]) -> list[dict[str, list[int]]]:
  """Those of a packed batch, with -100 as the label of what is not learned."""
  found = []
  for i, segments in enumerate(batch["segments"]):
    for number in range(1, segments.max() + 1):
      here = segments == number
      tokens, targets = batch["tokens"][i, here], batch["targets"][i, here]
      labels = np.where(batch["weights"][i, here] > 0, targets, -100)
      found.append(
        dict(input_ids=[*tokens.tolist(), int(targets[-1])], labels=[-100, *labels.tolist()])
      )
  return found


def losses(values: dict[str, object], adapters: dict[str, str | None]) -> dict[str, float]:
  """Nats a learned token of the validation conversations, for the base (None) and each adapter."""
  import jax
  import jax.numpy as jnp

  import model
  from train.data.pipeline import load_data

  config = config_of(values)
  data, found = load_data(config), {}

  @jax.jit
  def nats(logits, targets, weights):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(chosen * weights).sum(), weights.sum()

  for name, adapter in adapters.items():
    m = model.load(config.init_from or "", adapter=adapter, dtype="float32")
    sums = np.zeros(2)
    for batch in data.validation_batches():
      read = {name: jnp.asarray(batch[name]) for name in ("segments", "positions")}
      logits = m(jnp.asarray(batch["tokens"]), **read)
      sums += np.array(nats(logits, batch["targets"], batch["weights"]))
    found[name] = float(sums[0] / sums[1])
  return found


@dataclasses.dataclass(frozen=True)
class Run:
  """What a process gave."""

  tokens_per_second: float  # Of all steps but the first, without padding.
  seconds: float  # From the start of the process to its end.
  peak_mib: float
  adapter: str


def ours(folder: Path, name: str, values: dict[str, object], **more: object) -> Run:
  """`python -m train`, as a user starts it."""
  workdir = folder / name
  done = train("configs/sft_smollm2.py", workdir, values | more)
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  rates = [line["tokens_per_second"] for line in lines if "loss" in line][1:]
  tokens = tokens_of(folder)[1:]
  spent = sum(n / rate for n, rate in zip(tokens, rates, strict=True))
  return Run(sum(tokens) / spent, *done, str(workdir))


def theirs(folder: Path, name: str, *, recompute: bool, padding_free: bool) -> Run:
  """benchmarks/tune_peer.py."""
  target, plan = folder / name, folder / f"{name}.json"
  target.mkdir()
  values = json.loads((folder / "plan.json").read_text())
  plan.write_text(json.dumps(values | dict(recompute=recompute, padding_free=padding_free)))
  done = finished(["-m", "benchmarks.tune_peer", f"--plan={plan}", f"--target={target}"])
  tokens = tokens_of(folder)[1:]
  seconds = json.loads((target / "told.json").read_text())["seconds"][1:]
  return Run(sum(tokens) / sum(seconds), *done, str(target))


def tokens_of(folder: Path) -> list[int]:
  """Tokens that are read in each step."""
  steps = json.loads((folder / "plan.json").read_text())["steps"]
  return [sum(len(one["input_ids"]) - 1 for one in step) for step in steps]
