"""What a person sees: colours, progress, results in order, timing, and flags for all settings."""

import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import infer
import infer.batch
import model
from infer import probabilities, progress
from infer.batch import Batch, rows_at_once
from infer.setting_flags import flag_of
from infer.settings import Settings
from infer.timing import parameter_bytes
from tests import commands
from tests.infer import tiny
from tests.infer.test_command import SAME, SETTINGS, command
from tests.infer.test_encoder_decoder import SHAPE


@pytest.fixture(scope="module")
def m():
  return tiny.model()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "tiny"
  model.save(tiny.model(), folder)
  return folder


def on_a_terminal(*arguments: str, environment: dict[str, str]) -> tuple[int, str]:
  """(status, all that a command writes to a terminal)."""
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
  values = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment
  process = subprocess.Popen(
    [sys.executable, "-m", "infer", *arguments], stdout=theirs, stderr=theirs, cwd=commands.ROOT,
    env=values,
  )  # fmt: skip
  os.close(theirs)
  told = b""
  while True:
    try:
      some = os.read(ours, 65536)
    except OSError:  # Linux says so when the other side is closed.
      break
    if not some:
      break
    told += some
  os.close(ours)
  return process.wait(), told.decode().replace("\r\n", "\n")


def spoken(coloured: str) -> list[tuple[int, str]]:
  """(background, text) of each coloured piece."""
  return [(int(c), t) for c, t in re.findall(r"\x1b\[48;5;(\d+)m\x1b\[38;5;16m(.*?)\x1b\[0m",
                                             coloured)]  # fmt: skip


def background(probability: float) -> int:
  bounds = ((0.9, 151), (0.5, 193), (0.1, 229), (0.01, 216), (0.0, 203))
  return next(colour for least, colour in bounds if probability >= least)


def test_a_terminal_gets_colours_a_legend_and_a_bar(workdir, m, tmp_path):
  (tmp_path / "p.txt").write_text("Hi\nx\n", encoding="utf-8")
  status, told = on_a_terminal(
    f"--checkpoint={workdir}", f"--prompts_file={tmp_path}/p.txt", "--show_probs", *SETTINGS,
    f"--cache_dir={tmp_path}/cache", environment={"TERM": "xterm-256color"},
  )  # fmt: skip
  assert status == 0, told
  assert "50% or more" in told and "2/2" in told
  told = re.sub(r"(\r|\x1b\[A|\x1b\[K)", "", told)
  want = infer.generate(m, ["Hi", "x"], **SAME)
  for one in want:
    assert probabilities.shown(m, "Hi", one) in told
  first, second = (told.index(probabilities.shown(m, "Hi", one)) for one in want)
  assert first < told.index("---\n") < second


