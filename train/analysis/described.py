"""A run without its data: what the data would decide about the model is read from the config."""

import dataclasses
from pathlib import Path

from model.config import ModelConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer, parse_spec
from train.config import Config
from train.init_from import with_its_model
from train.objectives import extra_tokens
from train.resolve import check_fit, with_head


def described(config: Config) -> Config:
  """The config as `train.resolve.resolved` would give it, for shapes; no text is read.

  Raises:
    InputError: if objective and model do not fit together, or a number is left to the data: then
      the field to set is named.
  """
  config = with_its_model(config, None)
  check_fit(config)
  model = with_head(_with_vocabulary(config), config)
  if config.data.labels is not None and model.problem != "regression":
    model = dataclasses.replace(model, num_labels=len(config.data.labels))
  needs_labels = model.head_kind in ("sequence", "token") and model.problem != "regression"
  if needs_labels and model.num_labels is None:
    raise InputError(
      "the number of labels is known from the data only: give --config.model.num_labels=N."
    )
  if model.decoder_start_id is None:
    model = dataclasses.replace(model, decoder_start_id=0)  # Of no weight for shapes.
  return dataclasses.replace(config, model=model)


def _with_vocabulary(config: Config) -> ModelConfig:
  model, spec = config.model, config.data.tokenizer
  if model.vocab_size is not None:
    return model
  kind, size = parse_spec(spec) or (None, None)
  if kind == "bytes":
    size = build_tokenizer("bytes", None, [], tuple(extra_tokens(config))).vocab_size
  elif kind is None and Path(spec).expanduser().exists():
    size = Tokenizer.load(spec).vocab_size
  if size is None:
    raise InputError(
      f"the vocabulary of data.tokenizer={spec!r} is known from the data only: give "
      "--config.model.vocab_size=N."
    )
  return dataclasses.replace(model, vocab_size=size)
