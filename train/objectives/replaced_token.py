"""Replaced-token detection: a generator fills masks, the model tells which tokens it replaced."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.errors import InputError
from model.flops import model_flops
from model.heads import Head, Network
from model.layers import Linear, Norm, activation
from model.tokenizer import Tokenizer
from model.transformer import Aux, Inputs, Stack
from train.config import Config
from train.data.arrays import Corpus
from train.objectives.causal_lm import word_loss
from train.objectives.loss import Loss, inputs_of, router_penalty, work
from train.objectives.masked_lm import MASKED, MaskedLM, at_places
from train.objectives.objective import Batch, Pieces, Side

GENERATOR = "generator."  # Before the names of its counts in `Loss.tokens` and `Loss.pairs`.


class Generator(nnx.Module):
  """A narrower encoder with a masked-LM head, on the embeddings of the model that it trains with.

  Tokens, positions and token types are embedded by that model, and projected where the widths
  differ (ELECTRA, arXiv:2003.10555, section 3.2).
  """

  def __init__(self, cfg: ModelConfig, share: float, *, rngs: nnx.Rngs):
    small = generator_config(cfg, share)
    self.activation = words_config(cfg).head_activation
    wide, narrow, axes = cfg.embed_width, small.d_model, ("embed", "embed_out")
    if narrow != wide:
      self.in_proj = Linear(cfg, (wide, narrow), axes, rngs=rngs, bias=True)
    self.encoder = Stack(small, "encoder", rngs=rngs)
    self.dense = Linear(cfg, (narrow, wide), axes, rngs=rngs, bias=True)
    self.norm = Norm(cfg, rngs=rngs, shape=(wide,))
    self.head = Head(words_config(cfg), rngs=rngs)

  def __call__(
    self, net: Network, inputs: Inputs, places: Int[Array, "B M"], key: jax.Array | None
  ) -> tuple[Float[Array, "B M V"], Aux]:
    """Scores of the vocabulary at places of each row, and sums that router losses need."""
    x = net.encoder.embedded(net.embed, inputs)
    x = self.in_proj(x) if hasattr(self, "in_proj") else x
    x, _, stats = self.encoder(net.embed, inputs, x=x, key=key)
    x = self.norm(activation(self.activation)(self.dense(at_places(x, places))))
    return self.head(x, net.embed), stats


class Electra(Network):
  """The network of a config, which is what a checkpoint is loaded as, with a generator beside."""

  def __init__(self, cfg: ModelConfig, share: float, *, rngs: nnx.Rngs):
    super().__init__(cfg, rngs=rngs)
    self.generator = Generator(cfg, share, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ReplacedToken:
  """ELECTRA (Clark et al., arXiv:2003.10555).

  The mean loss of the generator at masked places and, `replaced_weight` times, that of the model
  over all tokens: was this one replaced? A sample that equals the original was not. `loss` and
  `accuracy` are the generator's, as of masked LM; `replaced_loss`, `replaced_accuracy` and
  `replaced_found` (of the replaced ones) the model's.
  """

  masked: MaskedLM
  overlap: int = 0
  samples: bool = True
  moves: bool = True

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "ReplacedToken":
    """The objective of a config.

    Raises:
      InputError: if the tokenizer has no mask, or the generator no whole widths.
    """
    objective = cls(MaskedLM.of(config, tokenizer))
    generator_config(config.model, objective.share)
    return objective

  @property
  def sides(self) -> Mapping[str, Side]:
    """As of masked LM."""
    return self.masked.sides

  @property
  def whole(self) -> int:
    """As of masked LM."""
    return self.masked.whole

  @property
  def share(self) -> float:
    """Widths of the generator by those of the model."""
    return self.masked.config.generator_share or 0.0

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """As of masked LM."""
    return self.masked.room(corpus, documents, lengths, salts)

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """As of masked LM: what the generator reads."""
    self.masked.fill(batch, pieces)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Electra:
    """The model and the generator."""
    return Electra(cfg, self.share, rngs=rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Masked tokens, and all tokens."""
    return {"loss": jnp.sum(batch["masked_weights"]), "replaced": jnp.sum(batch["positions"] >= 0)}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """The losses of both; without a key the samples are the same every time."""
    keys = (None, None, jax.random.key(0)) if key is None else jax.random.split(key, 3)
    inputs, config, cfg = inputs_of(batch), self.masked.config, self.masked.model
    logits, stats = net.generator(net, inputs, batch["masked_places"], keys[0])
    tokens, replaced = corrupted(batch, sampled(jax.lax.stop_gradient(logits), keys[2]))
    x, _, more = net.hidden(dataclasses.replace(inputs, tokens=tokens), key=keys[1])
    term, means = _detection(net.logits(x)[..., 0], replaced, inputs.pos >= 0)
    counted: Any = self._work(inputs, jnp.sum(batch["masked_weights"] > 0))
    scored = lambda scores: scores
    loss = word_loss(
      config, cfg, scored, logits, batch, stats, side=MASKED, accuracy=True, **counted
    )
    return dataclasses.replace(
      loss, terms={**loss.terms, "replaced": (config.replaced_weight or 0.0) * term},
      means={**loss.means, **means},
      penalty=loss.penalty + router_penalty(more, cfg),
    )  # fmt: skip

  def _work(self, inputs: Inputs, masked: Array) -> dict[str, dict[str, Array]]:
    own = work(self.masked.model, inputs, head=jnp.sum(inputs.pos >= 0))
    small = generator_config(self.masked.model, self.share)
    beside = work(small, inputs, head=masked)
    named = lambda counts: {GENERATOR + name: n for name, n in counts.items()}
    return {kind: own[kind] | named(beside[kind]) for kind in own}


