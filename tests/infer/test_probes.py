"""Each setting of `generate` does something, and each impossible value is one error that names it.

A new setting needs a row here: a value whose effect shows, and where it shows.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

import infer
from infer import reading
from infer.settings import Settings
from model.peft.named import named
from tests import commands
from tests.infer import tiny

HOT = dict(temperature=2.0)
TEXT = "abcabcabc"


def said(completions: list[infer.Completion]) -> Any:
  return [c.tokens for c in completions]


def attribute(name: str) -> Callable[[list[infer.Completion]], Any]:
  return lambda completions: [getattr(c, name) for c in completions]


@dataclasses.dataclass(frozen=True)
class Probe:
  """A value of a setting, the settings that it needs, and what it changes."""

  value: Any
  base: dict = dataclasses.field(default_factory=dict)
  shows: Callable[[list[infer.Completion]], Any] = said
  slow: bool = False  # It compiles a program of its own.


def first(tokens: list[int]) -> int:
  return tokens[0]


def often(tokens: list[int]) -> int:
  return max(set(tokens), key=tokens.count)


READ: list[tuple[int, ...]] = []  # Shapes of the tokens of each pass over prompts.
# A callable value is asked for one with the tokens of plain greedy decoding.
BEAMS = dict(num_beams=4, num_return_sequences=4)
GROUPS = dict(BEAMS, num_beam_groups=2, diversity_penalty=0.01)
PROBES = {
  "max_new_tokens": Probe(3),
  "min_new_tokens": Probe(9, dict(stop=first)),
  "stop": Probe(first),
  "temperature": Probe(2.0),
  "top_k": Probe(2, HOT),
  "top_p": Probe(0.2, HOT),
  "min_p": Probe(0.9, HOT),
  "typical_p": Probe(0.1, HOT),
  "epsilon_cutoff": Probe(0.3, HOT),
  "adapter": Probe("other"),
  "seed": Probe(1, HOT),
  "repetition_penalty": Probe(5.0),
  "presence_penalty": Probe(50.0),
  "frequency_penalty": Probe(50.0),
  "no_repeat_ngram_size": Probe(1),
  "logit_bias": Probe(lambda tokens: {often(tokens): -60.0}),
  "bad_words": Probe(lambda tokens: [often(tokens)]),
  "allowed_tokens": Probe([5, 6, 7]),
  "num_return_sequences": Probe(2, HOT),
  "best_of": Probe(4, HOT | dict(seed=1)),
  "scorer": Probe(lambda _: lambda prompt, c: -sum(c.logprobs), HOT | dict(best_of=4)),
  "prefix": Probe([3, 5]),
  "penalty_alpha": Probe(0.6, dict(top_k=4), slow=True),
  "num_beams": Probe(4, slow=True),
  "num_beam_groups": Probe(4, GROUPS | dict(diversity_penalty=9.0), slow=True),
  "diversity_penalty": Probe(9.0, GROUPS, slow=True),
  "length_penalty": Probe(3.0, BEAMS, attribute("score"), slow=True),
  "early_stopping": Probe(
    True, dict(BEAMS, length_penalty=2.0, allowed_tokens=[65, 66, 67, 68], stop=[65]), slow=True
  ),
  "draft": Probe("lookup", shows=attribute("acceptance"), slow=True),
  "speculate": Probe(1, dict(draft="layers:1"), attribute("acceptance"), slow=True),
  "json_schema": Probe({"type": "integer"}),
  "regex": Probe("[abc]*"),
  "grammar": Probe('start: "yes"'),
  "prefill_chunk": Probe(4, shows=lambda _: list(READ)),
  "cache_dtype": Probe("int8", shows=attribute("logprobs")),
  "prefix_cache": Probe(infer.PrefixCache, shows=attribute("cached_tokens")),
  "logprobs": Probe(2, shows=attribute("top_logprobs")),
  "echo": Probe(True, shows=attribute("prompt_logprobs")),
}


def test_every_setting_has_a_probe():
  assert PROBES.keys() == {field.name for field in dataclasses.fields(Settings)}


@pytest.fixture(scope="module")
def m():
  return named({"other": tiny.adapted(tiny.model(), 1, targets=("o_proj",))})


@pytest.fixture(scope="module")
def plain(m):
  return infer.generate(m, TEXT, max_new_tokens=16)[0].tokens


def marked(name: str, probe: Probe):
  return pytest.param(name, marks=pytest.mark.slow) if probe.slow else name


@pytest.mark.parametrize("name", [marked(*item) for item in PROBES.items()])
def test_each_setting_changes_what_it_is_to_change(m, plain, name, monkeypatch):
  if name in ("json_schema", "regex", "grammar"):
    pytest.importorskip("llguidance")
  read = reading.read_chunk
  watched = lambda net, params, behind, tokens, *rest, **more: (
    READ.append(tokens.shape), read(net, params, behind, tokens, *rest, **more)
  )[1]  # fmt: skip
  monkeypatch.setattr(reading, "read_chunk", watched)
  READ.clear()
  probe = PROBES[name]
  given = lambda make: make(m) if make is infer.PrefixCache else make(plain)
  settle = lambda value: given(value) if callable(value) else value
  base = {"max_new_tokens": 16} | {k: settle(v) for k, v in probe.base.items()}
  before = infer.generate(m, TEXT, **base)
  seen = probe.shows(before)
  READ.clear()
  after = infer.generate(m, TEXT, **base | {name: settle(probe.value)})
  assert probe.shows(after) != seen


NAN, INF = math.nan, math.inf
# Settings, and what their error begins with: the name and the value.
IMPOSSIBLE = [
  (dict(temperature=-1.0), "temperature=-1.0 must be a number at least 0"),
  (dict(temperature=NAN), "temperature=nan"),
  (dict(temperature=INF), "temperature=inf"),
  (dict(top_k=0), "top_k=0 must be a whole number of at least 1"),
  (dict(top_k=-5), "top_k=-5"),
  (dict(top_p=0.0), "top_p=0.0 must be a number above 0"),
  (dict(top_p=1.5), "top_p=1.5"),
  (dict(top_p=NAN), "top_p=nan"),
  (dict(min_p=-0.5), "min_p=-0.5"),
  (dict(min_p=NAN), "min_p=nan"),
  (dict(typical_p=0.0), "typical_p=0.0"),
  (dict(epsilon_cutoff=1.0), "epsilon_cutoff=1.0"),
  (dict(max_new_tokens=0), "max_new_tokens=0"),
  (dict(max_new_tokens=-1), "max_new_tokens=-1"),
  (dict(min_new_tokens=-1), "min_new_tokens=-1"),
  (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens=9 exceeds max_new_tokens=8"),
  (dict(seed=-1), "seed=-1"),
  (dict(seed=2**64), f"seed={2**64}"),
  (dict(stop=""), "stop=''"),
  (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
  (dict(repetition_penalty=NAN), "repetition_penalty=nan"),
  (dict(presence_penalty=NAN), "presence_penalty=nan"),
  (dict(frequency_penalty=INF), "frequency_penalty=inf"),
  (dict(no_repeat_ngram_size=0), "no_repeat_ngram_size=0"),
  (dict(bad_words=[""]), "bad_words: ''"),
  (dict(logit_bias={5: NAN}), "logit_bias[5]=nan"),
  (dict(allowed_tokens=[-3]), "allowed_tokens=-3"),
  (dict(num_return_sequences=0), "num_return_sequences=0"),
  (dict(num_return_sequences=2), "num_return_sequences=2 of greedy decoding"),
  (dict(best_of=2), "best_of=2 of greedy decoding"),
  (dict(best_of=1, num_return_sequences=3, temperature=1.0), "best_of=1 is less"),
  (dict(penalty_alpha=2.0, top_k=4), "penalty_alpha=2.0"),
  (dict(penalty_alpha=0.5), "penalty_alpha=0.5 chooses among the top_k"),
  (dict(num_beams=0), "num_beams=0"),
  (dict(num_beams=4, temperature=1.0), "temperature=1.0 does not go with num_beams=4"),
  (dict(num_beams=4, num_beam_groups=3), "num_beams=4 is not a multiple of num_beam_groups=3"),
  (dict(num_beam_groups=2), "num_beam_groups=2 has no effect without a search"),
  (dict(num_beams=2, diversity_penalty=-1.0), "diversity_penalty=-1.0"),
  (dict(diversity_penalty=1.0), "diversity_penalty=1.0 has no effect"),
  (dict(length_penalty=NAN), "length_penalty=nan"),
  (dict(length_penalty=2.0), "length_penalty=2.0 has no effect"),
  (dict(num_beams=2, early_stopping="soon"), "early_stopping='soon'"),
  (dict(num_beams=2, num_return_sequences=3), "num_return_sequences=3 is more than num_beams=2"),
  (dict(speculate=3), "speculate has no effect without a draft"),
  (dict(draft="lookup", speculate=0), "speculate=0"),
  (dict(logprobs=0), "logprobs=0"),
]  # fmt: skip


def as_flags(settings: dict) -> list[str]:
  """The same on the command line."""
  words = []
  for name, value in settings.items():
    if isinstance(value, dict):
      value = "{" + ", ".join(f'"{k}": {"NaN" if v != v else v}' for k, v in value.items()) + "}"
    words += [f"--{name}={v}" for v in (value if isinstance(value, list) else [value])]
  return words


@pytest.mark.parametrize(("settings", "said"), IMPOSSIBLE)
def test_impossible_values_are_named_in_python(m, settings, said):
  for call in (infer.generate, infer.stream):
    with pytest.raises(ValueError, match=re.escape(said)):
      call(m, TEXT, **settings)


QUICK = (0, 6, 15)
ON_REQUEST = [
  case if i in QUICK else pytest.param(*case, marks=pytest.mark.slow)
  for i, case in enumerate(IMPOSSIBLE)
]


@pytest.mark.parametrize(("settings", "said"), ON_REQUEST)
def test_impossible_values_are_one_error_line_of_the_command(settings, said):
  report = ["--json"] if "logprobs" in settings else []
  done = commands.run(
    "infer", "--checkpoint=/no/model", "--prompt=a", *as_flags(settings), *report
  )  # fmt: skip
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error:") and said in last, done.stderr
  assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("flag", ["--top_kk=3", "--top_k=2.5", "--echo=maybe", "--seed=x"])
def test_flags_that_cannot_be_read_are_one_error_line(flag):
  done = commands.run("infer", "--checkpoint=/no/model", "--prompt=a", flag)
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error:"), done.stderr
  assert flag.split("=")[0].lstrip("-") in last and "Traceback" not in done.stderr


def test_an_unknown_name_is_named_with_the_nearest(m):
  with pytest.raises(ValueError, match="unknown setting 'temprature' of generate"):
    infer.generate(m, TEXT, temprature=1.0)
