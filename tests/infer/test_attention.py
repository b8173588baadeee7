"""Attention maps: equal to those of Transformers, as pictures, and as a page of their own."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

import infer
import model
from infer.attention.maps import labels
from model.trained import Model
from tests.commands import run
from tests.infer import tiny
from tests.infer.test_beam import on_request
from train.certify.cases import CASES
from train.certify.theirs import Theirs

TOKENS, TARGET = [5, 17, 33, 8, 60, 61, 5, 9, 80, 44, 31, 12, 7, 19, 23, 90, 4, 5], [8, 40, 6, 21]
QUICK = ("bert", "gemma2", "bart")
OTHERS = (
  "gpt2", "llama", "mistral", "t5", "gpt_oss", "bloom", "deberta-v2", "albert", "modernbert",
  "deepseek_v2", "longt5", "falcon", "t5gemma", "mixtral", "gpt_neo", "distilbert",
)  # fmt: skip
SHAPES = {
  "encoder": dict(shape="encoder", layer_pattern=("global",), window=None),
  "decoder": {},
  "encoder_decoder": dict(
    shape="encoder_decoder", decoder_start_id=256, layer_pattern=("global",), window=None,
    num_decoder_layers=3,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", on_request((*QUICK, *OTHERS), *QUICK))
def test_weights_equal_those_of_transformers(name, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  Theirs(CASES[name]).save(tmp_path)
  kind = getattr(transformers, CASES[name][0])
  theirs = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
  m = model.load(tmp_path)
  two = m.config.shape == "encoder_decoder"
  got = infer.attention_maps(m, TOKENS, target=TARGET if two else None)
  ids, start = torch.tensor([TOKENS]), m.config.decoder_start_id
  read = dict(decoder_input_ids=torch.tensor([[start, *TARGET]])) if two else {}
  with torch.no_grad():
    out = theirs(ids, output_attentions=True, return_dict=True, **read)
  if two:
    want = dict(
      encoder=out.encoder_attentions, decoder=out.decoder_attentions, cross=out.cross_attentions
    )
  else:
    want = {m.config.shape: out.attentions}
  assert got.keys() == want.keys()
  for which, layers in want.items():
    if name == "longt5" and which == "encoder":
      continue  # Transformers tells those by block.
    weights = torch.stack(layers)[:, 0].numpy()
    if weights.shape[-1] == got[which].weights.shape[-1] + 1:
      weights = weights[..., :-1]  # The sink's column.
    np.testing.assert_allclose(got[which].weights, weights, atol=1e-5)
    if not m.config.attention_sinks:
      np.testing.assert_allclose(got[which].weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("shape", on_request(SHAPES, "encoder_decoder"))
def test_maps_of_each_shape_have_its_tokens_and_rows_that_sum_to_one(shape):
  m = tiny.model(**SHAPES[shape])
  got = infer.attention_maps(m, "Hi <b>\n")
  cfg = m.config
  want = {shape: cfg.num_layers}
  if shape == "encoder_decoder":
    want = {"encoder": cfg.num_layers, "decoder": 3, "cross": 3}
    written = infer.generate(m, "Hi <b>\n", max_new_tokens=32)[0].tokens
    decoded = [256, *(t for t in written if t != m.tokenizer.eos_id)]
    assert got["decoder"].keys == got["cross"].queries == labels(m, decoded)
  assert {name: len(one.weights) for name, one in got.items()} == want
  first = got[next(iter(got))]
  assert first.keys[1:8] == tuple("Hi·<b>⏎") and first.weights.dtype == np.float32
  for one in got.values():
    assert one.weights.shape[1:] == (4, len(one.queries), len(one.keys))
    np.testing.assert_allclose(one.weights.sum(-1), 1, atol=1e-5)


def test_watching_changes_nothing_and_remat_is_no_hindrance():
  m = tiny.model()
  prompt = m.tokenizer.encode_prompt("watched")
  before = np.asarray(m([prompt]))
  want = infer.attention_maps(m, prompt)["decoder"].weights
  saved = dataclasses.replace(m, config=dataclasses.replace(m.config, remat="attention"))
  np.testing.assert_array_equal(infer.attention_maps(saved, prompt)["decoder"].weights, want)
  np.testing.assert_array_equal(np.asarray(m([prompt])), before)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "both"
  model.save(tiny.model(**SHAPES["encoder_decoder"]), folder)
  return folder


def page_data(text: str) -> dict:
  found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
  return json.loads(found[1])


def test_the_command_writes_a_picture_and_a_page_that_needs_nothing_else(workdir, tmp_path):
  text = "a <b>\"&'</script><script>alert(1)</script>"
  done = run(
    "infer.attention", f"--checkpoint={workdir}", f"--text={text}", "--target=é",
    f"--output={tmp_path}/x.png", f"--output={tmp_path}/x.html", "--heads=1,3", "--layers=0-1",
    f"--cache_dir={tmp_path}/cache",
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (0, ""), done.stderr
  assert f"Wrote {tmp_path}/x.html" in done.stderr
  from matplotlib.image import imread

  picture = imread(tmp_path / "x.png")
  assert picture.shape[0] > 500 and picture[..., :3].std() > 0.01
  written = (tmp_path / "x.html").read_text(encoding="utf-8")
  assert "<script>alert" not in written and "<b>" not in written
  assert "&lt;b&gt;&quot;&amp;" in written
  assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(|fetch\(|import\(""", written)
  got = page_data(written)["maps"]
  want = infer.attention_maps(model.load(workdir), text, target="é")
  assert len(got) == len(want) == 3
  for told, one in zip(got, want.values(), strict=True):
    assert (told["layers"], told["heads"]) == ([0, 1], [1, 3])
    assert (told["queries"], told["keys"]) == (list(one.queries), list(one.keys))
    weights = np.frombuffer(base64.b64decode(told["weights"]), "<u2") / 65535
    chosen = one.weights[:2][:, [1, 3]]
    np.testing.assert_allclose(weights.reshape(chosen.shape), chosen, atol=1e-4)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--text=a",), "--output is missing"),
    (("--text=a", "--output={tmp}/x.png", "--adapter={tmp}"), "is no adapter"),
    (("--output={tmp}/x.png",), "--text is missing"),
    (("--text=a", "--output={tmp}/x.jpg"), "must end in .png or .html"),
    (("--text=a", "--output={tmp}/no/x.png"), "there is no folder"),
    (("--text=a", "--output={tmp}/x.png", "--heads=b"), "--heads=b must be numbers"),
    (("--text=a", "--output={tmp}/x.png", "--heads=4", "--target=b"), "heads 0 to 3"),
    (("--text=" + "a" * 95, "--output={tmp}/x.png", "--target=b"), "at most 96 are needed"),
  ],
)
def test_wrong_use_is_one_error_line_and_status_2(workdir, tmp_path, arguments, said):
  last = lambda done: done.stderr.strip().splitlines()[-1]
  done = run(
    "infer.attention", f"--checkpoint={workdir}", f"--cache_dir={tmp_path}/cache",
    *[a.format(tmp=tmp_path) for a in arguments],
  )  # fmt: skip
  assert done.returncode == 2 and last(done).startswith("error:"), done.stderr
  assert said in last(done) and "Traceback" not in done.stderr


