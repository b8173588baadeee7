"""Model FLOPs of a step, of all that is trained and of what stays as it is."""

from collections.abc import Callable, Mapping

from flax import nnx

from model.flops import counted_params, matmul_params, model_flops
from model.peft.attach import of_adapter
from train.config import Config
from train.objectives import make_objective
from train.objectives.replaced_token import generator_flops
from train.program import adaptation

StepFlops = Callable[[Mapping[str, float], Mapping[str, float]], float]


def step_flops(config: Config) -> StepFlops:
  """(tokens, pairs of the Loss) -> FLOPs of a step.

  Matrices that are not trained have no gradient of their own, which is a third of a step's work; an
  adapter's matrices are counted beside them. What lies before the first that is trained is counted
  as if gradients went through it, and a generator of replaced tokens as if all of it were trained.
  """
  read, learned = _weights(config)

  def flops(tokens: Mapping[str, float], pairs: Mapping[str, float]) -> float:
    found = model_flops(config.model, tokens, pairs, read, learned)
    if config.objective.name == "replaced_token":
      found += generator_flops(config, tokens, pairs)
    return found

  return flops


def _weights(config: Config) -> tuple[dict[str, float], dict[str, float]]:
  """(weights that tokens are multiplied with, those of them that are trained), by part."""
  cfg = config.model
  read = matmul_params(cfg)
  if config.peft.trains_all:
    return read, read
  net = nnx.eval_shape(lambda: make_objective(config).build(cfg, nnx.Rngs(0)))
  plain = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  _, parts, net = adaptation(config, net, plain)

  def trained(path, leaf) -> float:
    chosen = None if parts is None else parts.rows[path]
    return 1.0 if chosen is None else len(chosen) / leaf.shape[0]

  own = counted_params(cfg, net, lambda path, leaf: float(of_adapter(path)))
  return {part: n + own[part] for part, n in read.items()}, counted_params(cfg, net, trained)
