"""What is learned: one file for each objective."""

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config
from train.objectives.causal_lm import CausalLM
from train.objectives.classification import Classification
from train.objectives.contrastive import Contrastive
from train.objectives.objective import Objective
from train.objectives.seq2seq import Seq2Seq
from train.objectives.span_qa import SpanQA
from train.objectives.tagging import Tagging


def make_objective(config: Config, tokenizer: Tokenizer | None = None) -> Objective:
  """The objective that the config names, for its model and lengths.

  Args:
    tokenizer: whose special tokens the pieces are made with; None: losses only.

  Raises:
    InputError: if the tokenizer has no token that the objective needs.
  """
  kinds = {
    "causal_lm": CausalLM, "seq2seq": Seq2Seq, "classification": Classification,
    "tagging": Tagging, "span_qa": SpanQA, "contrastive": Contrastive,
  }  # fmt: skip
  if config.objective.name not in kinds:
    raise InputError(f"objective.name={config.objective.name!r} is not there yet.")
  return kinds[config.objective.name].of(config, tokenizer)
