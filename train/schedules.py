"""Learning rates as functions of the step."""

import jax.numpy as jnp
import optax

from model.errors import InputError
from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate of step 0, 1, …, `steps` - 1.

  It rises linearly from `learning_rate / (warmup_steps + 1)` and is the full rate at step
  `warmup_steps`. Cosine, linear and wsd reach `final_fraction` of it at `steps`, that is after the
  last update, as in nanoGPT and in optax.

  Raises:
    InputError: if warm-up, or warm-up and decay, leave no step of the run.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  if warmup >= steps:
    raise InputError(
      f"optimizer.warmup_steps={warmup} must be below steps={steps}, or the learning rate never "
      "reaches its peak: shorten the warm-up or train longer."
    )
  after = _after_warmup(config, steps - warmup)
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else after
  rate = optax.join_schedules([rise, after], [warmup])
  # In the default float type, so that a run in float64 does not hang on how float32 rounds.
  return lambda step: jnp.asarray(rate(jnp.asarray(step, float)), float)


def _after_warmup(config: OptimizerConfig, length: int) -> optax.Schedule:
  """The schedule of the `length` steps that follow the warm-up, counted from 0."""
  peak, last = config.learning_rate, config.learning_rate * config.final_fraction
  if config.schedule == "cosine":
    return optax.cosine_decay_schedule(peak, length, alpha=config.final_fraction)
  if config.schedule == "linear":
    return optax.linear_schedule(peak, last, length)
  if config.schedule == "constant":
    return optax.constant_schedule(peak)
  if config.schedule == "inverse_sqrt":  # Vaswani et al., arXiv:1706.03762, section 5.3.
    flat = max(config.warmup_steps, 1)
    return lambda count: peak * jnp.sqrt(flat / (count + flat))
  steps = length + config.warmup_steps
  decay = max(1, steps // 10) if config.decay_steps is None else config.decay_steps
  if decay > length:
    raise InputError(
      f"optimizer.warmup_steps={config.warmup_steps} and the decay of {decay} steps "
      f"(optimizer.decay_steps; None is a tenth of the run) do not fit into steps={steps}: "
      "shorten one of them or train longer."
    )
  fall = optax.linear_schedule(peak, last, decay)
  return optax.join_schedules([optax.constant_schedule(peak), fall], [length - decay])
