"""Certificates on disk: parity.json, which is read again, and parity.md, for people."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import model
from train.certify.cases import CASES, family_of
from train.certify.compare import GREEDY_TOKENS, TIED, Certificate, worst
from train.certify.documents import LENGTHS

# What a certificate hangs on.
_DECIDE = ("model/**/*.py", "infer/[a-z]*.py", *(
  f"train/certify/{name}.py" for name in ("compare", "documents", "theirs")
))  # fmt: skip
_LIBRARIES = ("jax", "flax", "torch", "transformers")
_HEAD = f"""# Parity with Transformers

For each configuration a model of Transformers with random float32 weights was written by
Transformers, read here, compared, trained for a step on both sides, written here and read by
Transformers. It read documents of {" and ".join(map(str, LENGTHS))} tokens, theirs always alone and
without padding, ours alone, padded on the left, padded on the right, and packed in one row.

* **logits**, **log-probability**: the largest difference, over all tokens and all those ways.
* **gradient**: the largest ‖Δ‖ / ‖g‖ of a tensor.
* **after a step**: log-probabilities of both models after a step of gradient descent.
* **greedy**: tokens that both choose, {GREEDY_TOKENS} for each document ({len(LENGTHS)} documents),
  ours with its cache. Where texts part at a tie (the best two within 1e-3, sharpened twice), that
  is said, and what is behind it is not compared: in {TIED:.0%} of the configurations at most.
* **bits**: theirs, read and written here, is theirs bit for bit.

Made by `python -m train.certify --family=all`, with """


class Certificates:
  """Certificates by the names of their cases, kept in a folder."""

  def __init__(self, folder: Path):
    """
    Args:
      folder: with parity.json, or without it.
    """
    self._folder = folder
    self._decided = decided_by()
    path = folder / "parity.json"
    self._entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    self._entries = {name: entry for name, entry in self._entries.items() if name in CASES}

  def find(self, name: str) -> Certificate | None:
    """The certificate of a case, if nothing has changed since."""
    entry = self._entries.get(name)
    if entry is None or entry["key"] != self._key(name):
      return None
    return Certificate(**entry["certificate"])

  def add(self, name: str, certificate: Certificate) -> None:
    """Keeps a certificate on disk."""
    self._entries[name] = {
      "key": self._key(name), "class": CASES[name][0],
      "certificate": dataclasses.asdict(certificate),
    }  # fmt: skip
    self._folder.mkdir(parents=True, exist_ok=True)
    ordered = {name: self._entries[name] for name in CASES if name in self._entries}
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    (self._folder / "parity.json").write_text(text + "\n", encoding="utf-8")

  def write_tables(self) -> None:
    """Writes parity.md: a table of families, and one of configurations."""
    found = {n: Certificate(**e["certificate"]) for n, e in self._entries.items()}
    by_family: dict[str, list[Certificate]] = {}
    for name in filter(found.__contains__, CASES):
      by_family.setdefault(family_of(name), []).append(found[name])
    families = [(f"{name} ({len(all_)})", _worst(all_)) for name, all_ in by_family.items()]
    cases = [(f"{n}: {CASES[n][0]}", found[n]) for n in CASES if n in found]
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    parts = [
      f"{_HEAD}{libraries}.", "## Families, and how many configurations of each",
      _table(families), "## Configurations", _table(cases),
    ]  # fmt: skip
    (self._folder / "parity.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

  def _key(self, name: str) -> str:
    text = json.dumps([self._decided, CASES[name]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def decided_by() -> str:
  """SHA-256, in hex, of the files and the versions that decide a certificate."""
  root = Path(model.__file__).parents[1]
  digest = hashlib.sha256(json.dumps([version(name) for name in _LIBRARIES]).encode())
  for path in sorted({path for pattern in _DECIDE for path in root.glob(pattern)}):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _worst(found: list[Certificate]) -> Certificate:
  """The worst of each number."""

  def over(fold: Callable[[Iterable[Any]], Any], name: str) -> Any:
    values = [value for c in found if (value := getattr(c, name)) is not None]
    return fold(values) if values else None

  largest = ("logits", "log_probability", "gradient", "after_step")
  return Certificate(
    **{name: over(worst, name) for name in largest}, greedy=over(min, "greedy"),
    ties=over(sum, "ties"), same_bits=over(all, "same_bits"),
  )  # fmt: skip


def _table(rows: list[tuple[str, Certificate]]) -> str:
  names = ("", "logits", "log-probability", "gradient", "after a step", "greedy", "bits")
  lines = [names, ("---",) * len(names)]
  for name, one in rows:
    written = "–" if one.greedy is None else f"{one.greedy} of {GREEDY_TOKENS * len(LENGTHS)}"
    numbers = (one.logits, one.log_probability, one.gradient, one.after_step)
    ties = f", {one.ties} at a tie" if one.ties else ""
    bits = "the same" if one.same_bits else "differ"
    lines.append((name, *(f"{n:.0e}" for n in numbers), written + ties, bits))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
