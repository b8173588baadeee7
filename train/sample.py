"""What a model that was just trained says: a text that a person can judge."""

import jax

from infer import generate
from model.errors import InputError
from model.heads import WORD_HEADS
from model.trained import Model
from train.config import Config
from train.data.pipeline import Data
from train.fill_masks import check_masked, filled_masks
from train.step import TrainState

SAMPLE_TOKENS = 128


def check_sample(config: Config, data: Data) -> None:
  """Raises an InputError if no sample can be made of `config.sample_prompt`."""
  model = config.model
  if model.head_kind == "masked_lm":
    check_masked(config.sample_prompt, data.tokenizer, model.max_positions)
  elif model.head_kind != "language" and config.sample_prompt:
    raise InputError(f"sample_prompt has no effect on objective.name={config.objective.name!r}.")
  elif model.head_kind == "language":
    _room(config, _prompt(config, data))


def sample(config: Config, data: Data, state: TrainState) -> str | None:
  """What the model says behind `config.sample_prompt`, makes of it, or puts in its masks.

  Without a prompt it begins a text, or reads one of the validation set. None on more than one
  process, and for models that write no text.
  """
  if jax.process_count() > 1 or config.model.head_kind not in WORD_HEADS:
    return None
  m = Model(config.model, state.params, data.tokenizer)
  if config.model.head_kind == "masked_lm":
    return filled_masks(m, data, config.sample_prompt)
  prompt = _prompt(config, data)
  room = _room(config, prompt)
  if config.model.shape == "decoder":
    settings = dict(max_new_tokens=room, temperature=0.8, seed=config.seed)
    return config.sample_prompt + generate(m, [prompt], **settings)[0].text
  written = generate(m, [prompt], max_new_tokens=room)[0].tokens
  shown = lambda ids: data.tokenizer.backend.decode(ids, skip_special_tokens=False)
  return f"{shown(prompt)} -> {shown(written)}"


def _prompt(config: Config, data: Data) -> list[int]:
  """Token ids that the model goes on with, or that its encoder reads."""
  if config.model.shape == "encoder_decoder":
    if config.sample_prompt:
      return data.tokenizer.encode(config.sample_prompt)
    batch = data.first()
    return batch["tokens"][0][batch["segments"][0] == 1].tolist()
  prompt = data.tokenizer.encode_prompt(config.sample_prompt)
  # Where no special token begins a text, the first one of the corpus does.
  return prompt or data.batch(0, np.zeros(1, np.int64))["tokens"][0, :1].tolist()


def _room(config: Config, prompt: list[int]) -> int:
  """How many tokens the sample may add.

  Raises:
    InputError: if the model has no position left.
  """
  limit = config.model.max_positions
  if limit is None:
    return SAMPLE_TOKENS
  read = len(prompt) if config.model.shape == "decoder" else 1
  if len(prompt) > limit or limit - read < 1:
    raise InputError(
      f"sample_prompt has {len(prompt)} tokens and leaves no room in model.max_positions={limit}: "
      "shorten it."
    )
  return min(SAMPLE_TOKENS, limit - read)
