"""SST-2 from scratch beside PyTorch's nn.TransformerEncoder: same size, data, steps and schedule.

    python -m benchmarks.sentiment --text=train.tsv --validation_text=dev.tsv [--write]

Ours is `python -m train --config=configs/sst2.py`, as a user runs it; the peer learns from the same
batches with the same AdamW and schedule. Accuracy is that of the last step on the whole of the
validation sentences, told by `infer.classify` and by the peer one sentence at a time.
"""

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
from configs import sst2
from model.config import ModelConfig

_TEXT = flags.DEFINE_string("text", None, "Sentences and labels, a tab between.", required=True)
_VALIDATION_TEXT = flags.DEFINE_string("validation_text", None, "As text.", required=True)
_STEPS = flags.DEFINE_integer("steps", 400, "Steps of both.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 40, "Steps of the warm-up.", lower_bound=0)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of both, with seeds 0, 1, …", lower_bound=1)
_WRITE = flags.DEFINE_bool("write", False, "Write the result and the curve.")


def main(_: list[str]) -> None:
  lines = [line.rsplit("\t", 1) for line in Path(_VALIDATION_TEXT.value).read_text().splitlines()]
  texts, labels = [text for text, _ in lines], [label for _, label in lines]
  runs = {"triune": [], "nn.TransformerEncoder": []}
  for seed in range(_SEEDS.value):
    values = overrides(
      steps=_STEPS.value, warmup=_WARMUP.value, seed=seed, source=_TEXT.value,
      validation_source=_VALIDATION_TEXT.value,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
      workdir = Path(folder) / "run"
      runs["triune"].append(learn_ours(values, workdir, texts, labels))
      runs["nn.TransformerEncoder"].append(learn_theirs(values, workdir, texts, labels))
  report(
    "sentiment_sst2", runs, "accuracy", write=_WRITE.value, steps=_STEPS.value,
    seeds=list(range(_SEEDS.value)),
  )  # fmt: skip


def accuracy(found: list[str], labels: list[str]) -> float:
  """Percent of labels that were found."""
  return round(100 * sum(map(str.__eq__, found, labels)) / len(labels), 2)


def learn_ours(values: dict, workdir: Path, texts: list[str], labels: list[str]) -> Learned:
  """The run of the command."""
  train_ours("configs/sst2.py", values, workdir)
  m = model.load(workdir)
  found = [told[0].label for told in infer.classify(m, texts)]
  return Learned(accuracy(found, labels), m.config.num_params(), losses_of(workdir))


def learn_theirs(values: dict, workdir: Path, texts: list[str], labels: list[str]) -> Learned:
  """The peer's run; the tokenizer is that of `workdir`."""
  import torch
  from torch.nn import functional as F

  config, data = prepare_peer(sst2.get_config(), values, workdir)
  net, places = make_peer(config.model), data.sides["text_"].length

  def loss_of(batch):
    logits = net(batch["tokens"], batch["positions"], batch["segments"], places).flatten(0, 1)
    weights = batch["text_weights"].flatten()
    each = F.cross_entropy(logits, batch["text_labels"].flatten(), reduction="none")
    loss = (each * weights).sum() / weights.sum()
    return loss, loss.item()

  losses = train_peer(config, data, net, loss_of)
  net.eval()
  found = []
  for text in texts:
    tokens = torch.tensor([data.tokenizer.encode(text)])
    with torch.no_grad():
      logits = net(tokens, torch.arange(tokens.shape[1])[None], torch.ones_like(tokens), 1)
    found.append((data.labels or ())[logits.argmax()])
  return Learned(accuracy(found, labels), sum(p.numel() for p in net.parameters()), losses)


def make_peer(cfg: ModelConfig):
  """nn.TransformerEncoder of the same size, a mean over each text, and a linear layer."""
  import torch
  from torch import nn

  class Classifier(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(cfg.real_vocab, cfg.d_model)
      nn.init.normal_(self.embed.weight, std=cfg.d_model**-0.5)
      layer = nn.TransformerEncoderLayer(
        cfg.d_model, cfg.num_heads, cfg.d_ff, cfg.dropout, "gelu", batch_first=True,
        norm_first=cfg.norm_placement == "pre",
      )  # fmt: skip
      self.body = nn.TransformerEncoder(
        layer, cfg.num_layers, nn.LayerNorm(cfg.d_model), enable_nested_tensor=False
      )
      self.drop, self.answer = nn.Dropout(cfg.dropout), nn.Linear(cfg.d_model, cfg.outputs)
      self.register_buffer("sinusoids", sinusoids(cfg))

    def forward(self, tokens, pos, seg, places: int):
      """Logits (B, places, labels) of the texts of each row, which are segments 1, 2, …"""
      x = math.sqrt(cfg.d_model) * self.embed(tokens) + self.sinusoids[pos.clamp(min=0)]  # pyright: ignore
      apart = seg[:, :, None] != seg[:, None]
      x = self.body(self.drop(x), mask=apart.repeat_interleave(cfg.num_heads, 0))
      of = (seg[:, None] == torch.arange(1, places + 1)[:, None]).float()
      mean = of @ x / of.sum(-1, keepdim=True).clamp(min=1)
      return self.answer(self.drop(mean))

  return Classifier()


if __name__ == "__main__":
  app.run(main)
