"""Several adapters of one base: sums of what they add, and turns that compile nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from infer import generate
from model.config import ModelConfig
from model.errors import InputError
from model.heads import abstract, init_params
from model.peft.attach import apart, attached, together
from model.peft.combine import alike, combined
from model.peft.config import PeftConfig
from model.peft.create import new_adapters, sites
from model.peft.merge import merged, unmerged
from model.peft.named import named
from model.trained import Model
from model.vocabulary import build_tokenizer

TOKENIZER = build_tokenizer("bytes", None, [])
BODY = ModelConfig(
  vocab_size=TOKENIZER.vocab_size, vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=4,
  num_kv_heads=2, max_positions=64,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


def adapted(seed, base=None, **settings):
  """A model with a random adapter that does something."""
  params = init_params(BODY, jax.random.key(0)) if base is None else base
  config = PeftConfig(**{**dict(method="lora", alpha=3.0), **settings})
  found = sites(config, BODY, abstract(BODY))
  new = new_adapters(config, found, params, jax.random.key(seed))
  noise = lambda a: a + 0.1 * jax.random.normal(jax.random.key(seed), a.shape)
  new = jax.tree_util.tree_map_with_path(lambda p, a: a if p[-1].key == "scale" else noise(a), new)
  return Model(BODY, together(params, new), TOKENIZER)


@pytest.mark.slow
def test_the_sum_of_two_adapters_adds_what_both_add():
  one, two = adapted(1, rank=2), adapted(2, rank=3, targets=("attn", "embed"))
  both = combined([one, two], [0.5, -2.0])
  base, first, second, got = (
    apart(m.params)[0] if i == 0 else m.merged().params for i, m in enumerate([one, one, two, both])
  )
  for name in ("q_proj", "o_proj"):
    w = lambda tree: np.asarray(tree["decoder"]["layers"][0]["attn"][name]["w"])  # noqa: B023
    want = w(base) + 0.5 * (w(first) - w(base)) - 2.0 * (w(second) - w(base))
    np.testing.assert_allclose(w(got), want, atol=1e-5)
  np.testing.assert_allclose(both.merged()(TOKENS), both(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapters_by_turns_change_answers_and_compile_nothing():
  one, two = adapted(1, rank=2), adapted(2, rank=3, targets=("attn",))
  first, second = alike([one, two])
  np.testing.assert_allclose(first(TOKENS), one(TOKENS), rtol=1e-4, atol=1e-5)
  settings = dict(max_new_tokens=6)
  said = generate(first, ["ab"], **settings)[0].tokens
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled.append(name))
  other = generate(second, ["ab"], **settings)[0].tokens
  logits = second(TOKENS)
  assert not [name for name in compiled if "backend_compile" in name]
  np.testing.assert_allclose(logits, two(TOKENS), rtol=1e-4, atol=1e-5)
  assert said == generate(one, ["ab"], **settings)[0].tokens
  assert other == generate(two, ["ab"], **settings)[0].tokens != said


@pytest.mark.slow
def test_what_was_merged_is_taken_out_again():
  m = adapted(1, rank=2)
  back = unmerged(merged(m), m)
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(near, back.params, apart(m.params)[0])


def test_adapters_add_up_whatever_their_runs_dropped():
  one = adapted(1, rank=2, targets=("q_proj",))
  other = adapted(2, rank=1, targets=("v_proj",))
  dropped = dataclasses.replace(other, config=dataclasses.replace(BODY, dropout=0.5))
  first, second = alike([one, dropped])
  assert first.graphdef == second.graphdef
  np.testing.assert_allclose(second(TOKENS), other(TOKENS), rtol=1e-4, atol=1e-5)
  several = named({"one": one, "other": dropped})
  np.testing.assert_allclose(several.using("other")(TOKENS), other(TOKENS), rtol=1e-4, atol=1e-5)


def test_what_does_not_add_up_is_refused():
  some = dict(targets=("q_proj",))
  one = adapted(1, rank=2, **some)
  other = dataclasses.replace(one, config=dataclasses.replace(BODY, norm_eps=1e-3))
  cases = {
    "one for each": lambda: combined([one], [1.0, 2.0]),
    "at least one": lambda: alike([]),
    "not LoRA's": lambda: combined([one, adapted(2, method="ia3", alpha=None, **some)], [1.0, 1.0]),
    "different bases": lambda: alike([one, other]),
    "how='sum' is not known": lambda: combined([one], [1.0], how="sum"),
    "rank=2 is that of how='svd'": lambda: combined([one], [1.0], rank=2),
    "has the ranks 1, 2: use cat": lambda: combined(
      [one, adapted(2, rank=1, **some)], [1.0, 1.0], how="linear"
    ),
    "has no adapter": lambda: alike([dataclasses.replace(one, params=apart(one.params)[0])]),
    "load the base": lambda: unmerged(one, adapted(2, method="dora", **some)),
  }
  for words, call in cases.items():
    with pytest.raises(InputError, match=words) as error:
      call()
    assert "\n" not in str(error.value)
  net = abstract(BODY)
  with pytest.raises(InputError, match="belong to nothing"):
    attached(net, {"decoder": {"nothing": {"adapter": {"a": np.zeros((1, 1))}}}})
