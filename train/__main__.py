"""python -m train --config=configs/X.py --workdir=DIR [--config.k=v …]: trains, or continues."""

from model.host_memory import use_huge_pages
from train.preemption import leave_at_once

if __name__ == "__main__":
  use_huge_pages()
  leave_at_once()  # Before all imports that take seconds.

import traceback
from pathlib import Path

from absl import flags

from model.errors import DEFECT, InputError, Stop
from train.flags import config_flag, run
from train.processes import leave

_CONFIG = config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one that exists is continued.")


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is no flag: settings are written --config.name=value.")
  if not _WORKDIR.value:
    raise InputError("--workdir is missing: name the folder of the run, for example runs/tiny.")
  if "://" in _WORKDIR.value:
    raise InputError(
      f"--workdir={_WORKDIR.value} is no folder of this machine: mount the bucket (gcsfuse) and "
      "name a folder in it."
    )
  config = _CONFIG.value
  from train.loop import train  # After the flags: what is wrong with them is said sooner.

  return train(config, Path(_WORKDIR.value).expanduser())


if __name__ == "__main__":
  try:
    run(main)
  except Stop as end:
    leave(end.status, end.message)
  except SystemExit as end:
    leave(end.code if isinstance(end.code, int) else int(end.code is not None))
  except Exception:
    traceback.print_exc()
    leave(DEFECT)
