"""A model whose parameters are read one after the other."""

import dataclasses
from collections.abc import Callable

import numpy as np

from model.config import ModelConfig
from model.hf.engine import Path
from model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
  """What a model is, and where its parameters come from.

  Attributes:
    config: its `param_dtype` is that of its matrices.
    leaf: a parameter by its path, in the dtype that it has in such a model.
    family: `model_type` of the config.json that it came from, or None.
    labels, end_ids, text_limit: as a Model has them.
  """

  config: ModelConfig
  leaf: Callable[[Path], np.ndarray]
  tokenizer: Tokenizer | None
  labels: tuple[str, ...] | None
  family: str | None
  end_ids: tuple[int, ...] = ()
  text_limit: int | None = None
