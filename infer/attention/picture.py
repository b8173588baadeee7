"""Attention maps as pictures: a panel for each layer and head, on as many pages as they need."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from infer.attention.maps import AttentionMap
from model.errors import InputError

if TYPE_CHECKING:
  from matplotlib.colors import Colormap, Norm
  from matplotlib.figure import Figure

HEADINGS = {
  "encoder": "Encoder: self-attention",
  "decoder": "Decoder: self-attention",
  "cross": "Cross-attention: the decoder's queries, the encoder's keys",
}
# From nothing to everything; the page for browsers has them too.
STOPS = ("#ffffff", "#d9e8f5", "#a6cbe6", "#5ba3cf", "#2374b7", "#0b4a8f", "#08214a")
MOST_TOKENS = 96  # Of a picture, on either side.
MOST_PAGES = 24
LONGEST_LABEL = 14  # Characters.
DOTS = 130  # Per inch.
# Inches.
_TOKEN, _LEAST_PANEL, _GAP, _CHARACTER, _TITLE = 0.15, 1.2, 0.14, 0.068, 0.24
_HEADING, _TOP, _MARGIN, _PAGE_WIDTH, _PAGE_HEIGHT = 0.45, 0.85, 0.25, 30.0, 34.0


@dataclasses.dataclass(frozen=True)
class Row:
  """Panels beside each other: (layer, head) of one map."""

  name: str
  panels: tuple[tuple[int, int], ...]
  width: float  # Of a panel, in inches.
  height: float
  columns: int  # Of the rows of this map.
  left: float  # Room of labels beside the first panel,
  below: float  # and below the last row.


def pictures(maps: dict[str, AttentionMap], chosen: dict[str, list[tuple[int, int]]], title: str):
  """Figures of the chosen (layer, head) of each map, a page each.

  Raises:
    InputError: for texts with too many tokens to label, or more pages than anybody looks at.
  """
  for name, one in maps.items():
    longest = max(len(one.queries), len(one.keys))
    if longest > MOST_TOKENS:
      raise InputError(
        f"a picture has room for {MOST_TOKENS} tokens and the {name} map has {longest}: shorten "
        "the text, or write an .html file."
      )
  rows = [row for name in maps for row in _rows(name, maps[name], chosen[name])]
  pages = list(_pages(rows))
  if len(pages) > MOST_PAGES:
    raise InputError(
      f"{sum(map(len, chosen.values()))} maps need {len(pages)} pages, and {MOST_PAGES} are the "
      "most: choose some with --layers and --heads, shorten the text, or write an .html file."
    )
  return [_draw(page, maps, title, i, len(pages)) for i, page in enumerate(pages, 1)]


def _rows(name: str, one: AttentionMap, chosen: list[tuple[int, int]]) -> Iterator[Row]:
  """A row for each layer, or several where its heads do not fit beside each other."""
  width = max(_LEAST_PANEL, _TOKEN * len(one.keys))
  height = max(_LEAST_PANEL, _TOKEN * len(one.queries))
  left, below = (_CHARACTER * max(map(len, _short(t))) + 0.12 for t in (one.queries, one.keys))
  fitting = max(1, int((_PAGE_WIDTH - left - 2 * _MARGIN) // (width + _GAP)))
  heads = len({head for _, head in chosen})
  columns = -(-heads // -(-heads // fitting))  # As many in each row of a layer.
  for layer in dict.fromkeys(layer for layer, _ in chosen):
    own = [panel for panel in chosen if panel[0] == layer]
    for i in range(0, heads, columns):
      yield Row(name, tuple(own[i : i + columns]), width, height, columns, left, below)


def _short(tokens: tuple[str, ...]) -> list[str]:
  cut = lambda s: s if len(s) <= LONGEST_LABEL else s[: LONGEST_LABEL - 1] + "…"
  return [cut(token) for token in tokens]


def _pages(rows: list[Row]) -> Iterator[list[Row]]:
  page: list[Row] = []
  for row in rows:
    if page and _height([*page, row]) > _PAGE_HEIGHT:
      yield page
      page = []
    page.append(row)
  if page:
    yield page


def _height(page: list[Row]) -> float:
  sections = {row.name: _HEADING + row.below for row in page}
  rows = sum(row.height + _TITLE + _GAP for row in page)
  return _TOP + _MARGIN + sum(sections.values()) + rows


def _draw(
  page: list[Row], maps: dict[str, AttentionMap], title: str, number: int, pages: int
) -> "Figure":
  from matplotlib.colors import LinearSegmentedColormap, PowerNorm
  from matplotlib.figure import Figure

  shades, norm = LinearSegmentedColormap.from_list("attention", STOPS), PowerNorm(0.5, 0, 1)
  width = max(row.left + row.columns * (row.width + _GAP) for row in page) + 2 * _MARGIN
  width, height = max(width, 6.5), _height(page)
  figure = Figure(figsize=(width, height), dpi=DOTS, facecolor="white")
  _head(figure, title, number, pages, shades, norm)
  y = height - _TOP
  for i, row in enumerate(page):
    if i == 0 or page[i - 1].name != row.name:
      y -= _HEADING
      figure.text(
        _MARGIN / width, (y + 0.12) / height, HEADINGS[row.name], fontsize=11, weight="bold"
      )
    y -= _TITLE + row.height
    below = page[i + 1] if i + 1 < len(page) and page[i + 1].name == row.name else None
    for column, (layer, head) in enumerate(row.panels):
      x = _MARGIN + row.left + column * (row.width + _GAP)
      axes = figure.add_axes(
        (x / width, y / height, row.width / width, row.height / height)
      )  # fmt: skip
      one = maps[row.name]
      axes.imshow(one.weights[layer, head], cmap=shades, norm=norm, aspect="auto")
      axes.set_title(f"layer {layer} · head {head}", fontsize=7, pad=2.5, color="#333333")
      bottom = below is None or column >= len(below.panels)
      _label(axes, one, left=column == 0, bottom=bottom)
    y -= _GAP + (row.below if below is None else 0)
  return figure


def _head(
  figure: "Figure", title: str, number: int, pages: int, shades: "Colormap", norm: "Norm"
) -> None:
  """The title, and what the colours mean."""
  from matplotlib.cm import ScalarMappable

  width, height = figure.get_size_inches()
  room = int((width - 3.4) / 0.095)
  title = title if len(title) <= room else title[: room - 1] + "…"
  title = title.replace("$", r"\$")
  figure.text(_MARGIN / width, 1 - 0.38 / height, title, fontsize=12, weight="bold")
  note = "a row is a query, a column a key"
  note += f" · page {number} of {pages}" if pages > 1 else ""
  figure.text(_MARGIN / width, 1 - 0.62 / height, note, fontsize=8, color="#555555")
  bar = figure.add_axes(
    ((width - 2.6) / width, 1 - 0.45 / height, 2.3 / width, 0.13 / height)
  )  # fmt: skip
  figure.colorbar(ScalarMappable(norm, shades), cax=bar, orientation="horizontal")
  bar.set_xticks([0, 0.05, 0.25, 0.5, 1.0], ["0", ".05", ".25", ".5", "1"], fontsize=7)
  bar.set_title("attention weight", fontsize=7, pad=2)


def _label(axes, one: AttentionMap, *, left: bool, bottom: bool) -> None:
  names = lambda tokens: [token.replace("$", r"\$") for token in _short(tokens)]
  for side, tokens, wanted in ((axes.yaxis, one.queries, left), (axes.xaxis, one.keys, bottom)):
    side.set_ticks(range(len(tokens)), names(tokens) if wanted else [""] * len(tokens))
  axes.tick_params(length=1.5, width=0.4, labelsize=7, pad=1.5, color="#888888")
  axes.tick_params(axis="x", rotation=90)
  for spine in axes.spines.values():
    spine.set(linewidth=0.4, color="#888888")
