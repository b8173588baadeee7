"""What a certificate compares: scores, gradients, a step of training, greedy tokens, the bits."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import model
from infer import generate
from model import hf
from train.certify.cases import CASES, Case
from train.certify.documents import END, LENGTHS, Document, documents
from train.certify.theirs import Theirs

LOG_PROBABILITY = 1e-4  # The largest difference, in nats.
GRADIENT = 1e-4  # The largest ‖Δ‖ / ‖g‖ of a tensor.
# A tensor whose gradient is smaller than this share of the largest is judged by that: the gradient
# of a key's bias is 0, since a softmax does not see what all scores have in common.
_SHARE = 1e-3
_STEP = 0.01  # Length of the step of training, of all parameters together.
GREEDY_TOKENS = 64
SHARPENING, TIE = 2.0, 1e-3  # Two tokens tie where their scores, times that, are so near.
TIED = 0.02  # The largest share of cases that may have texts that part at a tie.


@dataclasses.dataclass(frozen=True)
class Certificate:
  """What one case gave; None where a head has no such thing.

  Attributes:
    logits: max |Δ| of scores: alone, padded on both sides, and packed.
    log_probability: the same, of log-probabilities, in nats.
    gradient: max ‖Δ‖ / ‖g‖ of a tensor.
    after_step: max |Δ| of log-probabilities after a step of gradient descent in both, ours written
      and read by theirs.
    greedy: tokens that are the same, of GREEDY_TOKENS for each document; those behind a tie are not
      compared, and count.
    ties: texts that part at a tie: ours went on with one of their best two tokens, and these tie.
    same_bits: whether theirs, read and written here, is theirs bit for bit.
  """

  logits: float
  log_probability: float
  gradient: float
  after_step: float
  greedy: int | None
  ties: int
  same_bits: bool

  def failures(self) -> list[str]:
    """What is not as it has to be, in words."""
    told = {
      f"log-probabilities differ by {self.log_probability:.1e}":
        not self.log_probability <= LOG_PROBABILITY,
      f"gradients differ by {self.gradient:.1e}": not self.gradient <= GRADIENT,
      f"after a step log-probabilities differ by {self.after_step:.1e}":
        not self.after_step <= LOG_PROBABILITY,
      f"{self.greedy} greedy tokens are the same":
        self.greedy is not None and self.greedy < GREEDY_TOKENS * len(LENGTHS),
      "weights are not the same bits": not self.same_bits,
    }  # fmt: skip
    return [words for words, failed in told.items() if failed]


def too_many_ties(found: Sequence[Certificate]) -> list[str]:
  """What is wrong with all of them together, as `failures` of each."""
  tied = sum(one.ties > 0 for one in found)
  few = tied <= max(1, TIED * len(found))  # One may be among the few of a family.
  return [] if few else [f"{tied} of {len(found)} part at a tie, more than {TIED:.0%}"]


def timed(name: str) -> tuple[Certificate, float]:
  """The certificate of a case by its name, and seconds: for processes of their own."""
  jax.config.update("jax_default_matmul_precision", "highest")
  start = time.perf_counter()
  return certify(CASES[name]), time.perf_counter() - start


def certify(case: Case) -> Certificate:
  """Compares a random model of Transformers with what it is here.

  Raises:
    InputError: where PyTorch or Transformers is not installed, or the model is not read.
  """
  theirs = Theirs(case)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    theirs.save(folder / "theirs")
    m = model.load(folder / "theirs")
    try:
      return compare(theirs, m, folder)
    finally:
      jax.clear_caches()  # Each case has its own programs, and a process room for some thousand.


def compare(theirs: Theirs, m: model.Model, folder: Path) -> Certificate:
  """Compares a model of Transformers with one of ours.

  Args:
    folder: for what is written.
  """
  docs = documents()
  want = [theirs.scores(doc) for doc in docs]
  pairs = list(_pairs(theirs, m, docs, want))
  greedy, ties = _greedy(theirs, m, docs)
  model.save(m, folder / "back", format="hf")
  same = _same_bits(theirs.tensors(), theirs.reload(folder / "back").tensors())
  gradient, stepped = _train(theirs, m, docs[0], want[0])
  model.save(stepped, folder / "stepped", format="hf")
  after = theirs.scores(docs[0]), theirs.reload(folder / "stepped").scores(docs[0])
  return Certificate(
    worst(_difference(a, b) for a, b in pairs),
    worst(_difference(_log_probabilities(m, a), _log_probabilities(m, b)) for a, b in pairs),
    gradient, _difference(*(_log_probabilities(m, a) for a in after)), greedy, ties, same,
  )  # fmt: skip


def _pairs(theirs: Theirs, m: model.Model, docs: list[Document], want: list[np.ndarray]):
  """(ours, theirs) of each document alone; then padded left, padded right, and packed."""
  for doc, scores in zip(docs, want, strict=True):
    yield np.asarray(m(_row(doc.tokens), **_answer(theirs, _row(doc.answer))))[0], scores
  rows = [[(0, docs[0])], [(1, docs[0])], [(0, doc) for doc in docs]]
  sides = [_rows([[(at, doc[side]) for at, doc in row] for row in rows]) for side in (0, 1)]
  (tokens, seg, pos), (answer, other_seg, other_pos) = sides
  more = _answer(theirs, answer, other_seg, other_pos)
  got = np.asarray(m(tokens, segments=seg, positions=pos, **more))
  for row, placed in enumerate([docs[:1], docs[:1], docs]):
    for i in range(len(placed)):
      if m.config.head_kind in ("sequence", "embedding"):
        yield got[row, i], want[i]
      else:
        here = np.asarray(other_seg if theirs.answers else seg)[row] == i + 1
        yield got[row][here], want[i]


def _row(ids: np.ndarray) -> jax.Array:
  return jnp.asarray(ids, jnp.int32)[None]


def _rows(rows: list[list[tuple[int, np.ndarray]]]) -> list[jax.Array]:
  """Tokens, segments and positions (B, T): texts of a row on the left (0) or on the right (1)."""
  length = max(sum(len(text) for _, text in row) for row in rows)
  tokens: Any = np.zeros((len(rows), length), np.int32)
  seg, pos = tokens.copy(), tokens.copy() - 1
  for i, row in enumerate(rows):
    begin = length - sum(len(text) for _, text in row) if row[0][0] else 0
    for k, (_, text) in enumerate(row):
      here = slice(begin, begin + len(text))
      tokens[i, here], seg[i, here], pos[i, here] = text, k + 1, np.arange(len(text))
      begin += len(text)
  return [jnp.asarray(a) for a in (tokens, seg, pos)]


def _answer(theirs: Theirs, tokens: jax.Array, seg: Any = None, pos: Any = None) -> dict[str, Any]:
  if not theirs.answers:
    return {}
  return dict(decoder_tokens=tokens, decoder_segments=seg, decoder_positions=pos)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
  return float(np.max(np.abs(got - want)))


def worst(differences: Iterable[float]) -> float:
  """The largest; no number, if any is none: a comparison with `max` would pass it over."""
  return float(np.max(list(differences)))


def _log_probabilities(m: model.Model, scores: np.ndarray) -> np.ndarray:
  """Of a head that scores tokens or labels; what others say is taken as it is."""
  if m.config.head_kind not in ("language", "masked_lm", "sequence", "token"):
    return scores
  return np.asarray(jax.nn.log_softmax(scores.astype(np.float64), axis=-1))


def _same_bits(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> bool:
  same = lambda name: want[name].tobytes() == got[name].tobytes()
  return want.keys() == got.keys() and all(map(same, want))


def _train(
  theirs: Theirs, m: model.Model, doc: Document, want: np.ndarray
) -> tuple[float, model.Model]:
  """(max ‖Δ‖ / ‖g‖ of a tensor, ours after a step); theirs makes the step too."""
  targets = np.random.default_rng(1).integers(0, want.shape[-1], want.size // want.shape[-1])
  theirs_grads = theirs.gradients(doc, targets)
  more = _answer(theirs, _row(doc.answer))

  def loss(params):
    scores = m.apply(params, _row(doc.tokens), **more)[0]
    scores = scores.reshape(-1, want.shape[-1])
    if scores.shape[-1] == 1:
      return jnp.square(scores).mean()
    chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    return (jax.nn.logsumexp(scores, axis=-1) - chosen).mean()

  grads = jax.jit(jax.grad(loss))(m.params)
  leaves: Any = flatten_dict(jax.device_get(grads))
  layout = hf.layout(m)
  ours = {name: g for name, g in layout.tensors(lambda leaf: leaves[leaf]) if name in theirs_grads}
  norm = np.linalg.norm
  least = _SHARE * max(norm(g) for g in theirs_grads.values())
  apart = lambda name, g: norm(ours.get(name, np.inf) - g)  # Without bound where ours lacks it.
  largest = worst(float(apart(name, g) / max(norm(g), least)) for name, g in theirs_grads.items())
  rate = _STEP / float(np.sqrt(sum(norm(g) ** 2 for g in theirs_grads.values())))
  theirs.step(rate)
  # What is no parameter there, a buffer that is a weight, takes no step here.
  trained = {at.path for one in layout.pieces if one.theirs in theirs_grads for at in one.places}
  stepped = {
    path: p - rate * leaves[path] if path in trained else p
    for path, p in flatten_dict(m.params).items()
  }
  return largest, dataclasses.replace(m, params=unflatten_dict(stepped))


def _greedy(theirs: Theirs, m: model.Model, docs: list[Document]) -> tuple[int | None, int]:
  """(tokens that are the same or behind a tie, texts that part at one) of a head that writes."""
  if m.config.head_kind != "language":
    return None, 0
  start = None
  if theirs.two_sided:  # Any token will do where a tokenizer would name it.
    start = END if m.config.decoder_start_id is None else m.config.decoder_start_id
    m = dataclasses.replace(m, config=dataclasses.replace(m.config, decoder_start_id=start))
  room = m.config.max_positions
  n = GREEDY_TOKENS
  prompts = [doc.tokens.tolist() for doc in docs]
  if room is not None and max(LENGTHS) + n > room:
    raise ValueError(f"{room} positions are fewer than {max(LENGTHS)} + {n}: see the cases.")
  written = generate(dataclasses.replace(m, end_ids=()), prompts, max_new_tokens=n)
  same, ties = 0, 0
  for doc, ours in zip(docs, written, strict=True):
    scores = theirs.next_scores(doc, start, ours.tokens)
    tokens = scores.argmax(-1)
    parts = next((i for i in range(n) if tokens[i] != ours.tokens[i]), n)
    tied = parts < n and _tie(scores[parts], ours.tokens[parts])
    same, ties = same + (n if tied else parts), ties + tied
  return same, ties


def _tie(scores: np.ndarray, token: int) -> bool:
  """Whether their best two tokens tie, and `token` is one of them."""
  second, first = (int(i) for i in np.argsort(scores)[-2:])
  near = (scores[first] - scores[second]) * SHARPENING <= TIE
  return bool(near) and token in (first, second)
