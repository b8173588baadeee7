"""What a trained model does."""

from infer.attention import attention_maps
from infer.calibrate import calibrate
from infer.generate import Completion, generate, results, stream
from infer.prefix_cache import PrefixCache
from infer.ranking import vote
from infer.tasks.answer import Answer, answer
from infer.tasks.classify import Label, classify
from infer.tasks.fill_mask import Guess, fill_mask
from infer.tasks.similarity import similarity
from infer.tasks.tag import Span, tag
from infer.timing import Timing

__all__ = [
  "Answer",
  "Completion",
  "Guess",
  "Label",
  "PrefixCache",
  "Span",
  "Timing",
  "answer",
  "attention_maps",
  "calibrate",
  "classify",
  "fill_mask",
  "generate",
  "results",
  "similarity",
  "stream",
  "tag",
  "vote",
]
