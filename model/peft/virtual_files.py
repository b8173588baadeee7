"""Prompts and prefixes in files of torch PEFT: one table, and what was trained besides.

PEFT keeps what the networks of P-tuning and of projected prefixes have written, not the networks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from model.config import ModelConfig
from model.errors import InputError
from model.peft.create_virtual import refusal
from model.peft.names import KEY, Names, Path
from model.peft.virtual import PREFIX, PROMPT
from model.peft.written import placed_prefix, rows_of_layers

TENSOR, BEFORE = "prompt_embeddings", "base_model."
PREFIX_KIND = "PREFIX_TUNING"
KINDS = ("PROMPT_TUNING", "P_TUNING", PREFIX_KIND)
TWO_STACKS = "SEQ_2_SEQ_LM"


def apart(tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
  """(the table of virtual tokens, whole tensors of the model by name) of a file."""
  whole = {
    name.removeprefix(BEFORE).removeprefix("model." * name.startswith(f"{BEFORE}model.model.")):
      np.asarray(array)
    for name, array in tensors.items() if name != TENSOR
  }  # fmt: skip
  table = tensors.get(TENSOR)
  return None if table is None else np.asarray(table), whole


def parameters(
  table: np.ndarray, config: Mapping[str, Any], cfg: ModelConfig, folder: str
) -> dict[Path, np.ndarray]:
  """Flat parameters of the virtual tokens in a file.

  Raises:
    InputError: if they do not fit the model, or it cannot have any.
  """
  count, kind = config.get("num_virtual_tokens"), str(config.get("peft_type"))
  prefix = kind == PREFIX_KIND
  reason = refusal(prefix, cfg)
  if reason is not None:
    raise InputError(f"{folder} has peft_type={kind!r}, which is not for this model: {reason}.")
  stack = cfg.stacks[-1]
  written = (cfg.depth(stack), 2, cfg.kv_heads, cfg.head_width)
  width = int(np.prod(written)) if prefix else cfg.embed_width
  rows = count if prefix else (count or 0) * (config.get("num_transformer_submodules") or 1)
  if not isinstance(count, int) or count < 1 or list(table.shape) != [rows, width]:
    what = "keys and values of all layers" if prefix else "vectors of tokens"
    raise InputError(
      f"{folder}: {TENSOR} has shape {list(table.shape)}, and num_virtual_tokens={count} with "
      f"{what} of this model make [{rows}, {width}]: is it of another base?"
    )
  stacks = config.get("num_transformer_submodules")
  if prefix and (stacks == 2) != (cfg.shape == "encoder_decoder"):
    raise InputError(
      f"{folder}: num_transformer_submodules={stacks} of a prefix must be 2 for an encoder–decoder "
      "and 1 for other models."
    )
  limit = cfg.max_positions
  if limit is not None and count >= limit:
    raise InputError(f"{folder} has {count} virtual tokens, and this model {limit} positions.")
  if not prefix:  # PEFT has as many for a decoder behind an encoder, which nothing reads.
    return {(cfg.stacks[0], KEY, PROMPT): table[:count]}
  placed = placed_prefix(table.reshape(count, *written), cfg)  # pyright: ignore
  return {path: np.asarray(leaf) for path, leaf in placed.items()}


def table_of(leaves: Mapping[Path, Any], cfg: ModelConfig) -> tuple[str, np.ndarray]:
  """(peft_type, the table) of a model's virtual tokens: flat parameters."""
  prompt = leaves.get((cfg.stacks[0], KEY, PROMPT))
  if prompt is not None:
    return KINDS[0], np.asarray(prompt).astype(np.float32)
  names, layers = Names(cfg), {}
  for path in leaves:
    if path[-1] == PREFIX[0]:
      pair = [np.asarray(leaves[(*path[:-1], name)]) for name in PREFIX]
      for row, number in enumerate(names.layers(path) or ()):
        layers[number] = np.stack([a[row] for a in pair], axis=1)  # (V, 2, K, H)
  table = np.stack([layers[i] for i in sorted(layers)], axis=1)
  rows = rows_of_layers(cfg)
  theirs = np.zeros_like(table)
  theirs[:, rows] = table
  if not np.array_equal(theirs[:, rows], table):
    raise InputError(
      "PEFT gives two layers of a decoder behind an encoder one prefix, and here they have others: "
      "keep the workdir of the run instead."
    )
  return PREFIX_KIND, theirs.reshape(len(theirs), -1).astype(np.float32)


def described(kind: str, table: np.ndarray, cfg: ModelConfig, task: str | None) -> dict[str, Any]:
  """The fields of adapter_config.json that say what a table is."""
  prefix = kind == PREFIX_KIND
  heads = cfg.kv_heads if prefix else cfg.num_heads
  values: dict[str, Any] = {
    "peft_type": kind, "num_virtual_tokens": len(table), "num_layers": cfg.depth(cfg.stacks[-1]),
    "num_attention_heads": heads,
    "token_dim": heads * cfg.head_width if prefix else table.shape[1],
    "num_transformer_submodules": 2 if prefix and task == TWO_STACKS else 1,
  }  # fmt: skip
  own = {"prefix_projection": False} if prefix else {"prompt_tuning_init": "RANDOM"}
  return values | own


def has_virtual(params: dict) -> bool:
  """Whether there are virtual tokens among nested parameters."""
  leaves: Any = flatten_dict(params)
  return any(path[-1] in (PROMPT, *PREFIX) for path in leaves)
