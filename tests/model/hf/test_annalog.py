"""ANNalog, real weights of the encoder–decoder of 2017 outside of Hugging Face: a table of rows of
its own reads them, and it writes the molecules that its own class writes.
"""

import importlib
import pickle
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import infer
from model.config import ModelConfig
from model.hf.engine import Layout, Row, linear, norm, under
from model.hf.torch_files import open_torch_file
from model.trained import Model
from tests.weights import fetch

pytestmark = pytest.mark.slow
WORDS, START, END, LENGTH = 59, 2, 3, 102
# What the encoder reads and what the decoder writes are one vocabulary here: theirs, then theirs.
CONFIG = ModelConfig(
  shape="encoder_decoder", vocab_size=2 * WORDS, num_layers=3, d_model=256, d_ff=512, num_heads=8,
  max_positions=LENGTH, positions="learned", norm="layer", norm_placement="post", final_norm=False,
  activation="relu", gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True,
  scale_embeddings=True, tie_embeddings=False, logit_bias=True, decoder_start_id=WORDS + START,
)  # fmt: skip


def stack(name: str) -> tuple[Row, ...]:
  def attention(theirs: str, ours: str, after: str) -> tuple[Row, ...]:
    heads = ("(n h) d -> d n h", "(n h) -> n h")
    return (
      *(row for c in "qkv" for row in linear(f"{theirs}.fc_{c}", f"{ours}.{c}_proj", *heads)),
      *linear(f"{theirs}.fc_o", f"{ours}.o_proj", "d (n h) -> n h d", "d -> d"),
      *norm(after, f"{ours}_post_norm"),
    )

  return (
    Row(f"{name}.pos_embedding.weight", f"{name}.position_embed.table", "p d -> p d"),
    *under(
      f"{name}.layers.{{i}}", f"{name}.layers",
      *attention("self_attention", "attn", "self_attn_layer_norm"),
      *attention("encoder_attention", "cross_attn", "enc_attn_layer_norm"),
      *linear("positionwise_feedforward.fc_1", "mlp.up_proj", "f d -> d f", "f -> f"),
      *linear("positionwise_feedforward.fc_2", "mlp.down_proj", "d f -> f d", "d -> d"),
      *norm("ff_layer_norm", "mlp_post_norm"),
    ),
  )  # fmt: skip


ROWS = (
  Row("tok_embedding.weight", "embed.table", "v d -> v d"), *stack("encoder"), *stack("decoder"),
  Row("fc_out.weight", "head.proj.w", "v d -> d v"), Row("fc_out.bias", "head.bias", "v -> v"),
)  # fmt: skip
MOLECULES = [
  "CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
  "CC(=O)Nc1ccc(O)cc1", "CN1CCC[C@H]1c1cccnc1", "COc1ccc2[nH]c(S(=O)Cc3ncc(C)c(OC)c3C)nc2c1",
  "Clc1ccc(cc1)C(c1ccccc1)N1CCNCC1", "O=C(O)c1cn(C2CC2)c2cc(N3CCNCC3)c(F)cc2c1=O",
]  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> Model:
  path = fetch("annalog==1.0.6", "annalog/ckpt_and_vocab/Lev_extended.pt")
  tensors = open_torch_file(path)
  tables = [tensors.pop(f"{side}.tok_embedding.weight") for side in ("encoder", "decoder")]
  weight, bias = (tensors.pop(f"decoder.fc_out.{part}") for part in ("weight", "bias"))
  tensors["tok_embedding.weight"] = np.concatenate(tables)
  tensors["fc_out.weight"] = np.concatenate([np.zeros_like(weight), weight])
  tensors["fc_out.bias"] = np.concatenate([np.full_like(bias, -1e9), bias])
  layout = Layout(CONFIG, ROWS, "ANNalog")
  layout.check({name: array.shape for name, array in tensors.items()}, lambda name: False)
  params = {path: jnp.asarray(layout.leaf(path, tensors, np.float32)) for path in layout.leaves}
  return Model(CONFIG, unflatten_dict(params))


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, int]:
  class Plain(pickle.Unpickler):
    def find_class(self, module, name):
      raise pickle.UnpicklingError(f"{module}.{name} is no plain value")

  path = fetch("annalog==1.0.6", "annalog/ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl")
  with path.open("rb") as file:
    return Plain(file).load()["stoi"]


def encode(vocabulary: dict[str, int], molecule: str) -> list[int]:
  tokens = re.findall(r"\[[^\]]*\]|%\d\d|Br|Cl|.", molecule)
  return [START, *(vocabulary[token] for token in tokens), END]