def test_each_token_has_the_colour_of_its_probability(m, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  one = infer.generate(m, "Hi", max_new_tokens=24, temperature=1.3, allowed_tokens=range(32, 127))
  ascii_only = probabilities.shown(m, "Hi", one[0])
  chances = np.exp(one[0].logprobs)
  assert spoken(ascii_only) == [
    (background(p), chr(t)) for p, t in zip(chances, one[0].tokens, strict=True)
  ]
  assert len({colour for colour, _ in spoken(ascii_only)}) >= 3
  monkeypatch.setenv("NO_COLOR", "1")
  plain = probabilities.shown(m, "Hi", one[0])
  assert "\x1b" not in plain + probabilities.legend()
  assert plain == "".join(
    f"{chr(t)}⟨{100 * p:.0f}⟩" for p, t in zip(chances, one[0].tokens, strict=True)
  )


def completion(m, text: str) -> infer.Completion:
  """Each token as probable as not."""
  tokens = m.tokenizer.encode(text, add_special_tokens=False)
  return infer.Completion(text, tokens, [float(np.log(0.5))] * len(tokens), "stop")


def test_characters_of_several_tokens_breaks_and_controls_are_shown_once_and_safely(m, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  shown = probabilities.shown(m, "Hi", completion(m, "é日a"))
  assert spoken(shown) == [(229, "é"), (229, "日"), (193, "a")], "half times half, and again"
  shown = probabilities.shown(m, "Hi", completion(m, "a\n\tb\x1b[31m\u202e"))
  assert [text for _, text in spoken(shown)] == [
    *"a⏎⇥b", "\\u001b", *"[31m", "\\u202e",
  ]  # fmt: skip
  assert "\x1b[31m" not in shown and shown.count("\n") == 1
  ended = completion(m, "a")
  ended.tokens.append(m.tokenizer.eos_id)
  ended.logprobs.append(0.0)
  assert spoken(probabilities.shown(m, "Hi", ended)) == [(193, "a"), (151, "<eos>")]
  cut = dataclasses.replace(completion(m, "ab"), text="abc")
  assert probabilities.shown(m, "Hi", cut).endswith("\x1b[0mc"), "what a stop string left"
  half = completion(m, "é")
  del half.tokens[1:], half.logprobs[1:]
  assert spoken(probabilities.shown(m, "Hi", half)) == [(193, "\ufffd")]


def test_probabilities_are_refused_where_they_cannot_be_seen(workdir, m, tmp_path):
  for flag, said in (
    ("--show_probs", "stdout is none"), ("--show_probs=allways", "terminal, always"),
    ("--show_probs --json", "exclude each other"), ("--show_probs --stream", "exclude each other"),
  ):  # fmt: skip
    done = command(f"--checkpoint={workdir}", "--prompt=Hi", *flag.split(), folder=tmp_path)
    assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1], flag
  done = command(f"--checkpoint={workdir}", "--prompt=Hi", "--show_probs=always", *SETTINGS,
                 folder=tmp_path)  # fmt: skip
  want = infer.generate(m, "Hi", **SAME)[0]
  assert done.stdout == probabilities.shown(m, "Hi", want) + "\n", done.stderr


def test_results_come_in_order_a_window_at_a_time_and_are_those_of_generate(m, monkeypatch):
  monkeypatch.setattr(infer.batch, "PASS_TOKENS", 16)
  prompts = [f"{'long ' * (i % 3)}{i}" for i in range(24)]
  settings = dict(max_new_tokens=4, temperature=1.2, seed=list(range(24)), num_return_sequences=2)
  calls, plain = [], Batch.__init__
  monkeypatch.setattr(Batch, "__init__", lambda *a, **k: (calls.append(0), plain(*a, **k))[1])
  ids = [m.tokenizer.encode_prompt(p) for p in prompts]
  assert rows_at_once(m, ids, Settings()) == 1
  coming = infer.results(m, prompts, **settings)
  first = next(coming)
  assert 1 <= len(calls) <= 4, "a window has four batches"
  rest = list(coming)
  assert len(calls) > 24 and all(len(group) == 2 for group in rest)
  monkeypatch.undo()
  whole = infer.generate(m, prompts, **settings)
  assert [c.tokens for group in [first, *rest] for c in group] == [c.tokens for c in whole]
  with pytest.raises(ValueError, match="prompt 1 has 97 tokens"):
    infer.results(m, ["a", [5] * 97])
  with pytest.raises(ValueError, match="2 values for 1 prompts"):
    infer.results(m, ["a"], num_beams=2, seed=[1, 2])


def test_files_of_prompts_tell_now_and_then_how_far_they_are(monkeypatch, capsys):
  counted = progress.Progress(3)
  clock = iter([100.0, 131.0, 140.0])
  counted._begun = counted._told = 90.0
  monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
  for _ in range(3):
    with counted.one():
      print("result")
  told = capsys.readouterr()
  assert told.out == "result\n" * 3
  assert told.err == "2 of 3 prompts in 41 s\n3 of 3 prompts in 50 s\n"


def test_timing_is_told_and_decides_nothing(workdir, m, tmp_path):
  one, other = (infer.generate(m, list(tiny.PROMPTS), max_new_tokens=9) for _ in range(2))
  assert one == other and one[0].timing != other[0].timing
  for c in one:
    t = c.timing
    assert t.time_to_first_token > 0 and t.batch_size == 4 and t.bandwidth_share is None
    assert t.batch_tokens_per_second >= t.tokens_per_second > 0
  assert one[0].timing.batch_tokens_per_second == pytest.approx(
    4 * one[0].timing.tokens_per_second
  ), "all rows had a token in each step"
  assert infer.generate(m, "Hi", max_new_tokens=1)[0].timing.tokens_per_second is None
  assert infer.generate(m, "Hi", max_new_tokens=4, num_beams=2)[0].timing.tokens_per_second > 0
  done = command(f"--checkpoint={workdir}", "--prompt=Hi", "--json", *SETTINGS, folder=tmp_path)
  told = json.loads(done.stdout)["timing"]
  assert told.keys() == {f.name for f in dataclasses.fields(infer.Timing)}
  assert told["time_to_first_token"] > 0 and told["tokens_per_second"] > 0
  assert told["batch_size"] == 1 and told["bandwidth_share"] is None


def test_the_share_of_the_bandwidth_counts_what_a_step_reads(m, monkeypatch):
  peak = 1e6
  monkeypatch.setattr(infer.batch, "peak_bandwidth", lambda: peak)
  prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
  one = infer.generate(m, prompts, max_new_tokens=9, min_new_tokens=9)[0]
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(m.params))
  assert parameter_bytes(m, 2) == parameters, "tied: the table is read to score the vocabulary"
  token = 2 * 2 * 8 * 4 + 4  # Keys and values, two heads of width 8, float32; its position.
  held = [3 + 4.5, 5 + 4.5]
  cached = sum(token * (h + min(h, window_slots(m))) for h in held)
  steps = one.timing.tokens_per_second  # Each row got a token in each step.
  assert one.timing.bandwidth_share == pytest.approx(steps * (parameters + cached) / peak, rel=1e-6)
  untied = tiny.model(tie_embeddings=False)
  table = untied.params["embed"]["table"].nbytes
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(untied.params))
  assert parameter_bytes(untied, 1) == whole - table
  both = tiny.model(**SHAPE)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  cross = both.params["decoder"]["layers"][0]["cross_attn"]
  read = size(both.params) - size(both.params["encoder"])
  assert parameter_bytes(both, 1) == read - size([cross["k_proj"], cross["v_proj"]])


