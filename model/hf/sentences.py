"""sentence-transformers folders: how a body's hidden states stand for a text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from model.annotations import is_of
from model.config import ModelConfig
from model.errors import InputError
from model.hf.family import Family
from model.json_files import read_json, read_object

_MODULES, _POOLING, _NORMALIZE = "modules.json", "1_Pooling", "2_Normalize"
_LENGTH, _PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
_TOKENIZER, _NO_LIMIT = "tokenizer_config.json", 1 << 31  # Larger lengths stand for none.
_MODES = {"cls": "first", "cls_token": "first", "mean": "mean", "mean_tokens": "mean",
          "lasttoken": "last"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sentences:
  """What a folder says of embeddings; `limit` counts the tokens of the longest text."""

  pooling: str
  normalize: bool
  limit: int | None

  def embedding(self, cfg: ModelConfig) -> ModelConfig:
    """The config of a body whose head, if it had one, is left out."""
    return dataclasses.replace(
      cfg, head="embedding", head_dense=False, head_norm=False, head_activation="gelu",
      pair_head=False, num_labels=None, problem="single_label", logit_bias=False,
      pooling=self.pooling, normalize=self.normalize,
    )  # fmt: skip


def read(folder: Path) -> Sentences | None:
  """What modules.json and its folders say; None where there is none.

  Raises:
    InputError: for modules, poolings or prompts that are not known here.
  """
  if not (folder / _MODULES).is_file():
    return None
  told = read_json(folder / _MODULES)
  if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
    raise InputError(f"{folder / _MODULES} must hold a list of modules.")
  modules = [(str(m.get("type")).split(".")[-1], str(m.get("path", ""))) for m in told]
  kinds = [kind for kind, _ in modules]
  if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
    raise InputError(
      f"{folder / _MODULES}: modules {', '.join(kinds)} are not supported, only Transformer, "
      "Pooling and, where wanted, Normalize."
    )
  if modules[0][1]:
    raise InputError(f"{folder / _MODULES}: the model lies in {modules[0][1]!r}: load that folder.")
  length, prompts = read_object(folder / _LENGTH), read_object(folder / _PROMPTS)
  if length.get("do_lower_case"):
    raise InputError(f"{folder / _LENGTH}: do_lower_case=true is not supported.")
  if prompts.get("default_prompt_name") is not None:
    raise InputError(f"{folder / _PROMPTS}: a default prompt before each text is not supported.")
  pooling = _pooling(folder / modules[1][1] / "config.json")
  if length.get("transformer_task") not in (None, "feature-extraction"):
    raise InputError(f"{folder / _LENGTH}: transformer_task must be feature-extraction.")
  return Sentences(pooling, "Normalize" in kinds, _limit(folder, length.get("max_seq_length")))


def _limit(folder: Path, own: Any) -> int | None:
  """Tokens of the longest text: its own number, or the tokenizer's; None: without limit."""
  limit = own or read_object(folder / _TOKENIZER).get("model_max_length")
  whole = limit.is_integer() if isinstance(limit, float) else is_of(limit, int)
  if limit is not None and not (whole and limit >= 1):
    file, field = (_LENGTH, "max_seq_length") if own else (_TOKENIZER, "model_max_length")
    raise InputError(f"{folder / file}: {field}={limit!r} must be a whole number of at least 1.")
  return None if limit is None or limit >= _NO_LIMIT else int(limit)


def _pooling(path: Path) -> str:
  values = read_object(path)
  modes = [k.removeprefix("pooling_mode_") for k, v in values.items()
           if k.startswith("pooling_mode_") and v]  # fmt: skip
  modes += [values["pooling_mode"]] if isinstance(values.get("pooling_mode"), str) else []
  if len(modes) != 1 or modes[0] not in _MODES:
    raise InputError(
      f"{path}: pooling {' with '.join(modes) or 'of no kind'} is not supported, only one of "
      "cls_token, mean_tokens and lasttoken."
    )
  if values.get("include_prompt") is False:
    raise InputError(f"{path}: include_prompt=false is not supported.")
  return _MODES[modes[0]]


def body(cfg: ModelConfig, family: Family) -> ModelConfig:
  """A config as a family's table has it: pooling and length 1 are told in files of their own, and a
  class's layer behind the pooling (BERT's pooler) is one that is not read.
  """
  bare = cfg.head_kind == "embedding" and not cfg.head_dense
  settings = _bare(family)
  if not bare or settings is None:
    return cfg
  plain: dict[str, Any] = {"pooling": None, "normalize": False}
  return dataclasses.replace(cfg, **(plain | settings))


def are_told(cfg: ModelConfig, limit: int | None, family: Family) -> bool:
  """Whether a written model needs files that say how texts are pooled."""
  if cfg.head_kind != "embedding" or cfg.head_dense:
    return False
  pooled = bool((_bare(family) or {}).get("head_dense"))
  return pooled or cfg.pooling is not None or cfg.normalize or limit is not None


def _bare(family: Family) -> dict[str, Any] | None:
  """Settings of the family's class without a head."""
  found = (one.settings for one in family.classes.values())
  return next((dict(s) for s in found if s.get("head") == "embedding"), None)


def write(folder: Path, cfg: ModelConfig, limit: int | None) -> None:
  """Writes how texts are pooled."""
  kinds = ["Transformer", "Pooling", *(["Normalize"] if cfg.normalize else [])]
  paths = dict(zip(kinds, ("", _POOLING, _NORMALIZE), strict=False))
  modules = [
    {"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"}
    for i, kind in enumerate(kinds)
  ]
  how = {"first": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
  chosen = how[cfg.pooling_of(cfg.text_stack)]
  modes = {f"pooling_mode_{mode}": mode == chosen for mode in (*how.values(), "max_tokens")}
  files = {
    _MODULES: modules,
    f"{_POOLING}/config.json": {"word_embedding_dimension": cfg.d_model, **modes},
    _LENGTH: {"max_seq_length": limit or cfg.max_positions, "do_lower_case": False},
    _PROMPTS: {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
  }
  for path in list(paths.values())[1:]:
    (folder / path).mkdir()
  for name, values in files.items():
    (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
