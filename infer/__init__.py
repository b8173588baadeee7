"""What a trained model does."""

from infer.calibrate import calibrate
from infer.generate import Completion, generate, stream
from infer.prefix_cache import PrefixCache
from infer.ranking import vote
from infer.tasks.answer import Answer, answer
from infer.tasks.classify import Label, classify
from infer.tasks.fill_mask import Guess, fill_mask
from infer.tasks.similarity import similarity
from infer.tasks.tag import Span, tag

__all__ = [
  "Answer",
  "Completion",
  "Guess",
  "Label",
  "PrefixCache",
  "Span",
  "answer",
  "calibrate",
  "classify",
  "fill_mask",
  "generate",
  "similarity",
  "stream",
  "tag",
  "vote",
]
