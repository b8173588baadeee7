"""A config on some devices -> its report, also where the compiler runs out of memory."""

import dataclasses

import jax

from model.sharding import make_mesh
from train.analysis.report import Report, analyse, unfinished
from train.config import Config
from train.program import build_program

_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OOM when allocating")


def attempt(config: Config, devices: list, memory: int | None) -> Report:
  """Compiles the train step of a resolved config for `devices` and reports on it.

  Args:
    memory: bytes of a device's memory that a program can have.

  Raises:
    InputError: if the mesh does not fit the devices, or divides neither batch nor model.
  """
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    try:
      return analyse(config, mesh, program, memory)
    except jax.errors.JaxRuntimeError as error:
      if not out_of_memory(error):
        raise
      return unfinished(config, mesh, program, memory, str(error))


def out_of_memory(error: BaseException) -> bool:
  """Whether an error says that a device, or the compiler for one, ran out of memory."""
  return any(sign in str(error) for sign in _SIGNS)
