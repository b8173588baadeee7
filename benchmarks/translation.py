"""Translation from scratch beside PyTorch's nn.Transformer: same size, data, steps and schedule.

    python -m benchmarks.translation --text=train.en.gz --target=train.de.gz \
        --validation_text=val.en.gz --validation_target=val.de.gz [--write]

Ours is `python -m train --config=configs/multi30k.py`, as a user runs it; the peer learns from the
same batches, one after the other, with the same AdamW and schedule. Both translate the validation
sentences greedily, and sacrebleu (`pip install -e '.[eval]'`) compares with the references.
"""

import gzip
import math
import tempfile
from pathlib import Path

from absl import app, flags

import infer
import model
from benchmarks.learning import (
  Learned,
  losses_of,
  overrides,
  prepare_peer,
  report,
  sinusoids,
  train_ours,
  train_peer,
)
from configs import multi30k
from model.config import ModelConfig

_TEXT = flags.DEFINE_string("text", None, "Sentences to translate, one a line.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Their translations.", required=True)
_VALIDATION_TEXT = flags.DEFINE_string("validation_text", None, "As text.", required=True)
_VALIDATION_TARGET = flags.DEFINE_string("validation_target", None, "As target.", required=True)
_STEPS = flags.DEFINE_integer("steps", 1500, "Steps of both.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 200, "Steps of the warm-up.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of both.", lower_bound=0)
_WRITE = flags.DEFINE_bool("write", False, "Write the result and the curve.")
_TOKENS = 80  # The most that a translation has.
_ROWS = 64  # Sentences that the peer translates at a time.


def main(_: list[str]) -> None:
  from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]

  values = overrides(
    steps=_STEPS.value, warmup=_WARMUP.value, seed=_SEED.value, source=_TEXT.value,
    target=_TARGET.value, validation_source=_VALIDATION_TEXT.value,
    validation_target=_VALIDATION_TARGET.value,
  )  # fmt: skip
  metric = BLEU()
  texts, references = lines_of(_VALIDATION_TEXT.value), lines_of(_VALIDATION_TARGET.value)
  bleu = lambda found: round(metric.corpus_score(found, [references]).score, 2)
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / "run"
    found, ours = learn_ours(values, workdir, texts, bleu)
    print("\n".join(found[:3]))
    found, theirs = learn_theirs(values, workdir, texts, bleu)
    print("\n".join(found[:3]))
  print(metric.get_signature())
  report(
    "translation_multi30k", {"triune": [ours], "nn.Transformer": [theirs]}, "BLEU",
    write=_WRITE.value, steps=_STEPS.value, seeds=[_SEED.value],
    signature=str(metric.get_signature()),
  )  # fmt: skip


def learn_ours(values: dict, workdir: Path, texts: list[str], bleu) -> tuple[list[str], Learned]:
  """(translations, the run)."""
  train_ours("configs/multi30k.py", values, workdir)
  m = model.load(workdir)
  found = [c.text for c in infer.generate(m, texts, max_new_tokens=_TOKENS)]
  return found, Learned(bleu(found), m.config.num_params(), losses_of(workdir))


def learn_theirs(values: dict, workdir: Path, texts: list[str], bleu) -> tuple[list[str], Learned]:
  """(translations, the run); the tokenizer is that of `workdir`."""
  import torch
  from torch.nn import functional as F

  config, data = prepare_peer(multi30k.get_config(), values, workdir)
  net, smoothing = make_peer(config.model), config.objective.label_smoothing

  def loss_of(batch):
    side = lambda name: [batch[name + field] for field in ("tokens", "positions", "segments")]
    logits = net(side(""), side("decoder_")).flatten(0, 1)
    targets, weights = (batch[f"decoder_{n}"].flatten() for n in ("targets", "weights"))
    mean = lambda smoothing: (
      (
        F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing) * weights
      ).sum()
      / weights.sum()
    )
    with torch.no_grad():
      reported = mean(0.0).item()
    return mean(smoothing), reported

  losses = train_peer(config, data, net, loss_of)
  found = translate_with_peer(net.eval(), config.model, data.tokenizer, texts)
  parameters = sum(p.numel() for p in net.parameters())
  return found, Learned(bleu(found), parameters, losses)


def make_peer(cfg: ModelConfig):
  """nn.Transformer of the same size with one table of tokens for both sides and the output."""
  from torch import nn

  class Translator(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(cfg.real_vocab, cfg.d_model)
      nn.init.normal_(self.embed.weight, std=cfg.d_model**-0.5)
      self.body = nn.Transformer(
        cfg.d_model, cfg.num_heads, cfg.depth("encoder"), cfg.depth("decoder"), cfg.d_ff,
        cfg.dropout, "relu" if cfg.activation == "relu" else "gelu", batch_first=True,
        norm_first=cfg.norm_placement == "pre",
      )  # fmt: skip
      self.drop = nn.Dropout(cfg.dropout)
      self.register_buffer("sinusoids", sinusoids(cfg))

    def read(self, tokens, pos):
      x = self.embed(tokens) * math.sqrt(cfg.d_model) + self.sinusoids[pos.clamp(min=0)]  # pyright: ignore
      return self.drop(x)

    def forward(self, source, target):
      """Logits (B, U, V); each side is (tokens, positions, segments)."""
      hide = lambda seen: (~seen).repeat_interleave(cfg.num_heads, 0)
      same = lambda a, b: a[2][:, :, None] == b[2][:, None]
      causal = target[1][:, :, None] >= target[1][:, None]
      y = self.body(
        self.read(*source[:2]), self.read(*target[:2]), src_mask=hide(same(source, source)),
        tgt_mask=hide(same(target, target) & causal), memory_mask=hide(same(target, source)),
      )  # fmt: skip
      return y @ self.embed.weight.T

  return Translator()


def translate_with_peer(net, cfg: ModelConfig, tokenizer, texts: list[str]) -> list[str]:
  """Greedy translations, some at a time."""
  import torch

  found = []
  for start in range(0, len(texts), _ROWS):
    ids = [tokenizer.encode(text) for text in texts[start : start + _ROWS]]
    width = max(map(len, ids))
    tokens = torch.tensor([i + [0] * (width - len(i)) for i in ids])
    held = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    source = tokens, torch.arange(width).expand_as(tokens), held
    out = torch.full((len(ids), 1), cfg.decoder_start_id or 0)
    for _ in range(_TOKENS):
      ones = torch.ones_like(out)
      with torch.no_grad():
        logits = net(source, (out, torch.arange(out.shape[1]).expand_as(out), ones))
      out = torch.cat((out, logits[:, -1].argmax(-1, keepdim=True)), 1)
      if (out == tokenizer.eos_id).any(1).all():
        break
    for row in out[:, 1:].tolist():
      end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
      found.append(tokenizer.decode(row[:end]))
  return found


def lines_of(path: str) -> list[str]:
  """Lines of a text file, which may be compressed."""
  data = Path(path).read_bytes()
  text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
  return text.removesuffix("\n").split("\n")


if __name__ == "__main__":
  app.run(main)
