"""ObjectiveConfig: what is learned."""

import dataclasses
from typing import Any

from model.errors import InputError, nearest
from train.denoisers import parse_denoisers

# UL2 (arXiv:2205.05131, table 1): kind, mean length of a span (S: of all text), share of noise.
UL2_DENOISERS = ("R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25")
# What each objective reads besides the fields that all read, and its values where the config has
# None.
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {
  "causal_lm": {},
  "prefix_lm": {},
  "masked_lm": dict(
    mask_rate=0.15, mask_unit="token", max_ngram=3, mask_share=0.8, random_share=0.1, pairs="none",
  ),
  "replaced_token": dict(
    mask_rate=0.15, mask_unit="token", max_ngram=3, mask_share=0.85, random_share=0.0,
    generator_share=0.25, replaced_weight=50.0,
  ),
  "span_corruption": dict(mask_rate=0.15, mean_span=3.0),
  "denoising": dict(mask_rate=0.3, mean_span=3.0, permute_sentences=True),
  "ul2": dict(denoisers=UL2_DENOISERS),
  "seq2seq": {},
  "sft": dict(turns="all", too_long="error", noise=0.0),
  "classification": {},
  "tagging": {},
  "span_qa": dict(stride=128),
  "contrastive": dict(temperature=0.05),
}  # fmt: skip
OBJECTIVES = tuple(OBJECTIVE_SETTINGS)
# Those that score the vocabulary for their loss alone.
WORD_OBJECTIVES = (
  "causal_lm", "prefix_lm", "masked_lm", "span_corruption", "denoising", "ul2", "seq2seq",
  "sft",
)  # fmt: skip
MASK_UNITS = ("token", "word", "ngram")
PAIRS = ("none", "next_sentence", "sentence_order")
TURNS = ("all", "last")
TOO_LONG = ("error", "drop", "truncate")


@dataclasses.dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
  """What is learned.

  Every objective reads `z_loss` and `label_smoothing` where its targets are tokens or labels; of
  the others each has its own values (None; see OBJECTIVE_SETTINGS), and one that the chosen
  objective does not read is refused.
  """

  name: str = "causal_lm"
  z_loss: float = 0.0  # Weight of log² of the softmax normalizer (PaLM uses 1e-4).
  label_smoothing: float = 0.0
  loss_parts: int = 1  # Parts of a row that the vocabulary is scored for, one after the other.
  mask_rate: float | None = None  # Share of the tokens that are masked, replaced or left out.
  mask_unit: str | None = None  # What is masked together: a token, a word, an n-gram of words.
  max_ngram: int | None = None  # Words of the longest n-gram.
  mask_share: float | None = None  # Of the chosen tokens: those that the mask stands for.
  random_share: float | None = None  # Of the chosen tokens: those that a random one stands for.
  pairs: str | None = None  # Two texts a piece: does the second follow, or are they in order?
  generator_share: float | None = None  # Width of the generator, of the discriminator's (ELECTRA).
  replaced_weight: float | None = None  # Of the discriminator's loss beside the generator's.
  mean_span: float | None = None  # Mean length of a span, in tokens.
  permute_sentences: bool | None = None  # BART: sentences in random order.
  denoisers: tuple[str, ...] | None = None  # UL2: KIND:MEAN_SPAN:RATE, S:RATE.
  stride: int | None = None  # Tokens that two windows on one text share.
  temperature: float | None = None  # Divides similarities of embeddings.
  turns: str | None = None  # Which answers of a conversation are learned: all, or the last.
  too_long: str | None = None  # Conversations: an error, dropped, or cut behind an answer.
  noise: float | None = None  # NEFTune's alpha (5 is usual); 0: none.

  def __post_init__(self):
    if self.name not in OBJECTIVES:
      raise InputError(
        f"objective.name={self.name!r} is not known: use one of {', '.join(OBJECTIVES)}."
        f"{nearest(self.name, OBJECTIVES)}"
      )
    if not 0 <= self.label_smoothing < 1:
      raise InputError(f"objective.label_smoothing={self.label_smoothing}: use 0 <= s < 1.")
    if not 0 <= self.z_loss < float("inf"):
      raise InputError(f"objective.z_loss={self.z_loss} must be at least 0.")
    self._check_effects()
    self._check_values()

  def resolved(self) -> "ObjectiveConfig":
    """This, with the objective's own values in the place of None."""
    own = OBJECTIVE_SETTINGS[self.name]
    return dataclasses.replace(self, **{k: v for k, v in own.items() if getattr(self, k) is None})

  @property
  def paired(self) -> bool:
    """Whether two texts make a piece."""
    return (self.pairs or OBJECTIVE_SETTINGS[self.name].get("pairs", "none")) != "none"

  def _check_effects(self):
    everything = {name for settings in OBJECTIVE_SETTINGS.values() for name in settings}
    for name in sorted(everything - OBJECTIVE_SETTINGS[self.name].keys()):
      if getattr(self, name) is not None:
        readers = [k for k, v in OBJECTIVE_SETTINGS.items() if name in v]
        raise InputError(
          f"objective.{name}={getattr(self, name)!r} has no effect on {self.name}: remove it, or "
          f"use {', '.join(readers)}."
        )

  def _check_values(self):
    for name, allowed in (("mask_unit", MASK_UNITS), ("pairs", PAIRS), ("turns", TURNS),
                          ("too_long", TOO_LONG)):  # fmt: skip
      value = getattr(self, name)
      if value is not None and value not in allowed:
        raise InputError(
          f"objective.{name}={value!r} is not known: use one of {', '.join(allowed)}."
          f"{nearest(value, allowed)}"
        )
    if self.mask_rate is not None and not 0 < self.mask_rate < 1:
      raise InputError(f"objective.mask_rate={self.mask_rate} must lie between 0 and 1.")
    if self.loss_parts < 1:
      raise InputError(f"objective.loss_parts={self.loss_parts} must be at least 1.")
    if self.loss_parts > 1 and self.name not in WORD_OBJECTIVES:
      raise InputError(
        f"objective.loss_parts={self.loss_parts} has no effect on {self.name}: leave it out, or "
        f"use {', '.join(WORD_OBJECTIVES)}."
      )
    shares = self.mask_share or 0.0, self.random_share or 0.0
    if min(shares) < 0 or sum(shares) > 1:
      raise InputError(
        f"objective.mask_share={shares[0]} and random_share={shares[1]} are shares of the chosen "
        "tokens: each is at least 0 and together they are at most 1."
      )
    if self.generator_share is not None and not 0 < self.generator_share <= 1:
      raise InputError(f"objective.generator_share={self.generator_share}: use 0 < s <= 1.")
    for name in ("mean_span", "max_ngram", "stride"):
      value = getattr(self, name)
      if value is not None and not 1 <= value < float("inf"):
        raise InputError(f"objective.{name}={value} must be at least 1.")
    if self.noise is not None and not 0 <= self.noise < float("inf"):
      raise InputError(f"objective.noise={self.noise} must be at least 0.")
    if self.denoisers is not None:
      parse_denoisers(self.denoisers)
    for name in ("temperature", "replaced_weight"):
      value = getattr(self, name)
      if value is not None and not 0 < value < float("inf"):
        raise InputError(f"objective.{name}={value} must be a positive number.")
