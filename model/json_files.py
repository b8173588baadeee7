"""JSON files of checkpoints, which anyone may have written."""

import json
from pathlib import Path
from typing import Any

from model.errors import InputError


def read_json(path: Path) -> Any:
  """What a file holds.

  Raises:
    InputError: if it cannot be read, is no JSON, or is nested deeper than can be read.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError, RecursionError) as error:
    raise InputError(f"{path} cannot be read as JSON: {error}.") from None


def read_object(path: Path) -> dict[str, Any]:
  """What a file holds that must be a JSON object; {} where there is no file.

  Raises:
    InputError: as `read_json`, and for anything else.
  """
  values = read_json(path) if path.is_file() else {}
  if not isinstance(values, dict):
    raise InputError(f"{path} must hold a JSON object.")
  return values
