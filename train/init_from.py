"""Where a run begins from: the parameters and tokenizer of another one (`init_from`)."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from model import checkpoint
from model.config import HEAD_FIELDS, architecture
from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config, DataConfig
from train.data.pipeline import Data
from train.workdir import read_config

BODY = ("embed", "encoder", "decoder")  # What is left of a network without its heads.


def with_its_tokenizer(config: Config, workdir: Path | None) -> Config:
  """The config with the tokenizer of `init_from`, where `data.tokenizer` was left at its default.

  A workdir whose run began so goes on with what it began with; None: there is no workdir.
  """
  default = DataConfig.__dataclass_fields__["tokenizer"].default
  if config.init_from is None or config.data.tokenizer != default:
    return config
  saved = None if workdir is None else read_config(workdir)
  if saved is not None and saved["init_from"] == config.init_from:
    chosen = saved["data"]["tokenizer"]
  else:
    folder = _tokenizer_folder(config.init_from)
    chosen = str(folder.resolve()) if folder.is_dir() else default
  if chosen != default:
    _say(f"tokenizer: {chosen}, that of init_from")
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=chosen))


def initial_params(config: Config, fresh: dict, abstract: dict, data: Data) -> dict:
  """The parameters that a run with `init_from` begins with.

  A head that is another one than the checkpoint's, or tells other labels, stays as it is in
  `fresh`, and that is said.

  Args:
    fresh: initialized parameters.
    abstract: their shapes and shardings.

  Raises:
    InputError: if the checkpoint has another body or vocabulary.
  """
  path = config.init_from or ""
  found = checkpoint.describe(path)
  saved, parts = found.meta["config"], found.state["params"].keys()
  check_init(path, saved["model"], config, data.tokenizer)
  differs = _head_differs(saved, config)
  if differs:
    _say(f"head: fresh ({'; '.join(differs)})")
  kept = set(BODY) if differs else {*BODY, *parts}
  wanted = {name: part for name, part in abstract.items() if name in kept}
  others = tuple(name for name in parts if name not in wanted)
  restored = checkpoint.restore_params(path, {"params": wanted}, cast=True, leave_out=others)
  return {**fresh, **restored.state["params"]}


def check_init(path: str, saved: dict, config: Config, tokenizer: Tokenizer) -> None:
  """Raises an InputError if a checkpoint's body is another one, or reads another vocabulary.

  Args:
    saved: its model's config, plain values.
  """
  folder = _tokenizer_folder(path)
  if folder.is_dir() and Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
    raise InputError(
      f"init_from={path!r} was trained with another tokenizer than data.tokenizer="
      f"{config.data.tokenizer!r}: its ids mean other text. Set data.tokenizer={str(folder)!r}."
    )
  free = (*HEAD_FIELDS, "prefix_attention")
  ours = {k: v for k, v in architecture(config.model).items() if k not in free}
  theirs = {name: saved.get(name) for name in ours}
  checkpoint.check_config({"model": theirs}, {"model": json.loads(json.dumps(ours))})


def _head_differs(saved: dict, config: Config) -> list[str]:
  """In words, what of the head is not as in the checkpoint."""
  model, labels = config.model.to_dict(), config.data.labels
  found = [
    f"model.{name}: checkpoint {saved['model'].get(name)!r}, config {model[name]!r}"
    for name in HEAD_FIELDS
    if saved["model"].get(name) != model[name]
  ]
  theirs = saved.get("data", {}).get("labels")
  if labels is not None and theirs is not None and tuple(theirs) != labels:
    found.append("other labels")
  return found


def _tokenizer_folder(path: str) -> Path:
  return Path(checkpoint.resolve(path)[0]) / "tokenizer"


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)
