"""What the data decides about a model: vocabulary, head, labels, and whether objective and shape
fit together.
"""

import dataclasses
from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.errors import InputError
from model.inputs import decoder_start
from model.peft.config import VIRTUAL, PeftConfig
from model.tokenizer import Tokenizer
from train.config import Config
from train.data.roles import check_columns

if TYPE_CHECKING:
  from train.data.pipeline import Data

# The shapes that each objective trains, and the head that it needs there.
SHAPES = {
  "causal_lm": {"decoder": "language"},
  "prefix_lm": {"decoder": "language", "encoder_decoder": "language"},
  "masked_lm": {"encoder": "masked_lm"},
  "replaced_token": {"encoder": "replaced_token"},
  "span_corruption": {"encoder_decoder": "language"},
  "denoising": {"encoder_decoder": "language"},
  "ul2": {"encoder_decoder": "language", "decoder": "language"},
  "seq2seq": {"encoder_decoder": "language", "decoder": "language"},
  "sft": {"decoder": "language"},
  "classification": dict.fromkeys(("encoder", "decoder", "encoder_decoder"), "sequence"),
  "tagging": {"encoder": "token", "decoder": "token"},
  "span_qa": {"encoder": "span", "decoder": "span"},
  "contrastive": dict.fromkeys(("encoder", "decoder", "encoder_decoder"), "embedding"),
}

PREFIXED = ("prefix_lm", "ul2")  # Whose decoders read a prompt in both directions.


def check_fit(config: Config) -> None:
  """Raises an InputError if objective, shape, head and lengths do not fit together."""
  name, model = config.objective.name, config.model
  fitting = SHAPES[name]
  if model.shape not in fitting:
    instead = ""
    if name == "sft" and model.shape == "encoder_decoder":
      instead = (
        " An encoder–decoder reads what is asked and writes the answer: use objective.name=seq2seq "
        "with data.text and data.target (for example instruction and output)."
      )
    raise InputError(
      f"objective.name={name!r} trains model.shape {' or '.join(fitting)}, not {model.shape!r}."
      f"{instead}"
    )
  if model.head is not None and model.head != fitting[model.shape]:
    raise InputError(
      f"objective.name={name!r} trains the head {fitting[model.shape]!r}, not model.head="
      f"{model.head!r}: leave it out."
    )
  if model.prefix_attention and name not in PREFIXED:
    raise InputError(f"model.prefix_attention is trained by {' and '.join(PREFIXED)}, not {name}.")
  if model.pair_head and not config.objective.paired:
    raise InputError("model.pair_head is trained by objective.pairs: set it, or leave both out.")
  check_columns(config)
  _check_task(config)
  _check_virtual(config)
  writes = model.shape == "encoder_decoder" and fitting[model.shape] == "language"
  if writes and config.target_len is None:
    raise InputError("target_len is not set: tokens that the decoder of a row reads are needed.")
  if not writes and config.target_len is not None:
    raise InputError(f"target_len={config.target_len} has no effect: no decoder writes here.")
  limit = model.max_positions
  if writes and limit is not None and (config.target_len or 0) > limit:
    raise InputError(
      f"target_len={config.target_len} is longer than model.max_positions={limit}: shorten it or "
      "give the model more positions."
    )


def _check_virtual(config: Config) -> None:
  """What virtual tokens leave no room for, or cannot stand before."""
  peft, limit = config.peft, config.model.max_positions
  if peft.method not in VIRTUAL:
    return
  name, count = config.objective.name, peft.virtual_tokens
  if name == "replaced_token":
    raise InputError(
      f"peft.method={peft.method!r} is not for objective.name={name!r}, where two models read: use "
      "lora."
    )
  if peft.before_texts:
    if config.model.shape == "decoder" and name in PREFIXED:
      raise InputError(
        f"peft.method={peft.method!r} is not for objective.name={name!r}, whose decoder reads "
        "prompts in both directions: use 'prefix'."
      )
    if count + 2 > config.seq_len:
      raise InputError(
        f"peft.virtual_tokens={count} leave no room in seq_len={config.seq_len}: raise seq_len."
      )
    return
  writes = config.model.shape == "encoder_decoder" and config.target_len is not None
  field = "target_len" if writes else "seq_len"
  length = getattr(config, field)
  if limit is not None and length + count > limit:
    raise InputError(
      f"{field}={length} and peft.virtual_tokens={count} before each text are together more than "
      f"model.max_positions={limit}: shorten the sequences to {limit - count}."
    )


