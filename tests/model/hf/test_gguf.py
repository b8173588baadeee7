"""GGUF files: the parameters of the folder that they were made of; what is damaged is refused."""

import contextlib
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import model
from model import hf
from model.errors import InputError
from model.hf.gguf_files import open_file
from tests.commands import run
from tests.model.hf.gguf_writing import TYPES, write, write_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=640,
            pad_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip
rope = lambda kind, **more: dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **more))
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=300)  # fmt: skip
GEMMA = dict(head_dim=256, num_attention_heads=2, num_key_value_heads=1, sliding_window=9)
MODELS = {
  "llama": ("Llama", {}),
  "llama, tied, biases, wide heads": (
    "Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=24)),
  "llama, scaled as Llama 3": ("Llama", dict(head_dim=64, **LLAMA3)),
  "llama, linear": ("Llama", rope("linear", factor=4.0)),
  "llama, yarn": (
    "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=160)),
  "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
  "qwen3": ("Qwen3", dict(head_dim=24)),
  "gemma": ("Gemma", dict(head_dim=24)),
  "gemma2": ("Gemma2", GEMMA),
  "gemma3": ("Gemma3Text", dict(GEMMA, num_hidden_layers=7)),
}  # fmt: skip
# Transformers does not read Gemma 1, nor the width of Qwen 3's heads.
READ_BY_THEM = [name for name in MODELS if name not in ("qwen3", "gemma")]


def build(name: str):
  prefix, settings = MODELS[name]
  config = getattr(transformers, f"{prefix}Config")(**{**TINY, **settings})
  torch.manual_seed(0)
  theirs = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      torch.nn.init.normal_(p, std=0.2)
  return theirs


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
  """(name, their model, its folder, its GGUF file)."""
  theirs, folder = build(request.param), tmp_path_factory.mktemp("theirs")
  theirs.save_pretrained(folder)
  return request.param, theirs, folder, write(folder / "x.gguf", theirs)


def test_a_file_is_the_folder_that_it_was_made_of(pair):
  name, _, folder, path = pair
  want, got = model.load(folder, dtype=None), model.load(path, dtype=None)
  assert got.config == want.config and got.family == want.family and got.tokenizer is None
  equal = jax.tree.map(np.array_equal, got.params, want.params)
  if "gemma" in name:  # Adding one and taking it away leaves what float32 leaves.
    equal = jax.tree.map(lambda a, b: np.allclose(a, b, atol=2e-7, rtol=0), got.params, want.params)
  assert all(jax.tree.leaves(equal)), equal


def test_a_file_is_what_transformers_reads(pair):
  name, theirs, _, path = pair
  if name not in READ_BY_THEM:
    pytest.skip("Transformers does not read it")
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
  state = {k: v for k, v in theirs.state_dict().items() if k in read}
  assert len(state) >= len(theirs.state_dict()) - 1
  for key, tensor in state.items():
    torch.testing.assert_close(read[key], tensor, atol=2e-7, rtol=0)


# Of each block: where the half-precision scales lie.
SCALES = {
  "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
  "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
  """Random bytes with scales that are finite."""
  rng = np.random.default_rng(0)
  length, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
  data = rng.integers(0, 256, (rows, columns // length, size), np.uint8)
  for at in SCALES[kind]:
    scale = rng.normal(size=data.shape[:2]).astype(np.float16)
    data[..., at : at + 2] = scale[..., None].view(np.uint8)
  return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", SCALES)
def test_blocks_are_decoded_as_both_libraries_do(kind, tmp_path):
  data = blocks(kind, 48, 512)
  path = write_file(
    tmp_path / "x.gguf", {"general.architecture": "llama"}, {"x": data}, {"x": kind}
  )
  tensor = open_file(path).tensors["x"]
  got = np.asarray(tensor)
  assert tensor.shape == got.shape == (48, 512) and got.dtype == tensor.dtype == np.float32
  np.testing.assert_array_equal(got, gguf.dequantize(data, TYPES[kind]))
  from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

  if TYPES[kind] in GGML_BLOCK:
    theirs = dequantize(torch.tensor(data.reshape(-1)), TYPES[kind]).numpy()
    np.testing.assert_allclose(got.reshape(-1), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1"])
def test_a_quantized_model_is_its_decoded_matrices(kind, tmp_path):
  theirs = build("qwen2")
  m = model.load(write(tmp_path / "x.gguf", theirs, kind=kind), dtype=None)
  want = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy()
  want = gguf.dequantize(gguf.quantize(want, TYPES[kind]), TYPES[kind])
  got = m.params["decoder"]["layers"][0]["mlp"]["up_proj"]["w"][1]
  assert m.config.param_dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
  np.testing.assert_array_equal(np.asarray(got, np.float32), want.T)
  half = model.load(tmp_path / "x.gguf", dtype="bfloat16")
  assert {a.dtype.name for a in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_one_table_of_halves_among_blocks_is_not_the_dtype_of_all(tmp_path):
  theirs = build("qwen2")
  path = write(tmp_path / "x.gguf", theirs, kind="Q8_0")
  file = open_file(path)
  kinds = {n: "F32" if t.kind is None else "Q8_0" for n, t in file.tensors.items()}
  kinds["token_embd.weight"] = "F16"
  tensors = {n: np.asarray(t) for n, t in file.tensors.items()}
  write_file(tmp_path / "y.gguf", plain(file.metadata), tensors, kinds)
  assert model.load(tmp_path / "y.gguf", dtype=None).config.param_dtype == "float32"


def plain(metadata: dict) -> dict:
  return {k: v for k, v in metadata.items() if k.startswith(("general.", "qwen2.", "llama."))}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
  return write(tmp_path_factory.mktemp("good") / "x.gguf", build("llama"))


def rewritten(path: Path, *, tensors=None, kinds=None, **values) -> None:
  """The file with other metadata (None: without it) and other tensors."""
  file = open_file(path)
  metadata = plain(file.metadata) | {k.replace("__", "."): v for k, v in values.items()}
  arrays = {n: np.array(t) for n, t in file.tensors.items()} | (tensors or {})
  arrays = {n: a for n, a in arrays.items() if a is not None}
  metadata = {k: v for k, v in metadata.items() if v is not None}
  write_file(path, metadata, arrays, {n: (kinds or {}).get(n, "F32") for n in arrays})


def patched(path: Path, at: int, layout: str, value) -> None:
  data = bytearray(path.read_bytes())
  struct.pack_into(layout, data, at, value)
  path.write_bytes(bytes(data))


def behind(path: Path, text: bytes) -> int:
  """Where the bytes behind a name lie."""
  return path.read_bytes().index(text) + len(text)


Q = "blk.1.attn_q.weight"
ENTRY = b"blk.0.attn_q.weight"  # Behind it: axes (4 bytes), two lengths (8 each), kind, offset.
array = lambda *shape: np.zeros(shape, np.float32)
DAMAGES = {
  "missing": (lambda p: p.unlink(), "does not exist"),
  "empty": (lambda p: p.write_bytes(b""), "no GGUF file: it has 0 bytes"),
  "wrong magic": (lambda p: patched(p, 0, "<4s", b"GGML"), "does not begin with GGUF"),
  "version 1": (lambda p: patched(p, 4, "<I", 1), "version 1"),
  "big-endian": (lambda p: patched(p, 4, ">I", 3), "version 50331648"),
  "tensor count": (lambda p: patched(p, 8, "<Q", 1 << 60), "have no room"),
  "pair count": (lambda p: patched(p, 16, "<Q", 1 << 62), "have no room"),
  "one pair more": (
    lambda p: patched(p, 16, "<Q", struct.unpack_from("<Q", p.read_bytes(), 16)[0] + 1),
    "damaged or cut off"),
  "key length": (lambda p: patched(p, 24, "<Q", 1 << 50), r"a key needs \d+ bytes"),
  "key no text": (lambda p: patched(p, 32, "<B", 0xFF), "a key is no UTF-8"),
  "kind of value": (
    lambda p: patched(p, behind(p, b"llama.block_count"), "<I", 77), "unknown kind 77"),
  "cut in metadata": (lambda p: p.write_bytes(p.read_bytes()[:300]), "damaged or cut off"),
  "cut in tensors": (
    lambda p: p.write_bytes(p.read_bytes()[:-4096]), r"needs \d+ bytes at byte \d+ of"),
  "axes": (lambda p: patched(p, behind(p, ENTRY), "<I", 1 << 31), "axes, and 4 is the most"),
  "length of an axis": (
    lambda p: patched(p, behind(p, ENTRY) + 4, "<Q", 1 << 62), r"needs \d+ bytes"),
  "no length": (lambda p: patched(p, behind(p, ENTRY) + 4, "<Q", 0), r"shape \[64, 0\]"),
  "unknown kind": (
    lambda p: patched(p, behind(p, ENTRY) + 20, "<I", 99), "kind 99, expected one of F32"),
  "kind not read": (
    lambda p: patched(p, behind(p, ENTRY) + 20, "<I", TYPES.IQ1_S), "kind IQ1_S, expected"),
  "rows of no blocks": (
    lambda p: patched(p, behind(p, ENTRY) + 20, "<I", TYPES.Q4_K), "no multiple of Q4_K's 256"),
  "offset": (
    lambda p: patched(p, behind(p, ENTRY) + 24, "<Q", (1 << 63) - 64), r"needs \d+ bytes at byte"),
  "offset between": (
    lambda p: patched(p, behind(p, ENTRY) + 24, "<Q", 7), r"needs \d+ bytes at byte"),
  "shared bytes": (lambda p: patched(p, behind(p, ENTRY) + 24, "<Q", 0), "share bytes"),
  "the same tensor twice": (
    lambda p: p.write_bytes(p.read_bytes().replace(b"blk.1.attn_q.", b"blk.0.attn_q.")),
    "is there twice"),
  "the same key twice": (
    lambda p: p.write_bytes(p.read_bytes().replace(b"general.type", b"general.name")),
    "is there twice"),
  "alignment": (lambda p: rewritten(p, general__alignment=33), "no power of two"),
  "huge array": (
    lambda p: (rewritten(p, general__tags=["a"]),
               patched(p, behind(p, b"general.tags") + 8, "<Q", 1 << 60)), r"\d+ texts"),
  "huge numbers": (
    lambda p: (rewritten(p, general__sizes=[1, 2]),
               patched(p, behind(p, b"general.sizes") + 8, "<Q", 1 << 60)), r"needs \d+ bytes"),
  "arrays of arrays": (
    lambda p: (rewritten(p, general__tags=["a"]),
               patched(p, behind(p, b"general.tags") + 4, "<I", 9)), "array of the unknown kind 9"),
  "one of several": (lambda p: rewritten(p, **{"split.count": 3}), "one of 3 files"),
  "architectures": (
    lambda p: rewritten(p, **{"general.type": ["a", "b"]}), "general.type is an array of 2"),
  "adapter": (lambda p: rewritten(p, general__type="adapter"), "is no model"),
  "unknown architecture": (
    lambda p: p.write_bytes(p.read_bytes().replace(b"\0\0\0llama", b"\0\0\0mamba")),
    "architecture 'mamba', expected one of llama"),
  "no layers": (lambda p: rewritten(p, llama__block_count=None), "has no llama.block_count"),
  "layers of text": (
    lambda p: rewritten(p, llama__block_count="2"), "llama.block_count is '2', expected a whole"),
  "huge number of layers": (
    lambda p: rewritten(p, llama__block_count=1 << 31), "too few for 2147483648 layers"),
  "no heads": (lambda p: rewritten(p, llama__attention__head_count=0), "expected a whole number"),
  "heads by layer": (
    lambda p: rewritten(p, **{"llama.attention.head_count": [4, 4]}), "an array of 2"),
  "other heads": (
    lambda p: rewritten(p, llama__attention__head_count=8), "blk.0.attn_q.weight has the shape"),
  "huge width": (
    lambda p: rewritten(p, llama__embedding_length=(1 << 32) - 1), "has the shape"),
  "epsilon": (
    lambda p: rewritten(p, llama__attention__layer_norm_rms_epsilon=float("nan")), "a positive"),
  "experts": (lambda p: rewritten(p, llama__expert_count=8), "llama.expert_count is 8, expected 0"),
  "unknown key": (lambda p: rewritten(p, llama__logit_scale=2.0), "logit_scale are not known"),
  "unknown scaling": (
    lambda p: rewritten(p, **{"llama.rope.scaling.type": "longrope"}), "one of none, linear, yarn"),
  "frequencies": (
    lambda p: rewritten(p, tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
    "rope_freqs.weight is not Llama 3's scaling"),
  "tensor missing": (
    lambda p: rewritten(p, tensors={Q: None}), "1 missing: model.layers.1.self_attn.q_proj.weight"),
  "first tensor missing": (
    lambda p: rewritten(p, tensors={"token_embd.weight": None}), "has no tensor token_embd.weight"),
  "unknown tensor": (
    lambda p: rewritten(p, tensors={"blk.0.attn_sinks.weight": array(4)}), "blk.0.attn_sinks"),
  "a layer too many": (
    lambda p: rewritten(p, tensors={"blk.7.attn_q.weight": array(64, 64)}),
    "1 unknown: model.layers.7.self_attn.q_proj.weight"),
  "another shape": (
    lambda p: rewritten(p, tensors={Q: array(32, 64)}), "1 of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_in_one_line(good, tmp_path, name):
  damage, said = DAMAGES[name]
  path = tmp_path / "x.gguf"
  path.write_bytes(good.read_bytes())
  damage(path)
  with pytest.raises(InputError, match=said) as error:
    model.load(path)
  assert "\n" not in str(error.value)


def test_any_byte_may_be_wrong(good, tmp_path):
  """Whatever is overwritten in the header is refused, or changes a value; it never crashes."""
  whole, rng = good.read_bytes(), np.random.default_rng(0)
  header = whole.rindex(b".weight") + 40
  path = tmp_path / "x.gguf"
  for _ in range(100):
    data = bytearray(whole)
    at = int(rng.integers(0, header))
    data[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
    path.write_bytes(bytes(data))
    with contextlib.suppress(InputError):
      hf.Folder(path)


def test_the_command_reads_a_file(good, tmp_path):
  done = run("model.hf", f"--source={good}", f"--target={tmp_path / 'hf'}", "--format=hf")
  assert done.returncode == 0, done.stderr
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  for key, tensor in build("llama").state_dict().items():
    assert torch.equal(again.state_dict()[key], tensor), key
  good.with_name("no.gguf").write_bytes(b"GGUF" * 9)
  source = good.with_name("no.gguf")
  done = run("model.hf", f"--source={source}", f"--target={tmp_path / 'x'}", "--format=orbax")
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
    f"error: {source} is GGUF"
  )


@pytest.mark.parametrize("values", [
  {"rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0},
  {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 1.0},
], ids=str)  # fmt: skip
def test_a_factor_without_a_name_is_linear(values, good, tmp_path):
  path = tmp_path / "x.gguf"
  path.write_bytes(good.read_bytes())
  rewritten(path, **{f"llama.{key}": value for key, value in values.items()})
  config = hf.Folder(path).config
  scaled = "rope.scaling.type" not in values and 4.0 in values.values()
  assert (config.rope_scaling, config.rope_factor) == (("linear", 4.0) if scaled else ("none", 1.0))
