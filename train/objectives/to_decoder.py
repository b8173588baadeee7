"""What an encoder–decoder learns to write: the decoder's side of a batch, and its loss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from model.config import ModelConfig
from train.config import ObjectiveConfig
from train.objectives.causal_lm import TOKENS, WEIGHTS, word_loss
from train.objectives.loss import Loss, inputs_of, work
from train.objectives.objective import Side

DECODER = "decoder_"  # The side that the decoder reads; the encoder reads the one without a name.


def decoder_side(length: int) -> Side:
  """Tokens that the decoder reads, the one that starts it first, and the token behind each."""
  return Side(length, dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS))


def written(start: int, target: np.ndarray, end: int) -> dict[str, np.ndarray]:
  """The decoder's fields of one piece: it reads `start` and the target, and predicts the target
  and `end`.
  """
  return dict(
    tokens=np.concatenate([[start], target]), targets=np.concatenate([target, [end]]),
    weights=np.ones(len(target) + 1),
  )  # fmt: skip


def decoder_weights(batch: Mapping[str, Array]) -> dict[str, Array]:
  """Target tokens."""
  return {"loss": jnp.sum(batch[f"{DECODER}weights"])}


def decoder_loss(
  config: ObjectiveConfig, model: ModelConfig, net: Any, batch: Mapping[str, Array],
  key: jax.Array | None,
) -> Loss:  # fmt: skip
  """Cross-entropy of the decoder's targets, given what the encoder reads."""
  source, inputs = inputs_of(batch), inputs_of(batch, DECODER)
  x, _, stats = net.hidden(inputs, source=source, key=key)
  return word_loss(config, model, net.logits(x), batch, stats, side=DECODER, **work(
    model, inputs, source, head=jnp.sum(inputs.pos >= 0)
  ))  # fmt: skip
