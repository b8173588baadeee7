"""python -m launch --target=T --processes=N … -- train --config=…: starts a run anywhere."""

from pathlib import Path

from absl import flags

from launch import kubernetes, local, slurm, ssh, tpu
from launch.job import Job, default_name
from launch.options import chosen, define, refuse_given
from model.errors import InputError, run

TARGETS = {"local": local, "ssh": ssh, "slurm": slurm, "kubernetes": kubernetes, "tpu": tpu}
OPTIONS = {name: target.Options for name, target in TARGETS.items()}

_TARGET = flags.DEFINE_enum("target", "local", list(TARGETS), "Where the run runs.")
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "Processes that share the work; left out, what the target has.", lower_bound=1
)
_NAME = flags.DEFINE_string(
  "name", None, "Name of the run; left out, that of its workdir or config."
)
_ENV = flags.DEFINE_multi_string(
  "env", [], "NAME=VALUE for the environment of each process; may be given several times."
)
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 0, "How often a run that failed is started again.", lower_bound=0
)
_BACKOFF = flags.DEFINE_float(
  "backoff", 10.0, "Seconds before the first restart; doubled for each further one.", lower_bound=0
)
_LOGS = flags.DEFINE_string(
  "logs", None, "Folder for what the processes print; left out, runs/NAME/logs."
)
_XLA_TABLE = flags.DEFINE_bool(
  "xla_table", True, "Give processes the flags of launch/xla_flags.py; unknown ones are fatal in a "
  "compiler of another version: --noxla_table.",
)  # fmt: skip
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run; start nothing.")
define(OPTIONS)


def main(argv: list[str]) -> int:
  """Starts the command behind `--`.

  Returns:
    The exit status: that of the run where the target waits for it.

  Raises:
    InputError: for a wrong flag or command, and a flag that the target does not read.
  """
  target = TARGETS[_TARGET.value]
  refuse_given(target.UNREAD, _TARGET.value)
  options = chosen(OPTIONS, _TARGET.value)
  return target.submit(_job(tuple(argv[1:])), options, _DRY_RUN.value)


def _job(command: tuple[str, ...]) -> Job:
  name = _NAME.value if _NAME.value is not None else default_name(command or ("run",))
  return Job(
    command=command,
    name=name,
    processes=_PROCESSES.value,
    environment=_environment(_ENV.value),
    max_restarts=_MAX_RESTARTS.value,
    backoff=_BACKOFF.value,
    logs=Path(_LOGS.value if _LOGS.value is not None else f"runs/{name}/logs"),
    xla_table=_XLA_TABLE.value,
  )


def _environment(words: list[str]) -> dict[str, str]:
  values: dict[str, str] = {}
  for word in words:
    name, equals, value = word.partition("=")
    if not equals or not name.isidentifier():
      raise InputError(f"--env={word}: NAME=VALUE is needed.")
    if values.setdefault(name, value) != value:
      raise InputError(f"--env={name} is given twice, as {values[name]!r} and {value!r}.")
  return values


def _with_command(argv: list[str]) -> list[str]:
  help_asked = any(word.lstrip("-").startswith("help") for word in argv[1:])
  if "--" not in argv and not help_asked:
    raise InputError(
      "there is nothing to run: the command stands behind --, for example "
      "python -m launch --processes=2 -- train --config=configs/gpt_tiny.py --workdir=runs/tiny."
    )
  return argv


if __name__ == "__main__":
  run(main, prepare=_with_command)
