"""python -m train.certify --family=NAME|all: proves conversion of a family against Transformers.

Needs PyTorch and Transformers (the test extra). What is proven is kept in docs/parity.json and
docs/parity.md until a file that decides it changes.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from absl import flags

from model.errors import InputError, nearest, run
from train.certify.cases import CASES, FAMILIES, family_of
from train.certify.compare import Certificate, timed, too_many_ties
from train.certify.report import Certificates

_FAMILY = flags.DEFINE_list("family", None, "model_type of config.json, several, or all.")
_TARGET = flags.DEFINE_string("target", "docs", "Folder of parity.json and parity.md.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Cases at a time.", lower_bound=1)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is no flag: settings are written --name=value.")
  if not _FAMILY.value:
    raise InputError("--family is missing: give a model_type of config.json, or all.")
  chosen = FAMILIES if _FAMILY.value == ["all"] else tuple(_FAMILY.value)
  for name in chosen:
    if name not in FAMILIES:
      known = ", ".join(FAMILIES)
      raise InputError(
        f"--family={name!r} is not known, expected all or of {known}.{nearest(name, FAMILIES)}"
      )
  kept = Certificates(Path(_TARGET.value))
  names = [name for name in CASES if family_of(name) in chosen]
  failed, certificates = 0, []
  found = {name: kept.find(name) for name in names}
  new = _made([name for name in names if found[name] is None])
  for name in names:
    certificate, made = found[name], ""
    if certificate is None:
      certificate, seconds = next(new)
      kept.add(name, certificate)
      made = f", {seconds:.0f} s"
    certificates.append(certificate)
    failures = certificate.failures()
    failed += bool(failures)
    print(f"{name}: {'; '.join(failures) or 'equal'}{made}", flush=True)
  kept.write_tables()
  print(f"{Path(_TARGET.value) / 'parity.md'}: {len(names) - failed} of {len(names)} are equal.")
  ties = too_many_ties(certificates)
  print("".join(f"{words}.\n" for words in ties), end="")
  return int(failed > 0 or bool(ties))


def _made(names: list[str]) -> Iterator[tuple[Certificate, float]]:
  """(certificate, seconds) of each case, in order."""
  if _PROCESSES.value == 1:
    yield from map(timed, names)
    return
  context = multiprocessing.get_context("spawn")  # JAX has threads.
  with ProcessPoolExecutor(_PROCESSES.value, context) as processes:
    yield from processes.map(timed, names)


if __name__ == "__main__":
  run(main)
