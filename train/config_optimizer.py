"""OptimizerConfig: how parameters change."""

import dataclasses

from model.errors import InputError, nearest

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")

# What each optimizer reads of b1, b2 and eps, and its values where the config has None.
OPTIMIZER_MOMENTS = {
  "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
  "adafactor": {"eps": 1e-30},
  "lion": {"b1": 0.9, "b2": 0.99},
  "muon": {"b1": 0.95, "b2": 0.95, "eps": 1e-8},
  "sgd": {"b1": 0.9},
}

EIGHT_BIT = ("adamw", "lion")  # Optimizers whose state may have 8 bits.


@dataclasses.dataclass(slots=True, kw_only=True)
class OptimizerConfig:
  """How parameters change. Lengths count optimizer updates.

  Every optimizer reads all fields but `b1`, `b2` and `eps`: of these each has its own values (None;
  see OPTIMIZER_MOMENTS), and one that the chosen optimizer does not read is refused. So are
  `final_fraction` and `decay_steps` where the schedule does not read them, and `state_bits` of 8
  where the optimizer has no such state.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3  # Peak. Adafactor's is relative to the rms of each matrix.
  schedule: str = "cosine"
  warmup_steps: int = 100
  decay_steps: int | None = None  # wsd: length of the decay; None: a tenth of the run.
  final_fraction: float = 0.1  # cosine, linear, wsd: the share of the peak where the run ends.
  weight_decay: float = 0.1  # Times the learning rate; on matrices and embeddings only.
  b1: float | None = None  # Momentum of adamw, lion, sgd and of muon's matrices.
  b2: float | None = None  # Second moment of adamw and of muon's AdamW; memory of lion.
  eps: float | None = None  # Keeps adamw, muon and (on squares) adafactor from dividing by 0.
  state_bits: int = 32  # 8: the moments of adamw and lion as 8-bit codes, block by block.
  clip_norm: float | None = 1.0  # Largest global norm of a gradient; None: no clipping.
  # Skip an update whose gradient norm exceeds this many times its running mean; None: never.
  skip_spikes: float | None = None

  def __post_init__(self):
    for name, allowed in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
      value = getattr(self, name)
      if value not in allowed:
        raise InputError(
          f"optimizer.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(value, allowed)}"
        )
    self._check_numbers()
    self._check_effects()

  def moments(self) -> dict[str, float]:
    """Those of b1, b2 and eps that the optimizer reads, its own values where they are None."""
    own = OPTIMIZER_MOMENTS[self.name]
    return {k: v if getattr(self, k) is None else getattr(self, k) for k, v in own.items()}

  def _check_numbers(self):
    for name in ("learning_rate", "eps", "clip_norm", "skip_spikes"):
      value = getattr(self, name)
      optional = name != "learning_rate"
      if not (optional and value is None) and not 0 < value < float("inf"):
        none = ", or None" if optional else ""
        raise InputError(f"optimizer.{name}={value} must be a positive number{none}.")
    for name in ("b1", "b2"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < 1:
        raise InputError(f"optimizer.{name}={value} must be at least 0 and below 1, or None.")
    if self.warmup_steps < 0:
      raise InputError(f"optimizer.warmup_steps={self.warmup_steps} must be at least 0.")
    if self.decay_steps is not None and self.decay_steps < 1:
      raise InputError(f"optimizer.decay_steps={self.decay_steps} must be at least 1, or None.")
    if not 0 <= self.final_fraction <= 1:
      raise InputError(f"optimizer.final_fraction={self.final_fraction} must lie between 0 and 1.")
    if not 0 <= self.weight_decay < float("inf"):
      raise InputError(f"optimizer.weight_decay={self.weight_decay} must be at least 0.")
    if self.skip_spikes is not None and self.skip_spikes <= 1:
      raise InputError(
        f"optimizer.skip_spikes={self.skip_spikes} must be above 1, or ordinary updates are "
        "skipped: 4 or more is usual."
      )

  def _check_effects(self):
    for name in ("b1", "b2", "eps"):
      if getattr(self, name) is not None and name not in OPTIMIZER_MOMENTS[self.name]:
        readers = [k for k, v in OPTIMIZER_MOMENTS.items() if name in v]
        raise InputError(
          f"optimizer.{name}={getattr(self, name)} has no effect on {self.name}: remove it, or use "
          f"{', '.join(readers)}."
        )
    if self.decay_steps is not None and self.schedule != "wsd":
      raise InputError("optimizer.decay_steps has an effect only with optimizer.schedule='wsd'.")
    if self.state_bits not in (8, 32):
      raise InputError(f"optimizer.state_bits={self.state_bits} is not known: use 32 or 8.")
    if self.state_bits == 8 and self.name not in EIGHT_BIT:
      raise InputError(
        f"optimizer.state_bits=8 is not there for {self.name}: use 32, or {' or '.join(EIGHT_BIT)}."
      )
    default = type(self).__dataclass_fields__["final_fraction"].default
    if self.schedule in ("constant", "inverse_sqrt") and self.final_fraction != default:
      raise InputError(
        f"optimizer.final_fraction={self.final_fraction} has no effect on "
        f"optimizer.schedule={self.schedule!r}: remove it, or use cosine, linear or wsd."
      )
