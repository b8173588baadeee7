"""Tokens a second of greedy decoding beside Transformers' generate: GPT-2 small, random weights.

    python -m benchmarks.decode [--write]

Both continue the same prompts by the same number of tokens, on the same machine in the same run, in
turns, each in a process of its own; on CPU Transformers a second time with the huge pages that
`python -m infer` asks for. float32 on CPU, bfloat16 on a GPU. The time of reading the prompt is
included.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

import infer
from benchmarks.measure import Worker, has_gpu, interleaved, rates, report, serve
from configs import gpt_small
from model.heads import init_params
from model.loading import Model

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which all take turns.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens to add to each prompt.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 16, "Tokens of each prompt.", lower_bound=1)
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Numbers of prompts to decode together.")
_WAY = flags.DEFINE_string("way", None, "Do the work of one way: what the benchmark starts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")


def ours(prompts: np.ndarray, new_tokens: int) -> Callable[[], None]:
  """infer.generate of a model without a tokenizer: no token ends a text."""
  cfg = gpt_small.get_config().model
  params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
  params = jax.tree.map(lambda a: a.astype(cfg.compute_dtype), params)
  m = Model(cfg, params)
  return lambda: _expect(
    [len(c.tokens) for c in infer.generate(m, prompts.tolist(), max_new_tokens=new_tokens)],
    new_tokens,
  )


def transformers_generate(prompts: np.ndarray, new_tokens: int) -> Callable[[], None]:
  """GPT2LMHeadModel.generate with its default cache."""
  import torch
  import transformers

  device = "cuda" if has_gpu() else "cpu"
  dtype = torch.bfloat16 if device == "cuda" else torch.float32
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
  torch.nn.Module.to(model, device, dtype)
  tokens = torch.tensor(prompts, device=device)
  settings = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

  def run() -> None:
    with torch.no_grad():
      out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)  # pyright: ignore
    _expect([out.shape[1] - tokens.shape[1]] * len(prompts), new_tokens)

  return run


def _expect(lengths: list[int], new_tokens: int) -> None:
  if set(lengths) != {new_tokens}:
    raise RuntimeError(f"completions have {lengths} tokens instead of {new_tokens}")


def main(_: list[str]) -> None:
  if _WAY.value:
    serve(one_way(*_WAY.value.split(":")))
  else:
    report("decode", [compared(batch) for batch in map(int, _BATCHES.value)], write=_WRITE.value)


def one_way(way: str, batch: str) -> Callable[[], None]:
  """What a worker does."""
  prompts = np.random.default_rng(0).integers(0, 50_257, (int(batch), _PROMPT.value))
  ways = {"triune": ours, "transformers": transformers_generate}
  return ways[way](prompts, _NEW.value)


def compared(batch: int) -> dict:
  """A row of the report."""
  start = functools.partial(Worker, "benchmarks.decode")
  ways = {
    "triune": start(f"triune:{batch}", huge_pages=True),
    "transformers": start(f"transformers:{batch}", huge_pages=False),
  }
  if not has_gpu():
    ways["transformers, huge pages"] = start(f"transformers:{batch}", huge_pages=True)
  measured = rates(interleaved(ways, _ROUNDS.value, 1), batch * _NEW.value)
  median = lambda name: measured[name]["median"]
  return dict(
    what=f"GPT-2 small, greedy, {batch} x ({_PROMPT.value} + {_NEW.value}) tokens",
    unit="tokens/s", rates=measured,
    ratios={f"triune / {n}": median("triune") / median(n) for n in ways if n != "triune"},
  )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