@pytest.fixture(scope="module")
def theirs():
  torch = pytest.importorskip("torch")
  folder = fetch("annalog==1.0.6", "annalog")
  sys.path.insert(0, str(folder))
  try:
    own = importlib.import_module("model_files.seq2seq_attention")
  finally:
    sys.path.remove(str(folder))
  stacks = [
    kind(WORDS, 256, 3, 8, 512, 0.1, torch.device("cpu"), LENGTH)
    for kind in (own.Encoder, own.Decoder)
  ]
  net = own.Seq2Seq(*stacks, 1, 1, torch.device("cpu"))
  file = folder / "ckpt_and_vocab/Lev_extended.pt"
  state = torch.load(file, weights_only=True, map_location="cpu")
  net.load_state_dict(state)
  return net.eval()


def test_logits_equal_those_of_its_own_class(ours, theirs, vocabulary):
  import torch

  ids = [encode(vocabulary, molecule) for molecule in MOLECULES]
  size = max(map(len, ids))
  source, target = (np.full((len(ids), n), -1) for n in (size, size - 1))
  for i, one in enumerate(ids):  # Each molecule is to be followed by another.
    other = ids[i - 1][:-1]
    source[i, : len(one)], target[i, : len(other)] = one, other
  place = lambda a: np.where(a < 0, -1, np.arange(a.shape[1]))
  got = ours(
    np.maximum(source, 0), positions=place(source), decoder_positions=place(target),
    decoder_tokens=np.where(target < 0, 0, target + WORDS),
  )  # fmt: skip
  for i, one in enumerate(ids):
    other = ids[i - 1][:-1]
    with torch.no_grad():
      want = theirs(torch.tensor([one]), torch.tensor([other]))[0][0].numpy()
    np.testing.assert_allclose(np.asarray(got)[i, : len(other), WORDS:], want, atol=1e-4, rtol=1e-4)


def test_it_writes_the_molecules_that_its_own_class_writes(ours, theirs, vocabulary):
  import torch

  ids = [encode(vocabulary, molecule) for molecule in MOLECULES]
  got = infer.generate(ours, ids, max_new_tokens=LENGTH - 2, stop=[WORDS + END])
  copied = 0
  for one, completion in zip(ids, got, strict=True):
    written = [START, *(token - WORDS for token in completion.tokens)]
    assert written[-1] == END and completion.finish_reason == "stop"
    with torch.no_grad():  # Greedy, all steps in one pass.
      scores = theirs(torch.tensor([one]), torch.tensor([written[:-1]]))[0][0]
    assert scores.argmax(-1).tolist() == written[1:]
    copied += written == one
  assert copied == 4  # It writes analogues: of the others it changes an atom or two.


def searched(scores, beams: int, most: int, length_penalty: float) -> list[int]:
  """Beam search as it is told: the best candidates go on, those that end are kept, the best wins.

  Args:
    scores: texts -> log-probabilities of their next tokens.
  """
  running, ended = [(0.0, [START])], []
  for count in range(1, most + 1):
    told = scores([text for _, text in running])
    candidates = [
      (total + told[i, token], [*text, token])
      for i, (total, text) in enumerate(running)
      for token in np.argsort(-told[i])[: 2 * beams]
    ]
    candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
    over = [c for c in candidates[:beams] if c[1][-1] == END or count == most]
    ended += [(total / count**length_penalty, text) for total, text in over]
    ended = sorted(ended, key=lambda c: -c[0])[:beams]
    running = [c for c in candidates if c[1][-1] != END][:beams]
    # Nothing that goes on can become better: by its score of now, at the longest.
    reach = most if length_penalty > 0 else count
    best = running[0][0] / reach**length_penalty
    if len(ended) == beams and best <= ended[-1][0]:
      break
  return ended[0][1]


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 0.0), (4, 1.0), (3, 2.0)])
def test_a_search_finds_what_a_plain_one_finds_over_its_own_logits(
  ours, theirs, vocabulary, beams, length_penalty
):
  import torch

  ids, most = [encode(vocabulary, molecule) for molecule in MOLECULES[:5]], 60
  got = infer.generate(
    ours, ids, max_new_tokens=most, stop=[WORDS + END], num_beams=beams, early_stopping="never",
    length_penalty=length_penalty,
  )  # fmt: skip
  plain = infer.generate(ours, ids, max_new_tokens=most, stop=[WORDS + END])
  for one, completion in zip(ids, got, strict=True):

    def scores(texts, one=one):
      with torch.no_grad():
        source = torch.tensor([one] * len(texts))
        return theirs(source, torch.tensor(texts))[0][:, -1].log_softmax(-1).numpy()

    want = searched(scores, beams, most, length_penalty)
    assert [START, *(token - WORDS for token in completion.tokens)] == want
  assert [c.tokens for c in got] != [c.tokens for c in plain] or beams == 2