def check_base(config: Config) -> None:
  """Raises an InputError if a part of a model is trained and nothing has the rest."""
  if config.init_from is None and not config.peft.trains_all:
    raise InputError(
      f"peft.method={config.peft.method!r} trains a part of a model and init_from is not set: name "
      "the checkpoint that has the rest."
    )


def _check_task(config: Config) -> None:
  """What cannot be learned, or has no effect, where a whole text has one answer."""
  name, model, objective = config.objective.name, config.model, config.objective
  if name == "contrastive" and config.accumulation > 1:
    raise InputError(
      f"accumulation={config.accumulation}: contrastive learns against all texts of a batch, and "
      "parts do not see each other. Use accumulation=1 and more devices, or a smaller batch_size."
    )
  if model.problem != "single_label" and name != "classification":
    raise InputError(f"model.problem={model.problem!r} has no effect on {name}: remove it.")
  unread = {"contrastive": ["label_smoothing"]}.get(name, [])
  if model.problem != "single_label":
    unread = ["label_smoothing", "z_loss"]
  for field in unread:
    if getattr(objective, field):
      what = name if model.problem == "single_label" else f"model.problem={model.problem!r}"
      raise InputError(f"objective.{field}={getattr(objective, field)} has no effect on {what}.")


def resolved(config: Config, data: "Data") -> Config:
  """The config with what the data decides, where it says nothing itself.

  Raises:
    InputError: if the model has fewer rows than the tokenizer has tokens, or another number of
      labels than the data.
  """
  model = _with_vocabulary(config.model, data.tokenizer)
  model = with_head(model, config)
  if data.labels is not None and model.problem != "regression":
    if model.num_labels not in (None, len(data.labels)):
      raise InputError(
        f"model.num_labels={model.num_labels}, and the data has {len(data.labels)} labels: leave "
        "it out, or name all of them in data.labels."
      )
    model = dataclasses.replace(model, num_labels=len(data.labels))
  peft = _with_tokens(config.peft, data.tokenizer)
  labelled = dataclasses.replace(config.data, labels=data.labels)
  return dataclasses.replace(config, model=model, data=labelled, peft=peft)


def _with_tokens(peft: PeftConfig, tokenizer: Tokenizer) -> PeftConfig:
  """With the tokens that a prompt begins as."""
  if peft.init_text is None:
    return peft
  tokens = tuple(tokenizer.encode(peft.init_text))
  if not tokens:
    raise InputError(f"peft.init_text={peft.init_text!r} has no token: give some text.")
  return dataclasses.replace(peft, init_tokens=tokens)


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
  size, given = tokenizer.vocab_size, model.vocab_size
  if given is not None and given < size:
    raise InputError(
      f"model.vocab_size={given} is smaller than the tokenizer's {size} tokens: leave it out, or "
      f"set it to {size} or more."
    )
  start = decoder_start(model, tokenizer)
  if start is not None and not 0 <= start < (given or size):
    raise InputError(
      f"model.decoder_start_id={start} is not one of the vocabulary's {given or size} ids: leave "
      "it out, or name one of them."
    )
  return dataclasses.replace(
    model, vocab_size=size if given is None else given, decoder_start_id=start,
  )  # fmt: skip


def with_head(model: ModelConfig, config: Config) -> ModelConfig:
  """The model with the head, and the reading of prefixes, that the objective trains."""
  head = SHAPES[config.objective.name][model.shape]
  prefix = model.shape == "decoder" and config.objective.name in PREFIXED
  return dataclasses.replace(
    model, head=head, pair_head=config.objective.paired, prefix_attention=prefix
  )
