"""LoRA with PEFT as its users train it: TRL's SFTTrainer, and a Transformers classifier.

`python -m benchmarks.tune` starts this in a process of its own, which imports nothing of ours, so
that its memory is that of its users. What it learns, in which order and at which rates, is in the
plan that it is given.
"""

# Their types are not ours, and the packages need not be there.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import json
import time
from pathlib import Path
from typing import Any

from absl import app, flags

_PLAN = flags.DEFINE_string("plan", None, "JSON: what to learn.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Folder for the adapter.", required=True)


def main(_: list[str]) -> None:
  plan = json.loads(Path(_PLAN.value).read_text())
  told = {"sft": instructions, "classification": sentiment}[plan["task"]](plan, _TARGET.value)
  (Path(_TARGET.value) / "told.json").write_text(json.dumps(told))


def lora(plan: dict, task: str, **more: Any):
  """PEFT's config of the plan's adapter."""
  import peft

  return peft.LoraConfig(
    r=plan["rank"], lora_alpha=plan["alpha"], lora_dropout=0.0, bias="none", task_type=task,
    target_modules=plan["targets"], **more,
  )  # fmt: skip


def instructions(plan: dict, target: str) -> dict:
  """TRL's trainer: each step's conversations are padded to the longest, as it does by default, or
  laid behind each other with `padding_free`.
  """
  import datasets
  import torch
  import transformers
  import trl

  steps: list[list[dict]] = plan["steps"]
  ends = [sum(map(len, steps[: i + 1])) for i in range(len(steps))]
  batches = [list(range(end - len(step), end)) for step, end in zip(steps, ends, strict=True)]
  rates, clock = plan["rates"], []

  class Trainer(trl.SFTTrainer):
    def get_train_dataloader(self):
      return self.accelerator.prepare(
        torch.utils.data.DataLoader(
          self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator
        )
      )

    def create_scheduler(self, num_training_steps, optimizer=None):
      self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer or self.optimizer, lambda step: rates[min(step, len(rates) - 1)] / max(rates)
      )
      return self.lr_scheduler

  class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
      clock.append(time.perf_counter())

    def on_step_end(self, *_, **__):
      clock.append(time.perf_counter())

  transformers.set_seed(plan["seed"])
  trainer = Trainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32),
    processing_class=transformers.AutoTokenizer.from_pretrained(plan["model"]),
    train_dataset=datasets.Dataset.from_list([one for step in steps for one in step]),
    peft_config=lora(plan, "CAUSAL_LM"), callbacks=[Clock()],
    args=trl.SFTConfig(
      output_dir=target, max_steps=len(steps), learning_rate=max(rates), adam_beta1=plan["b1"],
      adam_beta2=plan["b2"], adam_epsilon=plan["eps"], weight_decay=0.0, optim="adamw_torch",
      max_grad_norm=plan["clip_norm"], use_cpu=True, bf16=False, max_length=None,
      padding_free=plan["padding_free"], gradient_checkpointing=plan["recompute"],
      dataset_kwargs=dict(skip_prepare_dataset=True), report_to="none", save_strategy="no",
      logging_strategy="no", seed=plan["seed"], disable_tqdm=True,
    ),
  )  # fmt: skip
  trainer.train()
  trainer.model.save_pretrained(target)
  seconds = [end - begin for begin, end in zip(clock[::2], clock[1::2], strict=True)]
  return dict(seconds=seconds)


def sentiment(plan: dict, target: str) -> dict:
  """Transformers' encoder with PEFT's LoRA and a linear layer behind the mean of its states."""
  import peft
  import torch
  import transformers
  from torch.nn import functional as F

  torch.manual_seed(plan["seed"])
  body = transformers.AutoModel.from_pretrained(plan["model"], dtype=torch.float32)
  width, labels = body.config.hidden_size, plan["labels"]
  net: Any = peft.get_peft_model(body, lora(plan, "FEATURE_EXTRACTION"))
  head = torch.nn.Linear(width, labels)
  torch.nn.init.normal_(head.weight, std=0.02)
  torch.nn.init.zeros_(head.bias)
  trained = [p for p in (*net.parameters(), *head.parameters()) if p.requires_grad]
  adamw = torch.optim.AdamW(
    trained, betas=(plan["b1"], plan["b2"]), eps=plan["eps"], weight_decay=0.0
  )

  def scores(texts: list[list[int]]):
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    there = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    states = net(input_ids=ids, attention_mask=there).last_hidden_state
    return head((states * there[..., None]).sum(1) / there.sum(1, keepdim=True))

  net.eval()  # Without dropout, as ours.
  for batch, rate in zip(plan["steps"], plan["rates"], strict=True):
    texts, answers = [one["ids"] for one in batch], [one["label"] for one in batch]
    adamw.zero_grad(set_to_none=True)
    F.cross_entropy(scores(texts), torch.tensor(answers)).backward()
    torch.nn.utils.clip_grad_norm_(trained, plan["clip_norm"])
    for group in adamw.param_groups:
      group["lr"] = rate
    adamw.step()
  with torch.no_grad():
    found = [int(scores([one["ids"]]).argmax()) for one in plan["validation"]]
  right = sum(a == one["label"] for a, one in zip(found, plan["validation"], strict=True))
  return dict(accuracy=100 * right / len(found))


if __name__ == "__main__":
  app.run(main)
