"""Strings that tokenizers disagree about when anything about them is wrong."""

import random
import unicodedata

SPECIAL = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>",
           "<|endoftext|>", "<extra_id_0>", "<0x41>", "▁"]  # fmt: skip
WORDS = [
  "the", "quick", "brown", "fox", "def", "return", "self.table[i]", "!=", "None;", "naïve", "café",
  "Zürich", "coöperate", "don't", "I'll", "we've", "3.14159", "1,000,000", "€5", "50%", "C++",
  "a_b", "camelCase", "HTTP/2", "x=y+z", "http://a.b/c?d=e&f=g", "e-mail", "Привет", "мир", "γειά",
  "σου", "ñandú", "İstanbul", "ǅungla", "ﬁne", "½", "ＦＵＬＬ", "Straße",
]  # fmt: skip
OTHERS = [
  "日本語", "漢字とかな", "한국어", "中文,测试。", "שלום עולם", "مرحبا بالعالم", "हिन्दी", "ไทย",
  "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301", "a\u0308\u0323", "\u0301", "Z̸̢a̷l̶g̴o̵", "\u200b",
  "\u200d", "\ufeff", "\u2028", "\u00ad", "\u202e", "𝔘𝔫𝔦", "𐍈", "\ufffd",
]  # fmt: skip
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2009", "    ", "\v", "\f"]
CONTROL = [chr(c) for c in (0, 1, 7, 8, 27, 31, 127, 133, 159)]


def strings(count: int, special: tuple[str, ...] = ()) -> list[str]:
  """`count` of them, the same each time.

  Args:
    special: further special tokens to spell in text.
  """
  rng, spelled = random.Random(0), [*SPECIAL, *special]
  letters = [chr(c) for c in range(0x20, 0x3100) if unicodedata.category(chr(c))[0] in "LMNPSZ"]
  kinds = [
    lambda: rng.choice(WORDS), lambda: rng.choice(OTHERS), lambda: rng.choice(SPACES),
    lambda: rng.choice(CONTROL), lambda: rng.choice(spelled), lambda: str(rng.randrange(10**9)),
    lambda: "".join(rng.choices(letters, k=rng.randint(1, 6))),
    lambda: rng.choice("ab \n.")* rng.randint(2, 40),
  ]  # fmt: skip
  weights = [10, 4, 2, 1, 2, 2, 2, 1]
  found = ["", " ", "\n", "a", *OTHERS, *SPACES, *spelled, *(f"a{t} b" for t in spelled)]
  while len(found) < count:
    parts = [kind() for kind in rng.choices(kinds, weights, k=rng.randint(1, 12))]
    found.append(rng.choice(["", " ", " "]).join(parts))
  return found[:count]
