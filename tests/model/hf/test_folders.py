"""Folders that are damaged, or not what their config.json says: refused in one line that says what
and where; and the files themselves, beside the library's own.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.hf.safetensors_files import INDEX, SINGLE, open_folder, write_folder
from tests.commands import Command

CONFIG = ModelConfig(
  vocab_size=97, num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, max_positions=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  folder = tmp_path_factory.mktemp("good") / "llama"
  model.save(model.Model(CONFIG, init_params(CONFIG, jax.random.key(0))), folder, format="hf")
  return folder


@pytest.fixture
def folder(good, tmp_path):
  shutil.copytree(good, tmp_path / "damaged")
  return tmp_path / "damaged"


def change_config(folder: Path, **changes) -> None:
  path = folder / "config.json"
  values = json.loads(path.read_text())
  values |= changes
  path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def change_header(folder: Path, change) -> None:
  data = (folder / SINGLE).read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = change(json.loads(data[8 : 8 + size]))
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def change_tensors(folder: Path, change) -> None:
  tensors = {name: np.array(array) for name, array in open_folder(folder).items()}
  tensors = change(tensors) or tensors
  shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
  write_folder(folder, shapes, tensors.items())


def split(folder: Path) -> dict:
  """Several files with an index: what it holds."""
  tensors = {name: np.array(array) for name, array in open_folder(folder).items()}
  (folder / SINGLE).unlink()
  shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
  write_folder(folder, shapes, tensors.items(), largest=10_000)
  return json.loads((folder / INDEX).read_text())


def write_index(folder: Path, change) -> None:
  index = split(folder)
  change(index["weight_map"])
  (folder / INDEX).write_text(json.dumps(index))


def as_torch(folder: Path, pickled: bytes, packed: int = zipfile.ZIP_STORED) -> None:
  (folder / SINGLE).unlink()
  with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", pickled, packed)


class Runs:
  """Unpickled, it leaves a file."""

  def __init__(self, path: Path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


Q = "model.layers.1.self_attn.q_proj.weight"
first = lambda header: next(name for name in header if name != "__metadata__")


def replaced(name, **entry):
  def change(header):
    header[name] |= entry
    return header

  return change


def moved(weight_map):
  name = next(iter(weight_map))
  weight_map[name] = next(file for file in weight_map.values() if file != weight_map[name])


DAMAGES = {
  "cut off": (
    lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-64]), "damaged or cut off"),
  "empty": (lambda f: (f / SINGLE).write_bytes(b"abc"), "3 bytes, too few"),
  "long header": (
    lambda f: (f / SINGLE).write_bytes(b"\xff" * 8 + b"{}"), "longer than the file"),
  "no JSON": (lambda f: change_header(f, lambda h: b"{nothing"), "not a JSON object"),
  "a list": (lambda f: change_header(f, lambda h: [1]), "not a JSON object"),
  "unknown dtype": (lambda f: change_header(f, replaced(Q, dtype="Q4")), f"{Q} has dtype 'Q4'"),
  "no dtype": (lambda f: change_header(f, replaced(Q, dtype=[1])), r"has dtype \[1\]"),
  "deep header": (lambda f: change_header(f, lambda h: b"[" * 100_000), "not a JSON object"),
  "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read"),
  "negative shape": (lambda f: change_header(f, replaced(Q, shape=[-16, 16])), "no tensor"),
  "overlapping": (
    lambda f: change_header(f, replaced(Q, data_offsets=[0, 1024])), "begins at byte"),
  "file missing": (lambda f: next(f.glob("model-*")).unlink() if split(f) else 0, "is missing"),
  "in another file": (lambda f: write_index(f, moved), "1 tensors are not where it says"),
  "outside": (
    lambda f: write_index(f, lambda m: m.update(x="../x.safetensors")), "no file of this folder"),
  "tensor missing": (
    lambda f: change_tensors(f, lambda t: {n: a for n, a in t.items() if n != Q}),
    f"1 missing: {Q}"),
  "tensor unknown": (
    lambda f: change_tensors(f, lambda t: t.update({"model.more": t[Q]})), "unknown: model.more"),
  "transposed": (
    lambda f: change_tensors(f, lambda t: t.update({"lm_head.weight": t[Q]})), "lm_head.weight"),
  "another shape": (
    lambda f: change_tensors(f, lambda t: t.update({Q: t[Q][:8]})),
    rf"1 of another shape: {Q} \[8, 16\] instead of \[16, 16\]"),
  "whole numbers": (
    lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].astype(np.int32)})), "dtype int32"),
  "no weights": (lambda f: (f / SINGLE).unlink(), f"holds no tensors: expected {SINGLE}"),
  "config no JSON": (lambda f: (f / "config.json").write_text("{model_type"), "cannot be read"),
  "unknown family": (lambda f: change_config(f, model_type="lama"), "llama"),
  "unknown class": (lambda f: change_config(f, architectures=["LlamaForX"]), "LlamaForX"),
  "unknown field": (lambda f: change_config(f, logit_scale=2.0), "'logit_scale' is not known"),
  "field missing": (lambda f: change_config(f, hidden_size=...), "has no hidden_size"),
  "wrong value": (lambda f: change_config(f, num_attention_heads=4), "of another shape"),
  "no family": (lambda f: change_config(f, model_type=["llama"]), "model_type=.*is not known"),
  "no class": (lambda f: change_config(f, architectures="x"), "architectures='x' must be a list"),
  "text for a number": (
    lambda f: change_config(f, rms_norm_eps="1e-5"), "rms_norm_eps='1e-5' .* expected a number"),
  "text for a choice": (
    lambda f: change_config(f, tie_word_embeddings="false"), "tie_word_embeddings='false' makes"),
  "a list for text": (lambda f: change_config(f, hidden_act=["silu"]), r"hidden_act=\['silu'\]"),
  "no layers": (lambda f: change_config(f, num_hidden_layers=0), "num_hidden_layers=0 makes"),
  "layers without end": (
    lambda f: change_config(f, num_hidden_layers=10**12), "expected 1 to 10,000"),
  "unknown activation": (lambda f: change_config(f, hidden_act="mish"), "hidden_act='mish'"),
  "unknown rotation": (
    lambda f: change_config(f, rope_scaling=dict(rope_type="spiral", factor=2.0)), "'spiral'"),
  "rotation not whole": (
    lambda f: change_config(f, rope_scaling=dict(rope_type="llama3", factor=2.0)),
    "need 'low_freq_factor'"),
  "tied and not": (
    lambda f: (change_config(f, tie_word_embeddings=True), change_tensors(
      f, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))),
    "tied|unknown"),
  "code": (lambda f: as_torch(f, pickle.dumps(Runs(f / "ran"))), "no tensor: refused"),
  "bomb": (
    lambda f: as_torch(f, pickle.dumps(b"\0" * 50_000_000), zipfile.ZIP_DEFLATED), "compressed"),
  "no state": (lambda f: as_torch(f, pickle.dumps([1])), "no state dict"),
  "no tensors in its state": (
    lambda f: as_torch(f, pickle.dumps({"state_dict": [1]})), "no state dict"),
  "no pickle": (lambda f: as_torch(f, b"\x80\x04nothing"), "damaged"),
  "no zip": (
    lambda f: ((f / SINGLE).unlink(), (f / "pytorch_model.bin").write_bytes(b"PK no")),
    "no file of torch"),
}  # fmt: skip


def beside(file: str, values, **more) -> tuple:
  """A damage: a folder with a tokenizer of words, and with files of JSON."""

  def write(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    for name, content in {file: values, **more}.items():
      path = folder / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(content if isinstance(content, str) else json.dumps(content))

  return write, file


POOLS = {
  "modules.json": [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "p"}],
  "p/config.json": {"pooling_mode_mean_tokens": True},
}  # fmt: skip
LENGTH, TEXTS = "sentence_bert_config.json", "tokenizer_config.json"
DAMAGES |= {
  "a list beside it": beside(LENGTH, [1], **POOLS),
  "prompts in a list": beside("config_sentence_transformers.json", [1], **POOLS),
  "no pooling": beside("p/config.json", [1], **{"modules.json": POOLS["modules.json"]}),
  "length as text": beside(LENGTH, {"max_seq_length": "16"}, **POOLS),
  "length below 0": beside(LENGTH, {"max_seq_length": -3}, **POOLS),
  "length not whole": beside(LENGTH, {"max_seq_length": 16.5}, **POOLS),
  "cased or not": beside(TEXTS, {"do_lower_case": "x"}),
  "accents or not": beside(TEXTS, {"strip_accents": "x"}),
  "special tokens in a number": beside(TEXTS, {"extra_special_tokens": 5}),
  "more of them in a number": beside("special_tokens_map.json", {"extra_special_tokens": 5}),
  "a token cut with text": (
    beside(TEXTS, {"tokenizer_class": "BertTokenizer",
                   "mask_token": {"content": "[MASK]", "lstrip": "x"}})[0], "'lstrip': 'x'"),
  "deep tokenizer": beside(TEXTS, "[" * 100_000),
  "deep ends": beside(
    "generation_config.json", "[" * 100_000, **{TEXTS: {"tokenizer_class": "BertTokenizer"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_in_one_line(folder, name):
  damage, said = DAMAGES[name]
  damage(folder)
  with pytest.raises(InputError, match=said) as error:
    model.load(folder)
  assert "\n" not in str(error.value)
  assert not (folder / "ran").exists()


def test_the_command_converts_both_ways_and_refuses(good, tmp_path):
  def run(*arguments: str):
    command = Command("model.hf", arguments)
    out, err = command.communicate(timeout=300)
    return command.returncode, out, err

  workdir, back = tmp_path / "workdir", tmp_path / "back"
  status, _, err = run(f"--source={good}", f"--target={workdir}", "--format=orbax")
  assert status == 0, err
  status, _, err = run(f"--source={workdir}", f"--target={back}", "--format=hf")
  assert status == 0, err
  assert (back / SINGLE).read_bytes() == (good / SINGLE).read_bytes()
  assert (back / "config.json").read_bytes() == (good / "config.json").read_bytes()
  status, out, err = run(f"--source={good}", f"--target={back}")
  assert (status, out) == (2, "") and err.splitlines()[-1].startswith("error: ")
  status, _, err = run(f"--source={good}", f"--target={tmp_path / 'x'}", "--family=bert")
  assert status == 2 and "this model is no bert" in err.splitlines()[-1]


def test_files_are_those_of_the_library_split_or_not(folder):
  safetensors = pytest.importorskip("safetensors.numpy")
  before = {name: np.array(array) for name, array in open_folder(folder).items()}
  library = safetensors.load_file(folder / SINGLE)
  assert library.keys() == before.keys()
  index = split(folder)
  assert len(set(index["weight_map"].values())) > 2
  after = open_folder(folder)
  for name, array in before.items():
    np.testing.assert_array_equal(array, library[name])
    np.testing.assert_array_equal(array, after[name])
  assert index["metadata"]["total_size"] == sum(a.nbytes for a in before.values())


def test_dtypes_are_kept_unless_asked(good, tmp_path):
  half = model.load(good, dtype="bfloat16")
  model.save(half, tmp_path / "half", format="hf")
  kinds = {array.dtype for array in open_folder(tmp_path / "half").values()}
  assert kinds == {jnp.dtype("bfloat16")}
  kept = model.load(tmp_path / "half", dtype=None)
  assert kept.config.param_dtype == "bfloat16"
  for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(half.params), strict=True):
    assert a.dtype == b.dtype and jnp.array_equal(a, b)


def test_nothing_is_lost_of_a_folder_of_several_dtypes_or_of_64_bits(folder, tmp_path, caplog):
  table = "model.embed_tokens.weight"
  wide = {name: np.array(array) for name, array in open_folder(folder).items()}
  change_tensors(folder, lambda t: t.update({table: t[table].astype(jnp.bfloat16)}))
  model.saving.convert(folder, tmp_path / "back", format="hf")
  assert "bfloat16 and float32: all are taken as float32" in caplog.text
  back = open_folder(tmp_path / "back")
  wide[table] = wide[table].astype(jnp.bfloat16).astype(np.float32)
  for name, array in wide.items():
    np.testing.assert_array_equal(back[name], array, strict=True)
  change_tensors(folder, lambda t: t.update({Q: t[Q].astype(np.float64)}))
  with pytest.raises(InputError, match="needs 64-bit JAX"):
    model.saving.convert(folder, tmp_path / "more", format="hf")
  with pytest.raises(InputError, match="needs 64-bit JAX"):
    model.load(folder, dtype=None)
  assert model.load(folder).config.param_dtype == "float32"


def test_files_of_torch_are_read_as_torch_reads_them(folder):
  torch = pytest.importorskip("torch")
  tensors = {n: torch.tensor(np.array(a)) for n, a in open_folder(folder).items()}
  tensors[Q] = tensors[Q].T.contiguous().T  # Strides of its own.
  (folder / SINGLE).unlink()
  torch.save(tensors, folder / "pytorch_model.bin")
  from model.hf.torch_files import open_torch_file

  found = open_torch_file(folder / "pytorch_model.bin")
  assert found.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(found[name], tensor.numpy())
  want = model.load(folder)
  (folder / "pytorch_model.bin").unlink()
  names = sorted(tensors)
  files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
  for file in set(files.values()):
    torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
  index = folder / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
  got = model.load(folder)
  for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
    assert jnp.array_equal(a, b)
  (folder / files[names[0]]).unlink()
  with pytest.raises(InputError, match=r"00002\.bin is missing: pytorch_model\.bin\.index\.json"):
    model.load(folder)


def test_a_pickle_that_names_a_module_is_never_imported(tmp_path):
  buffer = io.BytesIO()
  buffer.write(b"\x80\x02cantigravity\nfly\n.")
  with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
    archive.writestr("archive/data.pkl", buffer.getvalue())
  from model.hf.torch_files import open_torch_file

  with pytest.raises(InputError, match=r"antigravity\.fly"):
    open_torch_file(tmp_path / "x.bin")
