"""`python -m infer.attention --checkpoint=PATH --text=TEXT --output=FILE.png`: draws who attends to
whom, by layer and head, as pictures (FILE.png, FILE-2.png …) or as one page for a browser
(--output=FILE.html); both may be asked for. stderr names the files.
"""

from model.host_memory import use_huge_pages

if __name__ == "__main__":
  use_huge_pages()

from collections.abc import Callable
from pathlib import Path

from absl import flags, logging

from infer.attention.maps import AttentionMap, attention_maps
from infer.attention.page import page
from infer.attention.picture import pictures
from model import load
from model.compilation import use_compilation_cache
from model.errors import InputError, run

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step in it, PATH@best, a Hugging Face folder or a GGUF file."
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Adapter for the checkpoint: a folder of PEFT's, or the workdir of its run."
)
_TEXT = flags.DEFINE_string("text", None, "What the model reads; of an encoder–decoder, first.")
_TARGET = flags.DEFINE_string(
  "target", None, "What the decoder behind an encoder reads (default: what it writes, greedily)."
)
_OUTPUT = flags.DEFINE_multi_string("output", [], "FILE.png or FILE.html.")
_LAYERS = flags.DEFINE_string("layers", None, "Which are drawn, from 0: 0,2,5-7 (default: all).")
_HEADS = flags.DEFINE_string("heads", None, "Which are drawn, from 0: 0,2,5-7 (default: all).")
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "~/.cache/triune", "Where compiled programs are kept."
)
Chosen = dict[str, list[tuple[int, int]]]


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise InputError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value.")
  for name, what in (("checkpoint", "a checkpoint"), ("text", "a text"), ("output", "a file")):
    if not flags.FLAGS[name].value:
      raise InputError(f"--{name} is missing: give {what}.")
  writers = [_writer(path) for path in _OUTPUT.value]
  layers, heads = _numbers("layers", _LAYERS.value), _numbers("heads", _HEADS.value)
  use_compilation_cache(_CACHE_DIR.value)
  m = load(_CHECKPOINT.value or "", adapter=_ADAPTER.value)
  maps = attention_maps(m, _TEXT.value or "", target=_TARGET.value)
  chosen = {name: _chosen(name, one, layers, heads) for name, one in maps.items()}
  title = f"Attention in “{_one_line(_TEXT.value or '')}”"
  for write in writers:
    write(maps, chosen, title)
  return 0


def _writer(output: str) -> Callable[[dict[str, AttentionMap], Chosen, str], None]:
  path = Path(output).expanduser()
  kinds = {".png": _write_pictures, ".html": _write_page}
  if path.suffix.lower() not in kinds:
    raise InputError(f"--output={output} must end in .png or .html.")
  if not path.parent.is_dir():
    raise InputError(f"--output={output}: there is no folder {path.parent}.")
  return lambda *what: kinds[path.suffix.lower()](path, *what)


def _write_pictures(
  path: Path, maps: dict[str, AttentionMap], chosen: Chosen, title: str
) -> None:  # fmt: skip
  for i, figure in enumerate(pictures(maps, chosen, title), 1):
    file = path if i == 1 else path.with_stem(f"{path.stem}-{i}")
    figure.savefig(file)
    logging.info("Wrote %s.", file)


def _write_page(path: Path, maps: dict[str, AttentionMap], chosen: Chosen, title: str) -> None:
  path.write_text(page(maps, chosen, title), encoding="utf-8")
  logging.info("Wrote %s.", path)


def _one_line(text: str) -> str:
  return " ".join(text.split())


def _numbers(name: str, text: str | None) -> list[int] | None:
  """0,2,5-7 -> [0, 2, 5, 6, 7]; None: all."""
  if text is None:
    return None
  out: list[int] = []
  for part in text.split(","):
    first, dash, last = part.strip().partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10_000):
      raise InputError(f"--{name}={text} must be numbers from 0 with commas between, or 5-7.")
    out.extend(range(int(first), int(last) + 1))
  return sorted(set(out))


def _chosen(
  name: str, one: AttentionMap, layers: list[int] | None, heads: list[int] | None
) -> list[tuple[int, int]]:
  counts = one.weights.shape[:2]
  for what, asked, count in zip(("layers", "heads"), (layers, heads), counts, strict=True):
    if asked is not None and asked[-1] >= count:
      raise InputError(
        f"--{what} asks for {asked[-1]}, and the {name} map has {what} 0 to {count - 1}."
      )
  rows, columns = (
    range(n) if a is None else a for a, n in zip((layers, heads), counts, strict=True)
  )
  return [(i, j) for i in rows for j in columns]


if __name__ == "__main__":
  run(main)