def window_slots(m) -> int:
  """Slots of the first layer's ring: the window and what a prompt of 16 places may write."""
  return m.config.window + 16 - 1


def test_every_setting_is_a_flag_and_is_read_as_it_is_written(workdir, tmp_path):
  done = command("--help", folder=tmp_path)
  for field in dataclasses.fields(Settings):
    assert re.search(rf"--(\[no\])?{flag_of(field.name)}:", done.stdout), field.name
    text = " ".join(done.stdout.split())
    assert " ".join(field.metadata["help"].split()) in text, field.name
  code = (
    "import sys, json; from absl import flags; from infer.setting_flags import given_settings; "
    "flags.FLAGS(sys.argv); print(json.dumps(given_settings()))"
  )
  given = {
    "stop": ["a", "b"], "seed": [1, 2], "logit_bias": {"5": 1.5, "a": -2}, "top_p": 0.5,
    "bad_words": ["x"], "allowed_tokens": [7], "prefix": "So", "early_stopping": True, "top_k": 4,
    "echo": True, "adapter": ["chat", None], "draft": "layers:1", "scorer": "mean_logprob",
    "length_penalty": -1.0,
  }  # fmt: skip
  whole = lambda v: json.dumps(v) if isinstance(v, dict | bool) else str(v)
  plain = lambda v: "none" if v is None else whole(v)
  words = []
  for name, value in given.items():
    texts = value if isinstance(value, list) else [value]
    words += [f"--{flag_of(name)}={plain(v)}" for v in texts]
  done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                        cwd=commands.ROOT, check=True)  # fmt: skip
  assert json.loads(done.stdout) == given
