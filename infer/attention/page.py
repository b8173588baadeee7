"""Attention maps as one HTML file: nothing is fetched, all is in it."""

import base64
import html
import json
from pathlib import Path

import numpy as np

from infer.attention.maps import AttentionMap
from infer.attention.picture import HEADINGS, STOPS
from model.errors import InputError

MOST_WEIGHTS = 8_000_000  # Two bytes each, in base64.
_LEVELS = 65_535  # Of a weight, which is stored as uint16.


def page(
  maps: dict[str, AttentionMap], chosen: dict[str, list[tuple[int, int]]], title: str
) -> str:
  """The file's text: maps to choose by layer and head, with the weight under the pointer.

  Raises:
    InputError: if a file that holds so many weights could not be opened any more.
  """
  count = sum(len(chosen[name]) * one.weights[0, 0].size for name, one in maps.items())
  if count > MOST_WEIGHTS:
    raise InputError(
      f"the page would hold {count:,} weights, and {MOST_WEIGHTS:,} are the most that it opens "
      "with: choose some with --layers and --heads, or shorten the text."
    )
  data = [_plain(name, one, chosen[name]) for name, one in maps.items()]
  # Inside of a script element only `</` could end it; & and > are escaped for old readers.
  text = json.dumps({"stops": STOPS, "maps": data})
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
  before, middle = template.split("{{data}}")
  return before.replace("{{title}}", html.escape(title)) + text + middle


def _plain(name: str, one: AttentionMap, chosen: list[tuple[int, int]]) -> dict:
  layers = sorted({layer for layer, _ in chosen})
  heads = sorted({head for _, head in chosen})
  weights = one.weights[np.ix_(layers, heads)]
  levels = np.rint(np.clip(weights, 0, 1) * _LEVELS).astype("<u2")
  return {
    "name": HEADINGS[name], "layers": layers, "heads": heads, "queries": list(one.queries),
    "keys": list(one.keys), "weights": base64.b64encode(levels.tobytes()).decode(),
  }  # fmt: skip
