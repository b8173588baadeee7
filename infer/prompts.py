"""From prompts to token ids, after every check that needs the model."""

from numbers import Integral
from typing import TYPE_CHECKING, Any

from infer.constrain import language_of
from infer.heads import check_head
from infer.ranking import check_scorer
from infer.requests import prefix_tokens, spellings
from infer.settings import Settings
from model.errors import InputError
from model.inputs import decoder_start
from model.peft.virtual import virtual_tokens

if TYPE_CHECKING:
  from model import Model


def checked(m: "Model", prompts: Any, settings: Settings) -> list[list[int]]:
  """The prompts as token ids: of an encoder–decoder, what its encoder reads.

  Raises:
    InputError: as `infer.generate` says.
  """
  check_head(m.config, "generate")
  vocab = m.config.vocab_size or 0
  if settings.stop_strings() and m.tokenizer is None:
    raise InputError("stop strings need a tokenizer and this model has none: give token ids.")
  for token in settings.stop_ids():
    _in_vocabulary("stop", token, vocab)
  _check_words(m, settings, vocab)
  language_of(m, settings)
  check_scorer(settings.scorer)
  if settings.prefix_cache is not None:
    settings.prefix_cache.check(m)
  if settings.prefill_chunk is not None and (
    m.config.shape != "decoder" or m.config.prefix_attention
  ):
    raise InputError(
      f"prefill_chunk={settings.prefill_chunk} has no effect: this model reads prompts in both "
      "directions, which takes them whole. Leave it out."
    )
  if settings.echo and (m.config.shape != "decoder" or m.config.prefix_attention):
    raise InputError(
      "echo tells what a decoder gives a prompt token by token, and this model reads prompts in "
      "both directions: leave it out."
    )
  if settings.logprobs is not None and settings.logprobs > vocab:
    raise InputError(f"logprobs={settings.logprobs} exceeds the vocabulary of {vocab} tokens.")
  encoded = [_encoded(m, p, i) for i, p in enumerate(listed(prompts))]
  for i, prompt in enumerate(encoded):
    for token in prompt:
      _in_vocabulary(f"prompt {i}", token, vocab)
    _check_room(m, i, prompt, settings)
    _check_search(m, prompt, settings)
  return encoded


def _check_search(m: "Model", prompt: list[int], settings: Settings) -> None:
  """Raises an InputError where beams would outgrow the length that LongRoPE began with."""
  original = m.config.rope_original_positions
  plain = settings.num_beams == 1 and not settings.penalty_alpha and settings.draft is None
  if plain or m.config.rope_scaling != "longrope" or original is None:
    return
  original -= virtual_tokens(m.params, "decoder")
  if len(prompt) <= original < len(prompt) + settings.most_new_tokens():
    raise InputError(
      f"a text of {len(prompt)} tokens would outgrow the {original} positions that LongRoPE began "
      "with, and what num_beams, penalty_alpha or draft decode is not read anew: ask for fewer "
      "tokens."
    )


def _check_words(m: "Model", settings: Settings, vocab: int) -> None:
  """Raises an InputError for words that are no tokens of this model."""
  for name, words in (("bad_words", settings.bad_words), ("logit_bias", settings.logit_bias or ())):
    for word in words:
      if isinstance(word, str) and m.tokenizer is None:
        raise InputError(f"{name}: {word!r} is a text and the model has no tokenizer: give ids.")
      found = spellings(m, word)
      if not found:
        raise InputError(f"{name}: {word!r} has no token of this model's tokenizer.")
      for token in (token for tokens in found for token in tokens):
        _in_vocabulary(name, token, vocab)
  for token in settings.allowed_tokens or ():
    _in_vocabulary("allowed_tokens", token, vocab)
  first = prefix_tokens(m, settings)
  for token in first:
    _in_vocabulary("prefix", token, vocab)
  if settings.prefix and not first:
    raise InputError(f"prefix={settings.prefix!r} has no token of this model's tokenizer.")
  if len(first) > settings.most_new_tokens():
    raise InputError(
      f"prefix has {len(first)} tokens, and max_new_tokens={settings.most_new_tokens()}: ask for "
      "more."
    )


