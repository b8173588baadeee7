"""A model of Transformers with random weights, and what it says: only this file knows PyTorch."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from model import hf
from model.errors import InputError
from model.hf.safetensors_files import open_folder
from train.certify.cases import Case
from train.certify.documents import Document

_KERNEL = "eager"  # Of attention, where a case names no other.
_LEARNED = ("e_score_correction_bias", "final_logits_bias")  # Buffers that are weights.
# Of matrices, over the root of their rows' width: attention is neither flat nor on single tokens,
# where each rounding of a number would show.
SPREAD = 0.7
STD = 0.2  # Of vectors, norms too, around what they begin with: ones would hide a mistake.


class Theirs:
  """A model of a case.

  Attributes:
    two_sided: whether a decoder reads a second text.
  """

  def __init__(self, case: Case):
    """
    Raises:
      InputError: where PyTorch or Transformers is not installed.
    """
    try:
      import torch
      import transformers
    except ImportError as error:
      raise InputError(
        f"certificates compare with PyTorch and Transformers: {error}. pip install -e '.[test]', "
        "on Python 3.11."
      ) from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    name, settings = case
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    config = kind.config_class(**{"attn_implementation": _KERNEL, **settings})
    self._model = kind(config).eval()
    with torch.no_grad():
      for p in self._model.parameters():
        if p.requires_grad:
          if p.dim() == 1:
            p += torch.randn_like(p) * STD
          else:
            p.copy_(torch.randn_like(p) * SPREAD * p.shape[-1] ** -0.5)
      for name, buffer in self._model.named_buffers():
        if name.endswith(_LEARNED):
          torch.nn.init.normal_(buffer, std=STD)
    self._torch, self.two_sided = torch, bool(self._model.config.is_encoder_decoder)

  def save(self, folder: Path) -> None:
    """As its users would."""
    self._model.save_pretrained(folder)

  def reload(self, folder: Path) -> "Theirs":
    """A model of the same class from a folder."""
    again = object.__new__(Theirs)
    kind = type(self._model)
    kernel = self._model.config._attn_implementation
    again._model = kind.from_pretrained(folder, attn_implementation=kernel).eval()
    # A folder without a tokenizer does not know what ends a text.
    again._model.config.eos_token_id = self._model.config.eos_token_id
    again._torch, again.two_sided = self._torch, self.two_sided
    return again

  def tensors(self) -> dict[str, np.ndarray]:
    """All that it saves."""
    return {name: t.numpy() for name, t in self._model.state_dict().items()}

  def scores(self, document: Document) -> np.ndarray:
    """What its head says of one document, unpadded: (T, …), or (…) of a head on whole texts."""
    with self._torch.no_grad():
      return self._scores(document).numpy()

  def _scores(self, document: Document) -> Any:
    tokens, answer = (self._torch.tensor(ids)[None] for ids in document)
    out = self._model(input_ids=tokens, **(dict(decoder_input_ids=answer) if self.answers else {}))
    if "start_logits" in out:
      return self._torch.stack([out.start_logits, out.end_logits], -1)[0]
    for name in ("prediction_logits", "logits"):
      if name in out:
        return out[name][0]
    if "encoder_last_hidden_state" in out:  # The encoder alone embeds texts.
      return out.encoder_last_hidden_state[0, 0]
    if out.get("pooler_output") is not None:
      return out.pooler_output[0]
    return out.last_hidden_state[0, -1 if self._causal else 0]

  @property
  def _causal(self) -> bool:
    """Whether the last token of a text is the one that has seen all of it."""
    return hf.FAMILIES[self._model.config.model_type].settings["shape"] == "decoder"

  @functools.cached_property
  def answers(self) -> bool:
    """Whether its decoder is given a text of its own."""
    return self.two_sided and type(self._model).__name__.endswith(("Generation", "MTModel"))

  def gradients(self, document: Document, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Of cross-entropy against `targets`, or of the mean square of what has one score, by names of
    tensors; those that get none are left out.
    """
    torch = self._torch
    self._model.zero_grad()
    scores = self._scores(document)
    scores = scores.reshape(-1, scores.shape[-1])
    if scores.shape[-1] == 1:
      loss = scores.square().mean()
    else:
      loss = torch.nn.functional.cross_entropy(scores, torch.tensor(targets))
    loss.backward()
    return self._gradients()

  def _gradients(self) -> dict[str, np.ndarray]:
    """Those of the last pass, under the names that a checkpoint has."""
    held = copy.deepcopy(self._model)
    missing = float("nan")
    for p, own in zip(held.parameters(), self._model.parameters(), strict=True):
      p.data = self._torch.full_like(p, missing) if own.grad is None else own.grad.clone()
    for buffer in held.buffers():
      if buffer.is_floating_point():
        buffer.fill_(missing)
    with tempfile.TemporaryDirectory() as folder:
      held.save_pretrained(folder)
      tensors = {n: np.array(a) for n, a in open_folder(Path(folder)).items()}
    return {name: array for name, array in tensors.items() if not np.isnan(array).any()}

  def step(self, rate: float) -> None:
    """One step of gradient descent on the last gradients."""
    with self._torch.no_grad():
      for p in self._model.parameters():
        if p.grad is not None:
          p -= rate * p.grad

  def next_scores(self, document: Document, start: int | None, written: list[int]) -> np.ndarray:
    """Scores (n, V) from which each of n tokens would be chosen behind those before it.

    Args:
      start: what a decoder beside an encoder reads first; None: the tokens go on behind
        `document.tokens`.
    """
    if start is not None:
      return self.scores(Document(document.tokens, np.array([start, *written[:-1]])))
    turned = getattr(self._model.config, "rope_parameters", None) or {}
    if turned.get("rope_type") == "dynamic":  # What a cache holds has turned as long as a text was.
      tokens = self._torch.tensor(document.tokens)[None]
      self._model.generation_config.eos_token_id = None
      out = self._model.generate(
        tokens, attention_mask=tokens * 0 + 1, do_sample=False, max_new_tokens=len(written),
        output_logits=True, return_dict_in_generate=True,
      )  # fmt: skip
      return self._torch.stack(out.logits, dim=1)[0].numpy()
    read = np.array([*document.tokens, *written[:-1]])
    return self.scores(Document(read, read))[len(document.tokens) - 1 :]
