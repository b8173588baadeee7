"""generation_config.json: which tokens begin, end and fill what a model writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.source import Source
from model.inputs import decoder_start
from model.json_files import read_object

FILE = "generation_config.json"


def read_ends(folder: Path, values: Mapping[str, Any], cfg: ModelConfig) -> tuple[int, ...]:
  """Tokens that end what a model writes, as generation_config.json or else config.json names them;
  (): neither does.

  Args:
    values: fields of config.json.

  Raises:
    InputError: if they are no ids.
  """
  if cfg.head_kind != "language":
    return ()
  name, told = "config.json", values.get("eos_token_id")
  if (folder / FILE).is_file():
    own = read_object(folder / FILE)
    told, name = (own["eos_token_id"], FILE) if "eos_token_id" in own else (told, name)
  ids = [] if told is None else told if isinstance(told, list) else [told]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise InputError(f"{folder / name}: eos_token_id={told!r} is no id, nor a list of them.")
  return tuple(i for i in ids if 0 <= i < cfg.real_vocab)  # Others are never written.


def token_ids(source: Source, pad: int | None) -> dict[str, int | list[int] | None]:
  """Ids as config.json has them.

  Args:
    pad: of padding, where there is no tokenizer that says it.
  """
  if source.tokenizer is None:  # What Transformers assumes might lie outside of the vocabulary.
    ids = {"pad": pad, "bos": None, "eos": None}
  else:
    ids = {
      "pad": source.tokenizer.pad_id,
      "bos": source.tokenizer.bos_id,
      "eos": source.tokenizer.eos_id,
    }
  told: dict[str, int | list[int] | None] = {
    f"{role}_token_id": i for role, i in ids.items() if i is not None
  }
  if source.end_ids:
    told["eos_token_id"] = source.end_ids[0] if len(source.end_ids) == 1 else list(source.end_ids)
  return told if source.tokenizer is not None else {"pad_token_id": pad, **told}


def write(folder: Path, source: Source, ids: Mapping[str, Any]) -> None:
  """Writes generation_config.json with `ids` as `token_ids` gives them."""
  values = {name: i for name, i in ids.items() if i is not None}
  known = source.config.decoder_start_id is not None or source.tokenizer is not None
  if source.config.shape == "encoder_decoder" and known:
    values["decoder_start_token_id"] = decoder_start(source.config, source.tokenizer)
  (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
