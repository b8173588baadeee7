"""Log-probabilities of tokens that are there already: of a text to judge, of a prompt to echo."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model.inputs import padded
from model.peft.named import chosen
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

_AT_ONCE = 256  # Tokens whose scores of the whole vocabulary are held at a time.

Pairs = list[tuple[int, float]]  # Tokens with their log-probabilities.


@functools.partial(jax.jit, static_argnames=("graphdef", "top"))
def token_logprobs(
  graphdef: nnx.GraphDef, params: dict, tokens: Int[Array, "B T"], pos: Int[Array, "B T"],
  targets: Int[Array, "B T"], *, top: int = 0,
) -> tuple[Float[Array, "B T"], Int[Array, "B T top"], Float[Array, "B T top"]]:  # fmt: skip
  """(log-probability of each target, the most probable tokens in its place, theirs), in nats."""
  net = nnx.merge(graphdef, params)
  x = net.hidden(Inputs(tokens, pos))[0].reshape(-1, net.cfg.d_model)
  padding = -targets.size % _AT_ONCE
  x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, _AT_ONCE, x.shape[-1])
  wanted = jnp.pad(targets.reshape(-1), (0, padding)).reshape(-1, _AT_ONCE)

  def some(pair):
    scores = net.logits(pair[0])[:, : net.cfg.real_vocab].astype(jnp.float32)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(scores, pair[1][:, None], axis=-1)
    values, ids = jax.lax.top_k(scores, top)
    return (chosen - total)[:, 0], ids, values - total

  def whole(a):
    a = a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])[: targets.size]
    return a.reshape(*targets.shape, *a.shape[1:])

  return jax.tree.map(whole, jax.lax.map(some, (x, wanted)))


def prompt_logprobs(
  m: "Model", prompt: list[int], top: int, adapter: int | None = None
) -> tuple[list[float], list[Pairs]]:
  """Log-probabilities of a prompt's tokens but the first, and the `top` best in their places.

  Args:
    adapter: the number of one of the model's; None: as the model is.
  """
  params = m.params if adapter is None else chosen(m.params, [adapter])
  tokens, pos = padded([prompt], m.room(m.config.stacks[0]))
  targets = np.roll(tokens, -1, axis=1)
  told = jax.device_get(token_logprobs(m.graphdef, params, tokens, pos, targets, top=top))
  values, ids, best = (a[0, : len(prompt) - 1].tolist() for a in told)
  pairs = [list(zip(*place, strict=True)) for place in zip(ids, best, strict=True)]
  return values, pairs
