"""What is learned: one file for each objective."""

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config
from train.objectives.causal_lm import CausalLM
from train.objectives.objective import Objective
from train.objectives.special_tokens import extra_tokens

__all__ = ["extra_tokens", "make_objective"]


def make_objective(config: Config, tokenizer: Tokenizer | None = None) -> Objective:
  """The objective that the config names, for its model and lengths.

  Args:
    tokenizer: whose special tokens the pieces are made with; None: losses only.

  Raises:
    InputError: if the tokenizer has no token that the objective needs.
  """
  kinds = {"causal_lm": CausalLM}
  if config.objective.name not in kinds:
    raise InputError(f"objective.name={config.objective.name!r} is not there yet.")
  return kinds[config.objective.name].of(config, tokenizer)