def test_what_would_be_too_much_to_look_at_is_refused():
  from infer.attention.page import page
  from infer.attention.picture import pictures

  def many(layers: int, tokens: int):
    weights = np.broadcast_to(np.float32(1 / tokens), (layers, 12, tokens, tokens))
    maps = {"decoder": infer.attention.AttentionMap(weights, ("a",) * tokens, ("a",) * tokens)}
    return maps, {"decoder": [(i, j) for i in range(layers) for j in range(12)]}

  with pytest.raises(ValueError, match="room for 96 tokens and the decoder map has 97"):
    pictures(*many(1, 97), "title")
  with pytest.raises(ValueError, match=r"1440 maps need .* pages"):
    pictures(*many(120, 60), "title")
  with pytest.raises(ValueError, match="weights, and 8,000,000 are the most"):
    page(*many(40, 300), "title")


def test_texts_and_targets_that_mean_nothing_are_named():
  m = tiny.model()
  for text, target, said in (
    ([], None, "text has 0 tokens"), ([1, 300], None, "token 300"), ("a", "b", "target has no"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=said):
      infer.attention_maps(m, text, target=target)
  bare = Model(m.config, m.params)
  assert infer.attention_maps(bare, [1, 2])["decoder"].keys == ("1", "2")
  with pytest.raises(ValueError, match="no tokenizer"):
    infer.attention_maps(bare, "a")
