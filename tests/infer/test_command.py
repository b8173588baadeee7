"""`python -m infer`: what goes to stdout, to stderr, and with which status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import model
from tests import commands
from tests.infer import tiny

SETTINGS = ("--max_new_tokens=20", "--temperature=0.9", "--top_k=50")
SAME = dict(max_new_tokens=20, temperature=0.9, top_k=50)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "tiny"
  model.save(tiny.model(), folder)
  return folder


def command(*arguments: object, folder: Path) -> commands.Done:
  return commands.run("infer", *map(str, arguments), f"--cache_dir={folder / 'cache'}")


def test_json_holds_what_generate_returns_for_each_prompt_in_order(workdir, tmp_path):
  prompts = [*tiny.PROMPTS[:3], "tabs\tand 日本"]
  (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n", encoding="utf-8")
  done = command(
    f"--checkpoint={workdir}", f"--prompt={prompts[0]}", f"--prompts_file={tmp_path}/prompts.txt",
    "--json", "--logprobs=2", *[f"--seed={s}" for s in range(4)], "--stop=zz", *SETTINGS,
    folder=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  got = [json.loads(line) for line in done.stdout.splitlines()]
  m = model.load(workdir)
  want = infer.generate(m, prompts, logprobs=2, seed=[0, 1, 2, 3], stop="zz", **SAME)
  for values, c in zip(got, want, strict=True):
    assert (values["text"], values["tokens"]) == (c.text, c.tokens)
    assert values["finish_reason"] == c.finish_reason
    assert values["logprobs"] == pytest.approx(c.logprobs, abs=1e-4)
    assert [[t["token"] for t in place] for place in values["top_logprobs"]] == [
      [t for t, _ in place] for place in c.top_logprobs
    ]


def test_token_ids_are_written_beside_texts(workdir, tmp_path):
  m = model.load(workdir)
  plain = infer.generate(m, "Hi", max_new_tokens=20)[0].tokens
  own = dict(stop=["zz", plain[4]], bad_words=[(plain[1], plain[2]), "no"], prefix=[plain[0]])
  done = command(
    f"--checkpoint={workdir}", "--prompt=Hi", "--max_new_tokens=20", "--json", "--stop=zz",
    f"--stop=id:{plain[4]}", f"--bad_words=id:{plain[1]},{plain[2]}", "--bad_words=no",
    f"--prefix=id:{plain[0]}", "--noprefix_cache", folder=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  want = infer.generate(m, "Hi", max_new_tokens=20, **own)[0].tokens
  assert json.loads(done.stdout)["tokens"] == want != plain


def test_stdout_holds_the_completion_only_and_a_stream_is_the_same(workdir, tmp_path):
  want = infer.generate(model.load(workdir), list(tiny.PROMPTS[:2]), **SAME)
  typed = [sys.executable, "-m", "infer", f"--checkpoint={workdir}", *SETTINGS,
           f"--prompt={tiny.PROMPTS[0]}", f"--cache_dir={tmp_path / 'cache'}"]  # fmt: skip
  one = subprocess.run(typed, capture_output=True, cwd=commands.ROOT, check=True)
  assert one.stdout.decode() == want[0].text + "\n"
  both = command(
    f"--checkpoint={workdir}", *[f"--prompt={p}" for p in tiny.PROMPTS[:2]], "--stream", *SETTINGS,
    folder=tmp_path,
  )  # fmt: skip
  assert both.stdout == f"{want[0].text}\n---\n{want[1].text}\n"


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--checkpoint={workdir}",), "there is no prompt"),
    (("--checkpoint={workdir}", "--prompt=a", "--temperature=nan"), "temperature=nan"),
    (("--checkpoint={workdir}", "--prompt=a", "--top_kk=3"), "top_k"),
    (("--checkpoint={workdir}", "--prompt=a", "--stop=id:9,7"), "stop=(9, 7)"),
    (("--checkpoint={workdir}/no", "--prompt=a"), "no"),
    (("--checkpoint={workdir}", "--prompts_file=/no/such/file"), "/no/such/file"),
  ],
)
def test_wrong_use_is_one_error_line_and_status_2(workdir, tmp_path, arguments, said):
  done = command(*[a.format(workdir=workdir) for a in arguments], folder=tmp_path)
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error:") and said in last
  assert "Traceback" not in done.stderr and done.stdout == ""
