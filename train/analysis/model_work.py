"""FLOPs that the mathematics of a step needs, from the config alone: rows that are full."""

from collections.abc import Mapping

from jax.sharding import Mesh

from model.config import ModelConfig
from model.flops import visible_pairs
from train.config import Config
from train.flops import step_flops
from train.objectives import make_objective
from train.objectives.objective import Side

FULL_ROWS = "each row is one text without padding"


def model_flops(config: Config) -> float:
  """Model FLOPs of a step over all devices (`train.flops.step_flops`), of full rows."""
  cfg, rows = config.model, config.batch_size
  sides = make_objective(config).sides
  read = [side for side in sides.values() if side.read]
  lengths = dict(zip(cfg.stacks, (side.length for side in read), strict=False))
  passes = len(read) if len(cfg.stacks) == 1 else 1  # Contrastive: each text is read by itself.
  tokens: dict[str, float] = {name: rows * length * passes for name, length in lengths.items()}
  tokens["head"] = 0 if cfg.head_kind == "embedding" else rows * _head_length(sides)
  pairs: dict[str, float] = {}
  for name, length in lengths.items():
    for kind in set(cfg.layers(name)):
      seen = visible_pairs(length, kind.window, causal=kind.causal)
      pairs[f"{name}.{kind.window}"] = float(rows * seen * passes)
  if len(lengths) == 2:
    encoder, decoder = lengths.values()
    pairs["cross"] = float(rows * encoder * decoder)
  if config.objective.name == "replaced_token":
    for counts in (tokens, pairs):
      counts.update({f"generator.{name}": n for name, n in counts.copy().items()})
    tokens["head"] = tokens["encoder"]  # The generator reads the masked places, the model all.
  return step_flops(config)(tokens, pairs)


def used_rows(cfg: ModelConfig, mesh: Mesh) -> float:
  """The share of an expert buffer's rows that hold a token when all experts are used evenly.

  Experts apart have room for the worst case, all tokens of all devices (`model.exchange`).
  """
  parts = mesh.shape.get("expert", 1)
  if not cfg.num_experts or parts == 1:
    return 1.0
  return cfg.experts_per_token / (parts * min(cfg.experts_per_token, cfg.num_experts // parts))


def step_tokens(config: Config) -> int:
  """Places for tokens of a step, over all devices and stacks."""
  sides = make_objective(config).sides
  return config.batch_size * sum(side.length for side in sides.values() if side.read)


def _head_length(sides: Mapping[str, Side]) -> int:
  """Vectors that the head reads in a row: those that have a target."""
  answers = [side for side in sides.values() if "weights" in side.fields]
  return answers[0].length if answers else next(iter(sides.values())).length
