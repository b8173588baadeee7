"""`python -m infer --task`: the objects of --json, lines for a person, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

import infer
import model
from tests.infer.test_command import command
from tests.infer.test_tasks import LONG, TAGS, ours

HEADS = {
  "fill-mask": ((), {}),
  "classify": (("no", "yes"), dict(head="sequence", num_labels=2)),
  "tag": (TAGS, dict(head="token", num_labels=5)),
  "answer": ((), dict(head="span")),
  "embed": ((), dict(head="embedding")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder of a model for each task."""
  folder = tmp_path_factory.mktemp("models")
  for task, (labels, changes) in HEADS.items():
    model.save(ours(labels or None, **changes), folder / task)
  return folder


def told(saved, task, *arguments, folder):
  """(objects of --json, text without it) of the same arguments."""
  out = []
  for json_too in (("--json",), ()):
    done = command(f"--checkpoint={saved / task}", f"--task={task}", *arguments, *json_too,
                   folder=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    out.append(done.stdout)
  return [json.loads(line) for line in out[0].splitlines()], out[1]


def close(got, want) -> bool:
  """Equal as JSON, scores up to what another compilation changes."""
  plain = lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x
  if isinstance(want, float):
    return got == pytest.approx(want, abs=1e-4)
  if isinstance(want, list):
    return len(got) == len(want) and all(map(close, got, want))
  want = plain(want)
  if isinstance(want, dict):
    return got.keys() == want.keys() and all(close(got[k], want[k]) for k in want)
  return got == want


def test_masks(saved, tmp_path):
  texts = ["Bob [MASK] to [MASK]", "[MASK]"]
  got, text = told(
    saved, "fill-mask", *[f"--prompt={t}" for t in texts], "--top=2", folder=tmp_path
  )
  want = infer.fill_mask(model.load(saved / "fill-mask"), texts, top=2)
  assert close(got, [{"masks": masks} for masks in want])
  lines = text.splitlines()
  assert [lines[0], lines[3], lines[6]] == ["mask 1:", "mask 2:", "---"] and len(lines) == 9


def test_labels_of_pairs(saved, tmp_path):
  arguments = ("--prompt=Bob", "--prompt=no", "--text_pair=Zoë", "--text_pair=boat")
  got, text = told(saved, "classify", *arguments, folder=tmp_path)
  want = infer.classify(model.load(saved / "classify"), ["Bob", "no"], ["Zoë", "boat"])
  assert close(got, [{"labels": labels} for labels in want])
  first = want[0][0]
  assert text.splitlines()[0] == f"{first.score:.4f}  {first.label}"
  assert text.splitlines()[2] == "---"


def test_spans_of_a_text_longer_than_the_model_reads(saved, tmp_path):
  (tmp_path / "prompts.txt").write_text(f"{LONG}\n\n", encoding="utf-8")
  arguments = (f"--prompts_file={tmp_path}/prompts.txt", "--stride=10")
  got, text = told(saved, "tag", *arguments, folder=tmp_path)
  want = infer.tag(model.load(saved / "tag"), [LONG, ""], stride=10)
  assert close(got, [{"spans": spans} for spans in want])
  assert got[0]["spans"][-1]["end"] > 300 and got[1] == {"spans": []}
  assert text.splitlines()[-2:] == ["---", "(nothing is tagged)"]


def test_answers(saved, tmp_path):
  arguments = ("--prompt=Bob?", "--prompt=Who met Zoë?", f"--context={LONG}", "--stride=8",
               "--max_answer_tokens=3")  # fmt: skip
  got, text = told(saved, "answer", *arguments, folder=tmp_path)
  want = infer.answer(model.load(saved / "answer"), ["Bob?", "Who met Zoë?"], [LONG] * 2, stride=8,
                      max_answer_tokens=3)  # fmt: skip
  assert close(got, want)
  assert text.splitlines()[0] == f"{want[0].score:.4f}  {want[0].answer or '(no answer)'}"


def test_vectors_similarity_and_a_file_of_them(saved, tmp_path):
  m = model.load(saved / "embed")
  got, text = told(saved, "embed", "--prompt=Bob", "--text_pair=Zoë", folder=tmp_path)
  alike = infer.similarity(m, "Bob", "Zoë")[0]
  assert close(got, [{"embedding": m.embed("Bob")[0].tolist(), "similarity": float(alike)}])
  assert text == f"{alike:.4f}\n"
  done = command(f"--checkpoint={saved / 'embed'}", "--task=embed", "--prompt=Bob", "--prompt=no",
                 f"--output={tmp_path}/v.npy", folder=tmp_path)  # fmt: skip
  assert (done.returncode, done.stdout) == (0, ""), done.stderr
  np.testing.assert_allclose(np.load(tmp_path / "v.npy"), m.embed(["Bob", "no"]), atol=1e-4)


@pytest.mark.parametrize(
  ("task", "arguments", "said"),
  [
    ("fill-mask", ("--prompt=Bob",), "text 0 ('Bob') has no [MASK] to fill"),
    ("fill-mask", ("--prompt=[MASK]", "--top=0"), "--top"),
    ("fill-mask", ("--prompt=[MASK]", "--text_pair=a"), "--text_pair has no effect"),
    ("classify", ("--task=tag", "--prompt=a"), "cannot tag: use --task=classify"),
    ("classify", ("--task=generate", "--prompt=a"), "cannot generate: use --task=classify"),
    ("classify", ("--prompt=a", "--prompt=b", "--text_pair=c"), "2 prompts and 1 of --text_pair"),
    ("classify", ("--prompt=a", "--top_k=3"), "It is read by --task=generate"),
    ("tag", ("--prompt=a", "--seed=0"), "--seed has no effect on --task=tag"),
    ("tag", ("--prompt=a", "--nostream"), "--stream has no effect on --task=tag"),
    ("answer", ("--prompt=a",), "--context is missing"),
    ("answer", ("--prompt=a", "--context= "), "--context is missing"),
    ("embed", ("--prompt=a", "--output=v.npy", "--json"), "leave out --json"),
    ("embed", ("--prompt=a", "--output=v.txt"), "ends in .npy"),
    ("embed", ("--prompt=a", "--output=/no/such/folder/v.npy"), "/no/such/folder"),
    ("embed", ("--task=generate", "--prompt=a", "--context=b"), "--context has no effect"),
  ],
)
def test_wrong_use_is_one_error_line_and_status_2(saved, tmp_path, task, arguments, said):
  done = command(f"--checkpoint={saved / task}", f"--task={task}", *arguments, folder=tmp_path)
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error:") and said in last, done.stderr
  assert "Traceback" not in done.stderr and done.stdout == ""
