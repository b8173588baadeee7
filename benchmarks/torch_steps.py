"""Training steps of Transformers' models with torch.optim.AdamW, as their users write them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import has_gpu
from train.config import Config
from train.objectives.objective import Batch


def make(
  case: str, config: Config, batch: Batch, steps: int, *, compiled: bool
) -> Callable[[], None]:
  """What takes `steps` optimizer steps on `batch`, with the settings of `config`."""
  import torch

  device = "cuda" if has_gpu() else "cpu"
  model = {"gpt2": _gpt2, "bert": _bert, "t5": _t5}[case]()
  torch.nn.Module.to(model, device)
  o, moments = config.optimizer, config.optimizer.moments()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=o.learning_rate, betas=(moments["b1"], moments["b2"]),
    weight_decay=o.weight_decay,
  )  # fmt: skip
  forward = torch.compile(model) if compiled else model
  inputs = {
    name: torch.tensor(array, dtype=torch.long, device=device)
    for name, array in _inputs(case, batch).items()
  }
  labels = inputs.pop("labels").flatten()

  def step() -> None:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
      logits = forward(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if o.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
    optimizer.step()

  def run() -> None:
    for _ in range(steps):
      step()
    if device == "cuda":
      torch.cuda.synchronize()

  return run


def _inputs(case: str, batch: Batch) -> dict[str, np.ndarray]:
  """Arguments of the model, and the labels of its logits (-100: none)."""
  if case == "t5":
    return dict(
      input_ids=batch["tokens"], decoder_input_ids=batch["decoder_tokens"],
      labels=batch["decoder_targets"],
    )  # fmt: skip
  if case == "gpt2":
    return dict(input_ids=batch["tokens"], labels=batch["targets"])
  labels = np.full_like(batch["tokens"], -100)
  np.put_along_axis(labels, batch["masked_places"], batch["masked_targets"], axis=1)
  return dict(input_ids=batch["tokens"], labels=labels)


def _gpt2() -> Any:
  from transformers import GPT2Config, GPT2LMHeadModel

  return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def _bert() -> Any:
  from transformers import BertConfig, BertForMaskedLM

  return BertForMaskedLM(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def _t5() -> Any:
  from transformers import T5Config, T5ForConditionalGeneration

  return T5ForConditionalGeneration(
    T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, dropout_rate=0.0)
  )
