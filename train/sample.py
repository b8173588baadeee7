"""What a model that was just trained says: a text that a person can judge."""

import sys
from typing import Any

import jax
import numpy as np

from infer import generate
from infer.chat import turn_ends
from model.errors import InputError
from model.hardware import hardware
from model.heads import WORD_HEADS
from model.peft.config import VIRTUAL
from model.sharding import make_mesh, replicated
from model.trained import Model
from train.config import Config
from train.data.pipeline import Data
from train.fill_masks import check_masked, filled_masks
from train.report import byte_text
from train.step import TrainState

SAMPLE_TOKENS = 128


def check_sample(config: Config, data: Data) -> None:
  """Raises an InputError if no sample can be made of `config.sample_prompt`."""
  model = config.model
  if model.head_kind == "masked_lm":
    limit = model.max_positions
    if limit is not None and config.peft.method in VIRTUAL:
      limit -= config.peft.virtual_tokens
    check_masked(config.sample_prompt, data.tokenizer, limit)
  elif model.head_kind != "language" and config.sample_prompt:
    raise InputError(f"sample_prompt has no effect on objective.name={config.objective.name!r}.")
  elif model.head_kind == "language":
    _room(config, _prompt(config, data))


def sample(config: Config, data: Data, state: TrainState) -> str | None:
  """What the model says behind `config.sample_prompt`, makes of it, or puts in its masks.

  Without a prompt it begins a text, or reads one of the validation set; after instruction tuning
  it answers the prompt, or what is asked in a conversation of that set. None for models that write
  no text. Of several processes, which all call this, the first one makes it, on one device; where
  that has no room for the parameters it says so, and there is none.
  """
  if config.model.head_kind not in WORD_HEADS:
    return None
  params = state.params if jax.process_count() == 1 else _on_first(state.params)
  if params is None:
    return None
  if jax.process_count() == 1:
    return _sample(config, data, params)
  with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
    return _sample(config, data, params)


def _on_first(params: dict) -> dict | None:
  """The parameters, gathered on one device of process 0; None elsewhere, and without room."""
  device = jax.local_devices()[0]
  entry = hardware(device.device_kind)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  first = jax.process_index() == 0
  if entry is not None and size > entry.memory_bytes / 2:
    if first:
      print(
        f"sample: none, {byte_text(size)} of parameters lie on several processes and one device "
        f"has {byte_text(entry.memory_bytes)}; python -m infer reads the checkpoint.",
        file=sys.stderr,
      )  # fmt: skip
    return None

  where: Any = jax.tree.leaves(params)[0].sharding
  gather = jax.jit(lambda leaf: leaf, out_shardings=replicated(where.mesh))
  own = lambda leaf: jax.device_put(leaf.addressable_data(0), device) if first else None
  gathered = jax.tree.map(lambda leaf: own(gather(leaf)), params)
  return gathered if first else None


def _sample(config: Config, data: Data, params: dict) -> str:
  m = Model(config.model, params, data.tokenizer)
  if config.model.head_kind == "masked_lm":
    return filled_masks(m, data, config.sample_prompt)
  prompt = _prompt(config, data)
  room = _room(config, prompt)
  if config.model.shape == "decoder" and config.objective.name != "sft":
    settings = dict(max_new_tokens=room, temperature=0.8, seed=config.seed)
    return config.sample_prompt + generate(m, [prompt], **settings)[0].text
  chat = config.objective.name == "sft" and data.tokenizer.config.get("chat_template") is not None
  stop = turn_ends(m) if chat else []
  written = generate(m, [prompt], max_new_tokens=room, stop=stop)[0].tokens
  shown = lambda ids: data.tokenizer.backend.decode(ids, skip_special_tokens=False)
  return f"{shown(prompt)} -> {shown(written)}"


def _prompt(config: Config, data: Data) -> list[int]:
  """Token ids that the model goes on with or answers, or that its encoder reads."""
  before = config.peft.before_texts  # Places of a row that are no text.
  if config.objective.name == "sft":
    return _asked(config.sample_prompt, data, before)
  if config.model.shape == "encoder_decoder":
    if config.sample_prompt:
      return data.tokenizer.encode(config.sample_prompt)
    batch = {name: data.first()[name][0, before:] for name in ("tokens", "segments")}
    return batch["tokens"][batch["segments"] == 1].tolist()
  prompt = data.tokenizer.encode_prompt(config.sample_prompt)
  # Where no special token begins a text, the first one of the corpus does.
  return prompt or data.batch(0, np.zeros(1, np.int64))["tokens"][0, before : before + 1].tolist()


def _asked(text: str, data: Data, before: int) -> list[int]:
  """`text` as a conversation in which it is the assistant's turn, or that of a held-out one, whose
  text begins behind `before` places.
  """
  if text and data.tokenizer.config.get("chat_template") is not None:
    chat = [dict(role="user", content=text)]
    return list(data.tokenizer.apply_chat_template(chat, add_generation_prompt=True))  # pyright: ignore
  if text:
    return data.tokenizer.encode_prompt(text)
  one = {name: rows[0, before:] for name, rows in data.first().items()}
  read = one["segments"] == 1
  first = int(np.argmax(one["weights"][read] > 0))  # The token behind this one is learned.
  return one["tokens"][read][: first + 1].tolist()


def _room(config: Config, prompt: list[int]) -> int:
  """How many tokens the sample may add.

  Raises:
    InputError: if the model has no position left.
  """
  limit = config.model.max_positions
  if limit is None:
    return SAMPLE_TOKENS
  limit -= config.peft.virtual_tokens if config.peft.method in VIRTUAL else 0
  read = len(prompt) if config.model.shape == "decoder" else 1
  if len(prompt) > limit or limit - read < 1:
    raise InputError(
      f"sample_prompt has {len(prompt)} tokens and leaves no room in model.max_positions="
      f"{config.model.max_positions}: shorten it."
    )
  return min(SAMPLE_TOKENS, limit - read)
