"""Random models of Transformers, written by it, read here, and written back: the same function, the
same bits.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import model
from model import hf
from train.certify.cases import CASES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (520, 97)  # Tokens of two documents; the first passes all windows and bucket edges.


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
  """(their model, the folder that it wrote, ours)."""
  name, settings = CASES[request.param]
  kind = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**{"attn_implementation": "eager", **settings})).eval()
  with torch.no_grad():
    for p in theirs.parameters():  # Norms too: a scale of one would hide a mistake.
      if p.requires_grad:
        torch.nn.init.normal_(p, std=0.2)
    for name, buffer in theirs.named_buffers():
      if name.endswith("e_score_correction_bias"):
        torch.nn.init.normal_(buffer, std=0.2)
  folder = tmp_path_factory.mktemp("theirs")
  theirs.save_pretrained(folder)
  return theirs, folder, model.load(folder)


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
  """What encoders and what decoders read; none of the ids is padding, and 4 ends a text."""
  rng = np.random.default_rng(0)
  text = lambda n: np.append(rng.integers(5, 97, n - 1), 4)
  return [(text(n), text(n // 3)) for n in LENGTHS]


def their_scores(theirs, two: bool, doc) -> "torch.Tensor":
  tokens, answer = (torch.tensor(ids)[None] for ids in doc)
  out = theirs(input_ids=tokens, **(dict(decoder_input_ids=answer) if two else {}))
  if "start_logits" in out:
    return torch.stack([out.start_logits, out.end_logits], -1)[0]
  if "prediction_logits" in out:
    return out.prediction_logits[0]
  if "logits" in out:
    return out.logits[0]
  if "encoder_last_hidden_state" in out:
    return out.encoder_last_hidden_state[0, 0]
  if type(theirs).__name__.endswith("EncoderModel"):
    return out.last_hidden_state[0, 0]
  if out.get("pooler_output") is not None:
    return out.pooler_output[0]
  reads_all = hf.FAMILIES[theirs.config.model_type].settings["shape"] == "encoder"
  return out.last_hidden_state[0, 0 if reads_all else -1]


def their_gradients(theirs, folder) -> dict[str, np.ndarray]:
  """By the names that a checkpoint of theirs has, which are not always those of the parameters."""
  held = copy.deepcopy(theirs)
  kept = {id(p) for p in theirs.parameters() if p.grad is not None}
  for p, old in zip(held.parameters(), theirs.parameters(), strict=True):
    p.data = old.grad.clone() if id(old) in kept else torch.full_like(p, torch.nan)
  held.save_pretrained(folder)
  found = {name: array for file in folder.glob("*.safetensors")
           for name, array in load_file(file).items()}  # fmt: skip
  return {name: array for name, array in found.items() if not np.isnan(array).any()}


def more(m, doc) -> dict:
  writes = m.config.shape == "encoder_decoder" and m.config.head == "language"
  return dict(decoder_tokens=doc[1][None]) if writes else {}


def test_scores_equal_theirs_alone_and_packed(pair):
  theirs, _, m = pair
  docs, two = documents(), "decoder_tokens" in more(m, documents()[0])
  want = [their_scores(theirs, two, doc).detach().numpy() for doc in docs]
  for doc, scores in zip(docs, want, strict=True):
    got = np.asarray(m(doc[0][None], **more(m, doc)))[0]
    np.testing.assert_allclose(got, scores, atol=1e-4, rtol=1e-4)
  joined = [np.concatenate([doc[side] for doc in docs])[None] for side in (0, 1)]
  seg = [np.concatenate([np.full(len(doc[s]), i + 1) for i, doc in enumerate(docs)])[None]
         for s in (0, 1)]  # fmt: skip
  packed = dict(decoder_tokens=joined[1], decoder_segments=seg[1]) if two else {}
  got = np.asarray(m(joined[0], segments=seg[0], **packed))[0]
  texts = m.config.head_kind in ("sequence", "embedding")
  np.testing.assert_allclose(
    got, np.stack(want) if texts else np.concatenate(want), atol=1e-4, rtol=1e-4
  )


def test_written_back_it_is_theirs_bit_for_bit(pair, tmp_path):
  theirs, _, m = pair
  model.save(m, tmp_path / "back", format="hf")
  kernel = theirs.config._attn_implementation
  again = type(theirs).from_pretrained(tmp_path / "back", attn_implementation=kernel)
  again.config.eos_token_id = theirs.config.eos_token_id  # Known to a tokenizer, and here is none.
  want = theirs.state_dict()
  got = again.state_dict()
  assert got.keys() == want.keys()
  for name, tensor in want.items():
    assert torch.equal(got[name], tensor), name
  doc = documents()[0]
  two = "decoder_tokens" in more(m, doc)
  got, want = (their_scores(one, two, doc) for one in (again.eval(), theirs))
  torch.testing.assert_close(got, want)


def test_one_step_of_theirs_is_one_of_ours(pair, tmp_path):
  """Gradients, in their layout."""
  theirs, _, m = pair
  doc = documents()[0]
  theirs.zero_grad()
  two = "decoder_tokens" in more(m, doc)
  their_scores(theirs, two, doc).logsumexp(-1).sum().backward()
  summed = lambda params: jax.nn.logsumexp(
    m.apply(params, jnp.asarray(doc[0][None]), **more(m, doc)), axis=-1
  ).sum()
  grads = jax.device_get(jax.jit(jax.grad(summed))(m.params))
  layout = hf._written(m.config, m.family)[2]
  leaves, checked = flatten_dict(grads), 0
  mine = dict(layout.tensors(lambda leaf: leaves[leaf]))
  for name, want in their_gradients(theirs, tmp_path).items():
    if name not in mine:
      continue
    got = mine[name]
    if want.shape[0] == m.config.real_vocab:  # Torch leaves rows of padding tokens without any.
      got, want = got[5:], want[5:]
    # The gradient of a key bias is zero: a softmax does not see what all scores have in common.
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) + 1e-5, name
    checked += 1
  assert checked > 10
