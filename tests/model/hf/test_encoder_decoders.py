"""What encoder–decoders have of their own: several published forms, and decoding with a cache."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import infer
import model
from model.errors import InputError
from model.hf.safetensors_files import open_folder, write_folder
from train.certify.cases import CASES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

slow = lambda *cases: [pytest.param(case, marks=pytest.mark.slow) for case in cases]
DECODED = ("umt5", "mbart", "m2m_100", "t5gemma", *slow("longt5", "marian", "pegasus"))


def written(case: str, folder: Path, **changes):
  """A random model of theirs, in a folder."""
  name, settings = CASES[case]
  kind = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**settings | changes, attn_implementation="eager")).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      if p.requires_grad:
        torch.nn.init.normal_(p, std=0.2)
    if hasattr(theirs, "final_logits_bias"):
      torch.nn.init.normal_(theirs.final_logits_bias)
  theirs.save_pretrained(folder)
  return theirs


def change(folder: Path, *, leave_out: tuple[str, ...] = (), tensors=None, **values) -> None:
  """Fields of config.json and tensors."""
  path = folder / "config.json"
  kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in leave_out}
  path.write_text(json.dumps(kept | values))
  held = {k: np.array(v) for k, v in open_folder(folder).items()} | (tensors or {})
  write_folder(folder, {k: (v.dtype, v.shape) for k, v in held.items()}, held.items())


def scores(theirs, tokens, answer) -> np.ndarray:
  with torch.no_grad():
    out = theirs(input_ids=torch.tensor(tokens), decoder_input_ids=torch.tensor(answer))
  return out.logits.numpy()


@pytest.mark.parametrize("case", DECODED)
def test_greedy_tokens_with_a_cache_equal_transformers_without_one(case, tmp_path):
  """Theirs fails where a decoder has more layers than its encoder."""
  theirs = written(case, tmp_path, decoder_start_token_id=2)
  m = dataclasses.replace(model.load(tmp_path), end_ids=())
  rng = np.random.default_rng(0)
  prompts = [rng.integers(5, 97, n).tolist() for n in (1, 30)]
  together = infer.generate(m, prompts, max_new_tokens=30)
  for prompt, got in zip(prompts, together, strict=True):
    want = theirs.generate(
      torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
      forced_eos_token_id=None, decoder_start_token_id=2, use_cache=False, output_logits=True,
      return_dict_in_generate=True,
    )  # fmt: skip
    new = want.sequences[:, 1:]
    logprobs = torch.stack(want.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])
    assert got.tokens == new[0].tolist()
    np.testing.assert_allclose(got.logprobs, logprobs[0, :, 0], atol=2e-4)


@pytest.mark.parametrize("case", ["bart", *slow("mbart")])
def test_a_bias_of_scores_is_read_and_written_where_it_is_not_zero(case, tmp_path):
  theirs = written(case, tmp_path / "theirs")
  m = model.load(tmp_path / "theirs")
  assert m.config.logit_bias
  tokens, answer = np.arange(5, 14)[None], np.arange(20, 26)[None]
  want = scores(theirs, tokens, answer)
  np.testing.assert_allclose(m(tokens, decoder_tokens=answer), want, atol=1e-4)
  model.save(m, tmp_path / "ours", format="hf")
  again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
  assert torch.equal(again.final_logits_bias, theirs.final_logits_bias)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("case", ["t5", *slow("mt5", "umt5", "longt5")])
def test_folders_of_older_versions_are_what_transformers_makes_of_them(case, separate, tmp_path):
  """They say that nothing is tied, and hold a table for scores or none."""
  theirs = written(case, tmp_path)
  words = np.random.default_rng(1).normal(size=(97, 32)).astype(np.float32)
  change(
    tmp_path, leave_out=("scale_decoder_outputs", "dense_act_fn", "is_gated_act"),
    tensors={"lm_head.weight": words} if separate else {}, tie_word_embeddings=False,
  )  # fmt: skip
  m = model.load(tmp_path)
  assert m.config.tie_embeddings != separate and m.config.logit_scale is None
  theirs = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
  tokens, answer = np.arange(5, 14)[None], np.arange(20, 26)[None]
  want = scores(theirs, tokens, answer)
  np.testing.assert_allclose(m(tokens, decoder_tokens=answer), want, atol=1e-4)
  model.save(m, tmp_path / "ours", format="hf")
  again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
  np.testing.assert_array_equal(scores(again, tokens, answer), want)


def test_windows_of_longt5_equal_its_blocks_at_every_boundary(tmp_path):
  theirs = written("longt5", tmp_path)
  m = model.load(tmp_path)
  assert m.config.window == 15
  for n in (1, 7, 8, 9, 15, 16, 17, 24, 25, 41):  # Blocks have 8 tokens.
    tokens = np.random.default_rng(n).integers(5, 97, (1, n))
    with torch.no_grad():
      want = theirs.encoder(input_ids=torch.tensor(tokens)).last_hidden_state
    np.testing.assert_allclose(m.hidden(tokens), want, atol=1e-4)


@pytest.mark.parametrize(
  ("case", "changes", "said"),
  [
    ("longt5", dict(encoder_attention_type="transient-global"), "encoder_attention_type="),
    ("t5", dict(dense_act_fn="mish"), "mish"),
    ("m2m_100", dict(pad_token_id=0), "pad_token_id=0"),
    ("bart", dict(normalize_before=True), "normalize_before=True"),
    ("t5gemma", dict(encoder=dict(hidden_size=64, num_hidden_layers=2)), "differ"),
    ("t5gemma", dict(decoder=dict(num_hidden_layers=2, moe=1)), "'moe' of decoder"),
  ],
)
def test_what_is_not_supported_is_refused_by_name(case, changes, said, tmp_path):
  written(case, tmp_path)
  change(tmp_path, **changes)
  with pytest.raises(InputError, match=said):
    model.load(tmp_path)
