"""Prompts of a batch with an adapter each: every one as the model with that adapter alone."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import infer
import model
from model import sharding
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.peft.attach import attached
from model.peft.named import named
from model.quant_tree import quantize_params
from model.trained import Model
from tests import commands
from tests.infer import tiny
from tests.infer.test_cache_programs import counted

KINDS = {
  "chat": dict(rank=2, targets=("attn",)),
  "sql": dict(rank=5, rslora=True, targets=("mlp", "v_proj")),
  "dora": dict(rank=3, method="dora"),
  "scaled": dict(method="ia3", alpha=None, noise=0.5),
  "pissa": dict(rank=4, init="pissa", targets=("q_proj", "down_proj")),
}
PROMPTS = ["Hi", "Some words: é", "x", "def f(n):\n", "abc abc abc", "the longest of all of them"]


def models(base: Model, kinds=KINDS) -> dict[str, Model]:
  """A model for each kind of adapter."""
  return {name: tiny.adapted(base, i, **KINDS[name]) for i, name in enumerate(kinds, 1)}


def compared(base: Model, own: dict[str, Model], prompts, alone=None, **settings) -> None:
  """Asserts that each prompt of a batch gets what the model with its adapter alone gives it.

  Args:
    alone: what is asked for one prompt; None: the same.
  """
  m, names = named(own), [*own, None]
  told = infer.generate(m, prompts, adapter=names, **settings)
  each = len(told) // len(prompts)
  plain = []
  for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
    one = base if name is None else own[name]
    want = infer.generate(one, prompt, **(settings if alone is None else alone))
    plain.append([c.tokens for c in want])
    for c, w in zip(told[i * each : (i + 1) * each], want, strict=True):
      assert c.tokens == w.tokens, (name, settings)
      np.testing.assert_allclose(c.logprobs, w.logprobs, atol=2e-4)
      if w.prompt_logprobs is not None:
        np.testing.assert_allclose(c.prompt_logprobs, w.prompt_logprobs, atol=2e-4)
  if len(set(prompts)) == 1:
    assert len(set(map(str, plain))) > 1  # Adapters do something.


def ask(m: Model, prompts, **settings) -> list[infer.Completion]:
  return infer.generate(m, prompts, max_new_tokens=8, prefill_chunk=16, **settings)


def test_each_prompt_has_its_adapter_and_other_adapters_compile_nothing():
  base = tiny.model(num_layers=1, layer_pattern=("local",))
  own = models(base, ("chat", "dora", "scaled"))
  m, names = named(own), [*own, None]
  plain = {n: base if n is None else own[n].merged() for n in names}  # One program for all.
  kept = infer.PrefixCache(m, block=8)
  ragged, long = PROMPTS[:4], [PROMPTS[-1]] * 4
  for prompts, order in ((ragged, names), (long, names), (long, names[::-1])):
    told = ask(m, prompts, adapter=order, prefix_cache=kept)
    for name, prompt, c in zip(order, prompts, told, strict=True):
      want = ask(plain[name], prompt)[0]
      assert c.tokens == want.tokens, name
      np.testing.assert_allclose(c.logprobs, want.logprobs, atol=2e-4)
  assert len({str(c.tokens) for c in told}) == 4
  assert (kept.hits, kept.misses) == (4, 8)  # Nobody reads what another adapter wrote.
  with counted() as programs:
    ask(m, ragged, adapter=["dora", None, "chat", "dora"], prefix_cache=kept)
    one = ask(m, ragged, adapter="scaled", prefix_cache=kept)
  assert programs == []
  assert one[2].tokens == ask(plain["scaled"], ragged[2])[0].tokens


@pytest.mark.slow
def test_calls_and_swaps_compile_nothing():
  base = tiny.model(num_layers=1, layer_pattern=("local",))
  own = models(base, ("chat", "dora", "scaled"))
  m, names = named(own), [*own, None]
  plain = {n: base if n is None else own[n] for n in names}
  tokens = np.random.default_rng(0).integers(5, 250, (4, 12))
  newer = tiny.adapted(base, 9, rank=3, targets=("attn",))
  want = ask(newer, PROMPTS[1])[0].tokens
  near = functools.partial(np.testing.assert_allclose, atol=2e-4)
  logits, one = m.using(names)(tokens), m.using("chat")(tokens)
  near(one, plain["chat"](tokens))
  before = ask(m, PROMPTS[:4], adapter="dora")[1].tokens
  with counted() as programs:
    again, one = m.using(names[::-1])(tokens), m.using("scaled")(tokens)
    swapped = m.with_adapter("dora", newer)
    after = ask(swapped, PROMPTS[:4], adapter="dora")[1].tokens
    kinds = swapped.using(names)(tokens)
  assert programs == []
  for i, name in enumerate(names):
    near(logits[i], plain[name](tokens)[i])
    near(again[-1 - i], plain[name](tokens)[-1 - i])
    near(kinds[i], (newer if name == "dora" else plain[name])(tokens)[i])
  near(one, plain["scaled"](tokens))
  assert after == want != before
  wider = m.with_adapter("fourth", tiny.adapted(base, 10, rank=7))  # A new name, a higher rank.
  assert wider.adapters == (*own, "fourth")
  near(wider.using([*own, "fourth"])(tokens)[:3], logits[:3])


@pytest.mark.slow
def test_many_kinds_of_adapters_go_together():
  base = tiny.model()
  own = models(base)
  m, names = named(own), [*own, None]
  tokens = np.random.default_rng(0).integers(5, 250, (6, 12))
  logits = m.using(names)(tokens)
  for i, name in enumerate(names):
    alone = base if name is None else own[name]
    np.testing.assert_allclose(logits[i], alone(tokens)[i], atol=2e-4)
    np.testing.assert_allclose(m.using(name)(tokens), alone(tokens), atol=2e-4)
    assert name is None or np.abs(np.asarray(alone(tokens) - base(tokens))).max() > 0.1
  compared(base, own, PROMPTS, max_new_tokens=8)


WAYS = {
  "sequences": dict(temperature=0.8, num_return_sequences=2, seed=3),
  "beams": dict(num_beams=3, num_return_sequences=2),
  "contrastive": dict(penalty_alpha=0.4, top_k=4),
  "lookup": dict(draft="lookup"),
  "early layers": dict(draft="layers:1"),
  "constraint": dict(regex="[a-z ]*", temperature=0.7),
  "int8 cache": dict(cache_dtype="int8"),
  "shaping": dict(repetition_penalty=1.3, logprobs=2, echo=True, stop=["e"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_decode_knows_each_prompts_adapter(way):
  if way == "constraint":
    pytest.importorskip("llguidance")
  base = tiny.model()
  own = models(base, ("chat", "dora", "scaled"))
  compared(base, own, PROMPTS[1:5], max_new_tokens=10, **WAYS[way])
  compared(base, own, [PROMPTS[1]] * 4, max_new_tokens=10, **WAYS[way])


@pytest.mark.slow
def test_a_model_that_guesses_and_streams_say_the_same():
  base = tiny.model()
  own = models(base, ("chat", "sql"))
  compared(base, own, PROMPTS[:3], dict(max_new_tokens=10), draft=base, max_new_tokens=10)
  m = named(own)
  for name in ("chat", "sql"):
    text = "".join(infer.stream(m, "ab", adapter=name, max_new_tokens=10))
    assert text == infer.generate(own[name], "ab", max_new_tokens=10)[0].text
    assert infer.generate(m.using(name), "ab", max_new_tokens=10)[0].text == text


EXPERTS = dict(num_experts=4, experts_per_token=2, layer_pattern=("global+experts",), window=None)
SHAPES = {
  "embeddings": (dict(), dict(targets=("embed", "attn"))),
  "dense experts": (EXPERTS | dict(expert_kernel="dense"), dict(targets=("mlp", "q_proj"))),
  "ragged experts": (EXPERTS | dict(shared_experts=1), dict(targets=("mlp",))),
  "latent": (dict(num_kv_heads=None, kv_latent_dim=16, rope_head_dim=4, v_head_dim=8), dict()),
  "encoder-decoder": (dict(shape="encoder_decoder", num_decoder_layers=2, layer_pattern=("global",),
                           window=None, decoder_start_id=0), dict()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_knows_each_prompts_adapter(shape):
  changes, settings = SHAPES[shape]
  base = tiny.model(**changes)
  own = {n: tiny.adapted(base, i, rank=i + 1, **settings) for i, n in enumerate("ab", 1)}
  compared(base, own, PROMPTS[1:4], max_new_tokens=8)
  compared(base, own, [PROMPTS[1]] * 3, max_new_tokens=8, num_beams=2)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "nf4", "int8_dynamic"])
def test_a_base_in_fewer_bits_serves_each_prompts_adapter(format):
  base = tiny.model(d_model=64, d_ff=64)
  info = param_info(abstract(base.config))
  base = dataclasses.replace(base, params=quantize_params(base.params, info, format))
  own = models(base, ("chat", "dora", "scaled"))
  compared(base, own, PROMPTS[1:5], max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("axes", [dict(data=2, tensor=2), dict(fsdp=4), dict(expert=2, tensor=2)])
def test_a_mesh_gives_what_one_device_gives(axes, experts):
  if "expert" in axes and not experts:
    pytest.skip("there are no experts to split")
  more = EXPERTS if experts else dict(layer_pattern=("local",))
  base = tiny.model(num_layers=1, **more)
  kinds = {"a": dict(rank=2), "b": dict(rank=4, targets=("mlp", "attn"))}
  own = {n: tiny.adapted(base, i, **s) for i, (n, s) in enumerate(kinds.items(), 1)}
  mesh = sharding.make_mesh(**axes, devices=jax.devices()[:4])
  names = ["b", None, "a", "b"]
  m = named(own)
  tokens = np.random.default_rng(0).integers(5, 250, (4, 8))
  want, said = (
    m.using(names)(tokens),
    infer.generate(m, PROMPTS[:4], adapter=names, max_new_tokens=6),
  )

  def placed(one: Model) -> Model:
    info = param_info(attached(abstract(one.config), one.params))
    where = sharding.shardings(one.params, jax.tree.map(lambda i: i.axes, info), mesh)
    return dataclasses.replace(one, params=jax.device_put(one.params, where))

  with jax.set_mesh(mesh):
    there = named({n: placed(one) for n, one in own.items()})
    np.testing.assert_allclose(there.using(names)(tokens), want, atol=2e-4)
    got = infer.generate(there, PROMPTS[:4], adapter=names, max_new_tokens=6)
  assert [c.tokens for c in got] == [c.tokens for c in said]


def test_adapters_that_are_not_there_or_do_not_go_together_are_refused(tmp_path):
  base = tiny.model(num_layers=1, layer_pattern=("local",))
  own = models(base, ("chat", "scaled"))
  m, tokens = named(own), np.ones((3, 4), np.int32)
  other = dataclasses.replace(own["chat"], config=dataclasses.replace(base.config, norm_eps=1e-3))
  ask = functools.partial(infer.generate, m, ["a", "b"])
  cases = {
    "adapter='chta' is none of the model's: chat, scaled": lambda: ask(adapter="chta"),
    "Did you mean 'chat'": lambda: ask(adapter=["chta", None]),
    "adapter has 3 values for 2 prompts": lambda: ask(adapter=["chat", None, "chat"]),
    "adapter=3 must be": lambda: ask(adapter=[3, "chat"]),
    "the model has no adapters by name": lambda: infer.generate(base, "a", adapter="chat"),
    "has no adapters by name. Load": lambda: base.with_adapter("chat", own["chat"]),
    "batches of its own|batches of 2 rows": lambda: infer.generate(m.using(["chat", None]), "a"),
    "2 rows were given an adapter each": lambda: m.using(["chat", None])(tokens),
    "another base": lambda: named({"a": own["chat"], "b": other}),
    "must be a text": lambda: named({"": own["chat"]}),
    "names no adapter": lambda: named({}),
    "is several adapters itself": lambda: named({"a": own["chat"], "b": m}),
    "has no adapter that rows": lambda: named({"a": own["chat"], "b": base}),
    "several adapters .chat, scaled.: load it with one": m.merged,
    "prefix_cache is for another model": lambda: ask(prefix_cache=infer.PrefixCache(base)),
  }
  for words, call in cases.items():
    with pytest.raises(InputError, match=words) as error:
      call()
    assert "\n" not in str(error.value)
  virtual = tiny.adapted(base, 1, method="prompt", alpha=None, virtual_tokens=2)
  with pytest.raises(InputError, match="decoder"):
    named({"a": own["chat"], "b": virtual})


@pytest.mark.slow
def test_the_command_gives_each_prompt_the_adapter_that_is_named(tmp_path):
  base = tiny.model(layer_pattern=("global",), window=None)
  model.save(base, tmp_path / "base", format="hf")
  base = model.load(tmp_path / "base")
  own = {n: tiny.adapted(base, i, rank=i, targets=("attn",)) for i, n in enumerate("ab", 1)}
  for name, m in own.items():
    model.save(m, tmp_path / name, format="peft")
  named_ones = [f"--adapter={name}={tmp_path / name}" for name in own]
  begin = f"--checkpoint={tmp_path / 'base'}", "--max_new_tokens=6", f"--cache_dir={tmp_path}"
  prompts = ["--prompt=Hi", "--prompt=Hi", "--prompt=Hi"]
  each = [f"--prompt_adapter={name}" for name in ("b", "none", "a")]
  done = commands.run("infer", *begin, *named_ones, *prompts, *each, "--json")
  assert done.returncode == 0, done.stderr
  got = [json.loads(line)["tokens"] for line in done.stdout.splitlines()]
  say = lambda one: infer.generate(one, "Hi", max_new_tokens=6)[0]
  alone = [say(one).tokens for one in (own["b"], base, own["a"])]
  assert got == alone and len(set(map(str, got))) > 1
  done = commands.run("infer", *begin, *named_ones, "--prompt=Hi", "--prompt_adapter=b", "--stream")
  assert done.stdout == f"{say(own['b']).text}\n"

  wrong = {
    "--adapter names a, b, and no prompt has one": [*named_ones],
    "told apart by names": [named_ones[0], named_ones[0], "--prompt_adapter=a"],
    "several adapters are told": [*(f"--adapter={tmp_path / name}" for name in own)],
    "adapter has 2 values for 3 prompts": [*named_ones, *each[:2]],
    "adapter='c' is none of the model's: a, b": [*named_ones, "--prompt_adapter=c"],
    "has no adapters by name": ["--prompt_adapter=a"],
    "is no adapter": [f"--adapter=x={tmp_path / 'base'}", "--prompt_adapter=x"],
  }
  for words, given in wrong.items():
    done = commands.run("infer", *begin, *prompts, *given)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error:") and words in last, done.stderr
  done = commands.run("infer", begin[0], "--prompt=Hi", "--task=classify", "--prompt_adapter=a")
  assert "--prompt_adapter has no effect on --task=classify" in done.stderr.splitlines()[-1]
