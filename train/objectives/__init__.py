"""What is learned: one file for each objective."""

from model.tokenizer import Tokenizer
from train.config import Config
from train.objectives.causal_lm import CausalLM
from train.objectives.classification import Classification
from train.objectives.contrastive import Contrastive
from train.objectives.denoising import Denoising
from train.objectives.masked_lm import MaskedLM
from train.objectives.objective import Objective
from train.objectives.prefix_lm import DecoderPrefixLM, EncoderPrefixLM
from train.objectives.prompted import prompted, shortened
from train.objectives.replaced_token import ReplacedToken
from train.objectives.seq2seq import Seq2Seq
from train.objectives.sft import SFT
from train.objectives.span_corruption import SpanCorruption
from train.objectives.span_qa import SpanQA
from train.objectives.special_tokens import bare, extra_tokens
from train.objectives.tagging import Tagging
from train.objectives.ul2 import UL2

__all__ = ["bare", "extra_tokens", "make_objective"]


def make_objective(config: Config, tokenizer: Tokenizer | None = None) -> Objective:
  """The objective that the config names, for its model and lengths.

  Args:
    tokenizer: whose special tokens the pieces are made with; None: losses only.

  Raises:
    InputError: if the tokenizer has no token that the objective needs.
  """
  prefix_lm = DecoderPrefixLM if config.model.shape == "decoder" else EncoderPrefixLM
  kinds = {
    "causal_lm": CausalLM, "prefix_lm": prefix_lm, "masked_lm": MaskedLM,
    "replaced_token": ReplacedToken, "span_corruption": SpanCorruption, "denoising": Denoising,
    "ul2": UL2, "seq2seq": Seq2Seq, "classification": Classification, "tagging": Tagging,
    "span_qa": SpanQA, "contrastive": Contrastive, "sft": SFT,
  }  # fmt: skip
  objective = kinds[config.objective.name].of(shortened(config), tokenizer)
  return prompted(objective, config) if config.peft.before_texts else objective
