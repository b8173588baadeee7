"""Fine-tuning begins with the body and the tokenizer of a checkpoint, and says what is fresh."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import model
from model.checkpoint import Checkpoints
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.sharding import make_mesh
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests.train.objectives import tasks
from train.config import DataConfig
from train.data.pipeline import load_data
from train.init_from import with_its_model, with_its_tokenizer
from train.loop import restore_or_init, train
from train.program import build_program
from train.resolve import resolved
from train.workdir import as_dict

DEFAULT = DataConfig().tokenizer
BERT = dict(
  norm_placement="post", norm="layer", norm_eps=1e-12, final_norm=False, embed_norm=True,
  token_types=2, positions="learned", gated=False, activation="gelu", mlp_bias=True,
  attention_bias=True, attention_out_bias=True, vocab_multiple=128,
)  # fmt: skip


def pretrained(folder, **changes):
  """A masked language model with a wordpiece tokenizer, as a workdir."""
  tokenizer = build_tokenizer("wordpiece", 60, [" ".join(tasks.WORDS) + " 0123456789"])
  tokenizer.config["trained_as"] = "wordpiece:60"
  made = tasks.config(folder, "classification").model
  made = dataclasses.replace(
    made, head="masked_lm", vocab_size=tokenizer.vocab_size, head_dense=True, logit_bias=True,
    **changes,
  )  # fmt: skip
  params = init_params(made, jax.random.key(7))
  model.save(Model(made, params, tokenizer), folder / "bert")
  return jax.device_get(params)


def start(config, folder):
  """(fresh parameters, those that the run begins with)."""
  config = with_its_tokenizer(config, folder / "new")
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    data = load_data(config)
    config = resolved(config, data)
    program = build_program(config, mesh)
    fresh = jax.device_get(program.init().params)
    checkpoints = Checkpoints(folder / "new", keep=1)
    state, _ = restore_or_init(config, program, checkpoints, data)
    checkpoints.close()
    return fresh, jax.device_get(state.params), Model(config.model, state.params, data.tokenizer)


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def test_a_classifier_takes_the_body_of_a_masked_language_model_and_says_what_is_fresh(
  tmp_path, capsys
):
  saved = pretrained(tmp_path)
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  path = str(tmp_path / "bert")
  made = tasks.config(tmp_path, "classification", tokenizer=DEFAULT, init_from=path)
  fresh, begun, m = start(made, tmp_path)
  err = capsys.readouterr().err
  assert "tokenizer: " in err and f"{path}/tokenizer" in err
  assert "head: fresh (model.head: checkpoint 'masked_lm', config 'sequence'" in err
  assert begun["head"].keys() == {"proj"} and same(begun["head"], fresh["head"])
  for part in ("embed", "encoder"):
    assert same(begun[part], saved[part]) and not same(begun[part], fresh[part])
  labelled = dataclasses.replace(m, labels=("7", "no", "yes"))
  model.save(labelled, tmp_path / "classifier")
  again = dataclasses.replace(made, init_from=str(tmp_path / "classifier"), seed=3)
  fresh, continued, _ = start(again, tmp_path)
  assert same(continued, begun) and "fresh" not in capsys.readouterr().err
  other = dataclasses.replace(again.data, labels=("yes", "no", "7"))
  _, relabelled, _ = start(dataclasses.replace(again, data=other), tmp_path)
  assert "head: fresh (other labels)" in capsys.readouterr().err
  assert same(relabelled["encoder"], begun["encoder"])
  assert not same(relabelled["head"], begun["head"])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(d_ff=48), "model.d_ff: checkpoint 32, config 48"),
    (dict(tokenizer="bytes"), "another tokenizer|vocab_size"),
    (dict(token_types=2), "model.token_types"),
  ],
)
def test_another_body_or_vocabulary_is_refused(tmp_path, changes, said):
  pretrained(tmp_path)
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  settings = dict(tokenizer=DEFAULT, init_from=str(tmp_path / "bert")) | changes
  with pytest.raises(InputError, match=said):
    start(tasks.config(tmp_path, "classification", **settings), tmp_path)


@pytest.mark.slow
def test_a_fine_tuned_run_goes_on_and_knows_its_labels(tmp_path, capsys):
  pretrained(tmp_path)
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(30))
  made = tasks.config(
    tmp_path, "classification", tokenizer=DEFAULT, init_from=str(tmp_path / "bert"), batch_size=8,
    steps=3, checkpoint_every=1, eval_every=1, validation_fraction=0.2,
  )  # fmt: skip
  workdir = tmp_path / "run"
  assert train(made, workdir) == 0
  assert train(dataclasses.replace(made, steps=5), workdir) == 0
  assert "3 of 5 done" in capsys.readouterr().err
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
  assert all("validation_accuracy" in line or "accuracy" in line for line in lines)
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["data"]["labels"] == ["7", "no", "yes"] and saved["model"]["num_labels"] == 3
  m = model.load(workdir)
  assert m.labels == ("7", "no", "yes")
  assert m(np.array([m.tokenizer.encode("a bee")])).shape == (1, 3)


def test_the_average_of_narrow_parameters_is_wide_from_the_start_to_the_loaded_model(tmp_path):
  pretrained(tmp_path)
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  made = tasks.config(
    tmp_path, "classification", tokenizer=DEFAULT, init_from=str(tmp_path / "bert"),
    ema_decay=0.999, batch_size=2,
  )  # fmt: skip
  made = dataclasses.replace(made, model=dataclasses.replace(made.model, param_dtype="bfloat16"))
  made = with_its_tokenizer(made, tmp_path / "run")
  mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
  checkpoints = Checkpoints(tmp_path / "run", keep=1)
  with jax.set_mesh(mesh):
    data = load_data(made, workdir=tmp_path / "run")
    made = resolved(made, data)
    program = build_program(made, mesh)
    state, _ = restore_or_init(made, program, checkpoints, data)
    place = lambda a: (a.dtype, a.sharding)
    assert jax.tree.map(place, state) == jax.tree.map(place, program.state)
    checkpoints.save(3, state, {"config": as_dict(made)}, blocking=True)
  checkpoints.close()
  kinds = lambda m: {a.dtype.name for a in jax.tree.leaves(m.params)}
  kept, average = (model.load(tmp_path / "run", dtype=None, ema=ema) for ema in (False, True))
  assert kinds(kept) == {"bfloat16"} and kinds(average) == {"float32"}
  assert same(kept.params, average.params)
  assert kinds(model.load(tmp_path / "run", dtype="bfloat16", ema=True)) == {"bfloat16"}


def test_a_run_begins_from_a_hugging_face_folder(tmp_path, capsys):
  """Its body, its tokenizer, and its head where that is the same."""
  saved = pretrained(tmp_path, **BERT, head_norm=True)
  bert = model.load(tmp_path / "bert")
  model.save(bert, tmp_path / "folder", format="hf")
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  path = str(tmp_path / "folder")
  made = tasks.config(tmp_path, "classification", tokenizer=DEFAULT, init_from=path)
  made = dataclasses.replace(made, model=dataclasses.replace(made.model, **BERT))
  fresh, begun, _ = start(made, tmp_path)
  assert f"tokenizer: {path}" in capsys.readouterr().err
  assert same(begun["encoder"], saved["encoder"]) and same(begun["head"], fresh["head"])
  rows = bert.config.real_vocab  # What pads the vocabulary is not in such a folder.
  assert np.array_equal(begun["embed"]["table"][:rows], saved["embed"]["table"][:rows])
  other = dataclasses.replace(made, model=dataclasses.replace(made.model, d_ff=48))
  with pytest.raises(InputError, match=r"model\.d_ff: checkpoint 32, config 48"):
    start(other, tmp_path)


def test_a_config_without_a_body_takes_that_of_the_checkpoint(tmp_path, capsys):
  pretrained(tmp_path, **BERT)
  path = str(tmp_path / "bert")
  made = tasks.config(tmp_path, "classification", tokenizer=DEFAULT, init_from=path)
  own = ModelConfig(remat="full", pooling="mean")
  taken = with_its_model(dataclasses.replace(made, model=own), None).model
  saved = model.load(path).config
  assert (taken.d_model, taken.num_layers, taken.vocab_size) == (16, 1, saved.vocab_size)
  assert (taken.shape, taken.token_types) == ("encoder", 2)
  assert (taken.remat, taken.pooling, taken.head, taken.logit_bias) == ("full", "mean", None, False)
  masked = dataclasses.replace(made.objective, name="masked_lm")
  words = dataclasses.replace(made, model=ModelConfig(), objective=masked)
  assert with_its_model(words, None).model == dataclasses.replace(
    saved, **{name: getattr(ModelConfig(), name) for name in ("dtype", "init_std", "dropout")}
  )
  assert f"model: that of {path}" in capsys.readouterr().err
  assert with_its_model(made, None) is made  # It says what its body is.
