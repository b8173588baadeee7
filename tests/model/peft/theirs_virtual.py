"""Virtual tokens of torch PEFT on the tiny models of `theirs`."""

import warnings
from typing import Any

from tests.model.peft import theirs

peft, torch = theirs.peft, theirs.torch
COUNT = 3
KINDS = ("prompt", "prefix", "projected", "mlp", "lstm")
CLASSES = {"bert": ("SEQ_CLS", "BertForSequenceClassification"),
           "bert_tokens": ("TOKEN_CLS", "BertForTokenClassification")}  # fmt: skip


def config(name: str, kind: str, **changes) -> Any:
  """PEFT's config of a kind of virtual tokens for a model."""
  task = theirs.TASK.get(name) or CLASSES[name][0]
  common = dict(task_type=task, num_virtual_tokens=COUNT, **changes)
  if kind == "prompt":
    return peft.PromptTuningConfig(**common)
  if kind in ("prefix", "projected"):
    more = dict(prefix_projection=True, encoder_hidden_size=10) if kind == "projected" else {}
    return peft.PrefixTuningConfig(**common, **more)
  more = dict(encoder_num_layers=2) if kind == "lstm" else {}
  return peft.PromptEncoderConfig(
    **common, **more, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=6
  )


def adapted(model, settings, seed: int = 1):
  """The model with virtual tokens as PEFT begins them."""
  torch.manual_seed(seed)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return peft.get_peft_model(model, settings).eval()


def say(pm, name: str, *, grad: bool = False):
  """Logits of two rows of tokens, those of their own tokens only."""
  rows = torch.tensor(theirs.tokens())
  more = dict(decoder_input_ids=rows[:, :5]) if name == "t5" else {}
  with torch.set_grad_enabled(grad):
    logits = pm(input_ids=rows, attention_mask=torch.ones_like(rows), **more).logits
  own = 5 if name == "t5" else rows.shape[1]
  return logits if logits.ndim == 2 else logits[:, logits.shape[1] - own :]