def sampled(logits: Float[Array, "B M V"], key: jax.Array) -> Int[Array, "B M"]:
  """A token for each place, drawn with the probability that the generator gives it."""
  return jax.random.categorical(key, logits)


def corrupted(
  batch: Mapping[str, Array], samples: Int[Array, "B M"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
  """The original tokens but for samples at the masked places, and which of them are others."""
  length = batch["tokens"].shape[1]
  places = jnp.where(batch["masked_weights"] > 0, batch["masked_places"], length)
  row = jnp.arange(len(places))[:, None]
  put = lambda array, values: array.at[row, places].set(values, mode="drop")
  tokens = put(batch["tokens"], samples.astype(batch["tokens"].dtype))
  others = samples != batch["masked_targets"]
  return tokens, put(jnp.zeros(tokens.shape, bool), others)


def generator_config(cfg: ModelConfig, share: float) -> ModelConfig:
  """The generator's layers: as many, with as wide heads, `share` times as wide in all else.

  Raises:
    InputError: if a width would not be whole.
  """
  names = ("d_model", "d_ff", "num_heads", "num_kv_heads", "d_expert")
  widths = {name: getattr(cfg, name) for name in names}
  small = {n: None if w is None else _part(n, w, share) for n, w in widths.items()}
  rotated = cfg.positions not in ("learned", "sinusoidal")  # These are in the embeddings.
  others = "t5_bias" if cfg.relative_bias else "none"
  return dataclasses.replace(
    words_config(cfg), **small, head_dim=cfg.head_width, token_types=0, embed_norm=False,
    positions=cfg.positions if rotated else others, position_offset=0, relative_bias=False,
    sinusoid_inclusive=False,
  )  # fmt: skip


def words_config(cfg: ModelConfig) -> ModelConfig:
  """The config of a head that scores the vocabulary against the model's embeddings."""
  return dataclasses.replace(
    cfg, head="masked_lm", head_dense=False, head_norm=False, head_activation="gelu",
    head_dense_bias=True, tie_embeddings=True, logit_bias=True, d_embed=None,
  )  # fmt: skip


def generator_flops(
  config: Config, tokens: Mapping[str, float], pairs: Mapping[str, float]
) -> float:
  """FLOPs of the generator in a step: see `model.flops.model_flops`."""
  share = config.objective.resolved().generator_share or 0.0
  small, wide = generator_config(config.model, share), config.model.embed_width
  own = lambda counts: {
    name.removeprefix(GENERATOR): n for name, n in counts.items() if name.startswith(GENERATOR)
  }
  tokens, projection = own(tokens), wide * small.d_model
  flops = model_flops(small, {**tokens, "head": 0}, own(pairs))
  into = tokens["encoder"] * projection * (small.d_model != wide)
  return flops + 6 * (into + tokens["head"] * (projection + wide * small.real_vocab))


def _detection(
  scores: Float[Array, "B T"], replaced: Bool[Array, "B T"], real: Bool[Array, "B T"]
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
  """The sum of binary cross-entropies, and what is reported."""
  nats = jnp.sum(jnp.where(real, jax.nn.softplus(scores) - replaced * scores, 0))
  count, right = jnp.sum(real), (scores > 0) == replaced
  means = dict(
    replaced_loss=(nats, count), replaced_accuracy=(jnp.sum(right & real), count),
    replaced_found=(jnp.sum(right & replaced), jnp.sum(replaced)),
  )  # fmt: skip
  return nats, means


def _part(name: str, width: int, share: float) -> int:
  part = round(width * share)
  if not part or abs(part - width * share) > 1e-6 * width:
    raise InputError(
      f"objective.generator_share={share} of model.{name}={width} is {width * share:g}: the "
      "generator needs a whole number. Change one of them."
    )
  return part
