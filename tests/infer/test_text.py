"""Text while tokens come: whole characters, and an end at the first stop string."""

import itertools
import random

import pytest

from infer.text import Transcript, continuation
from model.vocabulary import build_tokenizer

BYTES = build_tokenizer("bytes", None, [])
TEXT = "Zoë's naïve café — 日本語 🎉🇫🇷 e\u0301 end."


def transcript(tokens, **settings) -> tuple[Transcript, list[str]]:
  """What is shown after each token, until the end."""
  t, shown = Transcript(BYTES.decode, [], **settings), []
  for token in tokens:
    ended = t.push(token)
    shown.append(t.shown())
    if ended:
      break
  return t, shown


def test_shown_text_grows_by_whole_characters_and_ends_as_the_whole():
  tokens = list(TEXT.encode())
  _, shown = transcript(tokens)
  for before, after in itertools.pairwise(shown):
    assert after.startswith(before)
  assert all(TEXT.startswith(s) for s in shown)
  assert shown[-1] == TEXT == continuation(BYTES.decode, [], tokens)


def test_shown_text_of_random_bytes_is_a_prefix_of_their_decoding():
  rng = random.Random(0)
  for _ in range(300):
    tokens = [rng.choice((0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF))
              for _ in range(24)]  # fmt: skip
    whole = continuation(BYTES.decode, [], tokens)
    _, shown = transcript(tokens)
    assert all(whole.startswith(s) for s in shown), (tokens, shown)


def test_a_stop_string_across_tokens_cuts_text_and_tokens_before_it():
  tokens = list(b"one STOP two")
  t, shown = transcript(tokens, stop=("STOP",))
  assert t.close() == ("one ", 4)
  assert len(shown) == len("one STOP")  # It ended as soon as the string was complete.
  assert shown[4:7] == ["one "] * 3  # What may become a stop string is held back.


def test_what_began_a_stop_string_and_is_none_is_shown_after_all():
  _, shown = transcript(list(b"aSTOx"), stop=("STOP",))
  assert shown == ["a", "a", "a", "a", "aSTOx"]


def test_the_stop_string_that_is_complete_first_ends_the_text():
  t, _ = transcript(list(b"abcdef"), stop=("abcdef", "cd"))
  assert t.close() == ("ab", 2)


def test_a_token_that_a_stop_string_begins_in_is_dropped_whole():
  words = {0: "ab", 1: "c<", 2: "/s>", 3: "d"}
  decode = lambda ids: "".join(words[i] for i in ids)
  t = Transcript(decode, [], stop=("</s>",))
  assert [t.push(i) for i in (0, 1, 2)] == [False, False, True]
  assert t.close() == ("abc", 1)


def test_stop_strings_count_behind_the_first_tokens_only():
  tokens = list(b"a.b.c.d")
  t, _ = transcript(tokens, stop=(".",), min_tokens=3)
  assert t.close() == ("a.b", 3)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_prompt_and_continuation_read_as_the_whole(kind):
  corpus = ["the quick brown fox jumps over the lazy dog, naïve café 日本"] * 20
  tokenizer = build_tokenizer(kind, 300 if kind == "bpe" else 60, corpus)
  tokens = tokenizer.encode(corpus[0], add_special_tokens=False)
  whole = tokenizer.decode(tokens)
  for cut in range(1, len(tokens)):
    prompt = tokenizer.decode(tokens[:cut])
    if prompt.endswith("\ufffd"):
      continue
    t = Transcript(tokenizer.decode, tokens[:cut])
    for token in tokens[cut:]:
      t.push(token)
    assert prompt + t.shown() == whole
    assert prompt + continuation(tokenizer.decode, tokens[:cut], tokens[cut:]) == whole
