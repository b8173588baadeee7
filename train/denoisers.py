"""UL2's denoisers as a config names them."""

from typing import NamedTuple

from model.errors import InputError


class Denoiser(NamedTuple):
  """R: few short spans are left out; X: many or long ones; S: the end of a text."""

  mode: str
  mean: float | None  # Length of a span, in tokens; None: S.
  rate: float  # Share of the tokens that are left out.


def parse_denoisers(specs: tuple[str, ...]) -> tuple[Denoiser, ...]:
  """`R:3:0.15` -> Denoiser("R", 3.0, 0.15), `S:0.25` -> Denoiser("S", None, 0.25).

  Raises:
    InputError: for another form, or numbers out of range.
  """
  if not specs:
    raise InputError("objective.denoisers is empty: name one or more, as R:3:0.15 or S:0.25.")
  return tuple(map(_parse, specs))


def _parse(spec: str) -> Denoiser:
  mode, *numbers = spec.split(":")
  if mode not in ("R", "S", "X") or len(numbers) != (1 if mode == "S" else 2):
    raise InputError(
      f"objective.denoisers: {spec!r} is none. Write R:MEAN_SPAN:RATE, X:MEAN_SPAN:RATE or S:RATE, "
      "for example R:3:0.15, X:64:0.5, S:0.25."
    )
  try:
    *mean, rate = map(float, numbers)
  except ValueError:
    raise InputError(
      f"objective.denoisers: {spec!r} holds something that is no number behind {mode}."
    ) from None
  if not 0 < rate < 1:
    raise InputError(f"objective.denoisers: the rate of {spec!r} must lie between 0 and 1.")
  if mean and not 1 <= mean[0] < float("inf"):
    raise InputError(f"objective.denoisers: the mean span of {spec!r} must be at least 1.")
  return Denoiser(mode, mean[0] if mean else None, rate)