def prefix(m: "Model", prompt: list[int]) -> list[int]:
  """What the decoder reads before the first new token: the prompt, or behind an encoder the token
  that starts it.

  Raises:
    InputError: if there is no such token.
  """
  start = decoder_start(m.config, m.tokenizer)
  return prompt if start is None else [start]


def by_room(m: "Model", prompts: list[list[int]], settings: Settings) -> dict[int, list[int]]:
  """Indices of prompts by the most new tokens that each may get."""
  groups: dict[int, list[int]] = {}
  for i, prompt in enumerate(prompts):
    room, limit = settings.most_new_tokens(), m.room("decoder")
    if settings.max_new_tokens is None and limit is not None:
      room = min(room, limit - len(prefix(m, prompt)))
    groups.setdefault(room, []).append(i)
  return groups


def _check_room(m: "Model", index: int, prompt: list[int], settings: Settings) -> None:
  limit, read = m.room("decoder"), prefix(m, prompt)
  longest = m.room(m.config.stacks[0])
  if limit is None or longest is None:
    return
  least = max(1, settings.min_new_tokens, len(prefix_tokens(m, settings)))
  asked = settings.max_new_tokens or least
  if read is prompt and len(prompt) + asked > limit:
    raise InputError(
      f"prompt {index} has {len(prompt)} tokens and {asked} new ones are asked for: together "
      f"{len(prompt) + asked}, and the model has {limit} positions{_virtual(m)}. Shorten the "
      "prompt or ask "
      "for fewer tokens (max_new_tokens)."
    )
  if len(prompt) > longest:
    raise InputError(
      f"prompt {index} has {len(prompt)} tokens, and the model has {longest} positions"
      f"{_virtual(m)}: shorten it."
    )
  if len(read) + asked > limit:
    raise InputError(
      f"{asked} new tokens are asked for behind the decoder's first, and the model has {limit} "
      "positions: ask for fewer (max_new_tokens)."
    )


def _virtual(m: "Model") -> str:
  """Why a model has fewer positions than its config says; '' if it has as many."""
  counts = [virtual_tokens(m.params, stack) for stack in m.config.stacks]
  return f" beside {max(counts)} virtual tokens" if any(counts) else ""


def listed(prompts: Any) -> list[Any]:
  """One prompt or many -> a list of prompts."""
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, bytes | dict) or not hasattr(prompts, "__iter__"):
    raise InputError(f"prompts={prompts!r} must be a text, a list of token ids, or a list of them.")
  prompts = list(prompts)
  if not prompts:
    raise InputError("prompts is empty: give at least one text or one list of token ids.")
  return [prompts] if all(isinstance(p, Integral) for p in prompts) else prompts


def _encoded(m: "Model", prompt: Any, index: int) -> list[int]:
  """Token ids of a prompt; an empty one is the tokenizer's first token, where it has one."""
  if isinstance(prompt, str):
    if m.tokenizer is None:
      raise InputError(f"prompt {index} is a text and the model has no tokenizer: give token ids.")
    whole = m.config.shape == "encoder_decoder"  # An encoder reads the closing token too.
    tokens = m.tokenizer.encode(prompt) if whole else m.tokenizer.encode_prompt(prompt)
  else:
    tokens = list(prompt) if hasattr(prompt, "__iter__") else [prompt]
    if not all(isinstance(t, Integral) and not isinstance(t, bool) for t in tokens):
      raise InputError(f"prompt {index} is {prompt!r}: give a text or a list of token ids.")
  bos = getattr(m.tokenizer, "bos_id", None)
  if tokens:
    return [int(t) for t in tokens]
  if bos is None:
    raise InputError(
      f"prompt {index} is empty and the tokenizer has no token that begins a text: give some text."
    )
  return [bos]


def _in_vocabulary(name: str, token: int, vocab: int) -> None:
  if not 0 <= token < vocab:
    raise InputError(f"{name}: token {token} is not in the vocabulary of ids 0 to {vocab - 1}.")
