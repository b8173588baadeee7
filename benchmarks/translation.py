"""Translation from scratch beside PyTorch's nn.Transformer: same size, data, steps and schedule.

    python -m benchmarks.translation --text=train.en.gz --target=train.de.gz \
        --validation_text=val.en.gz --validation_target=val.de.gz [--write]

Ours is `python -m train --config=configs/multi30k.py`, as a user runs it; the peer learns from the
same batches, one after the other, with the same AdamW and schedule. Both translate the validation
sentences greedily, and sacrebleu compares with the references.
"""

import dataclasses
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

import infer
import model
from benchmarks.measure import RESULTS, commit, machine
from configs import multi30k
from model.config import ModelConfig
from train.config import Config
from train.data.pipeline import load_data
from train.resolve import resolved
from train.schedules import make_schedule

_TEXT = flags.DEFINE_string("text", None, "Sentences to translate, one a line.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Their translations.", required=True)
_VALIDATION_TEXT = flags.DEFINE_string("validation_text", None, "As text.", required=True)
_VALIDATION_TARGET = flags.DEFINE_string("validation_target", None, "As target.", required=True)
_STEPS = flags.DEFINE_integer("steps", None, "Steps of both; none: the config's.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of both.", lower_bound=0)
_WRITE = flags.DEFINE_bool("write", False, "Write the result under benchmarks/results.")
_TOKENS = 80  # The most that a translation has.
_ROWS = 64  # Sentences that the peer translates at a time.


def settings() -> Config:
  """The config of both."""
  config = multi30k.get_config()
  data = dataclasses.replace(
    config.data, source=_TEXT.value, target=_TARGET.value,
    validation_source=_VALIDATION_TEXT.value, validation_target=_VALIDATION_TARGET.value,
  )  # fmt: skip
  steps = config.steps if _STEPS.value is None else _STEPS.value
  return dataclasses.replace(config, data=data, steps=steps, seed=_SEED.value)


def train_ours(config: Config, workdir: Path) -> float:
  """Runs the command; returns its seconds."""
  data = config.data
  values = dict(
    steps=config.steps, seed=config.seed, eval_every=config.steps, checkpoint_every=config.steps,
  )  # fmt: skip
  sources = {"data.source": data.source, "data.target": data.target,
             "data.validation_source": data.validation_source,
             "data.validation_target": data.validation_target}  # fmt: skip
  overrides = [f"--config.{name}={value}" for name, value in {**values, **sources}.items()]
  command = [sys.executable, "-m", "train", "--config=configs/multi30k.py", f"--workdir={workdir}"]
  start = time.perf_counter()
  subprocess.run([*command, *overrides], check=True)
  return time.perf_counter() - start


def make_peer(cfg: ModelConfig):
  """nn.Transformer of the same size with one table of tokens for both sides and the output."""
  import torch
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
      frequency = 10_000.0 ** (-torch.arange(0, cfg.d_model, 2) / cfg.d_model)
      angle = torch.arange(cfg.max_positions or 512)[:, None] * frequency
      self.register_buffer("sinusoids", torch.cat((angle.sin(), angle.cos()), -1))

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


def train_peer(config: Config, workdir: Path):
  """(the trained peer, its config, its tokenizer, seconds, last losses)."""
  import torch
  from torch.nn import functional as F

  data = load_data(config, workdir=workdir)
  config = resolved(config, data)
  torch.manual_seed(config.seed)
  net, o = make_peer(config.model), config.optimizer
  matrices = [p for p in net.parameters() if p.ndim >= 2]
  vectors = [p for p in net.parameters() if p.ndim < 2]
  groups = [dict(params=matrices, weight_decay=o.weight_decay),
            dict(params=vectors, weight_decay=0.0)]  # fmt: skip
  moments = o.moments()
  adamw = torch.optim.AdamW(groups, betas=(moments["b1"], moments["b2"]), eps=moments["eps"])
  schedule, losses, start = make_schedule(o, config.steps), [], time.perf_counter()
  for step, batch in zip(range(config.steps), data.batches(), strict=False):
    side = lambda name: tuple(
      torch.tensor(batch[name + field]).long()  # noqa: B023
      for field in ("tokens", "positions", "segments")
    )
    logits = net(side(""), side("decoder_"))
    targets, weights = (torch.tensor(batch[f"decoder_{n}"]) for n in ("targets", "weights"))
    each = F.cross_entropy(
      logits.flatten(0, 1), targets.long().flatten(), reduction="none",
      label_smoothing=config.objective.label_smoothing,
    )  # fmt: skip
    loss = (each * weights.flatten()).sum() / weights.sum()
    adamw.zero_grad(set_to_none=True)
    loss.backward()
    if o.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip_norm)
    for group in adamw.param_groups:
      group["lr"] = float(np.asarray(schedule(step)))
    adamw.step()
    losses.append(loss.item())
    if step % 100 == 0:
      print(f"pytorch step {step}/{config.steps}  loss {losses[-1]:.3f}", file=sys.stderr)
  return net.eval(), config, data.tokenizer, time.perf_counter() - start, losses[-20:]


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


def main(_: list[str]) -> None:
  import sacrebleu  # pyright: ignore[reportMissingImports]

  config = settings()
  texts, references = lines_of(_VALIDATION_TEXT.value), lines_of(_VALIDATION_TARGET.value)
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / "run"
    seconds = train_ours(config, workdir)
    m = model.load(workdir)
    ours = [c.text for c in infer.generate(m, texts, max_new_tokens=_TOKENS)]
    net, peer_config, tokenizer, peer_seconds, losses = train_peer(config, workdir)
    theirs = translate_with_peer(net, peer_config.model, tokenizer, texts)
  metric = sacrebleu.metrics.BLEU()
  rows = {}
  for name, found, spent in (("triune", ours, seconds), ("nn.Transformer", theirs, peer_seconds)):
    score = metric.corpus_score(found, [references])
    rows[name] = dict(bleu=round(score.score, 2), training_seconds=round(spent, 1))
    print(f"{name:<16}BLEU {score.score:.2f}  training {spent:,.0f} s")
    print("\n".join(f"    {text}" for text in found[:3]))
  print(metric.get_signature())
  result = dict(
    machine=machine(), commit=commit(), steps=config.steps, seed=config.seed, rows=rows,
    parameters=dict(triune=sum(np.size(a) for a in _leaves(m.params)),
                    pytorch=sum(p.numel() for p in net.parameters())),
    signature=str(metric.get_signature()), peer_last_loss=float(np.mean(losses)),
  )  # fmt: skip
  if _WRITE.value:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "translation_multi30k.json").write_text(json.dumps(result, indent=2) + "\n")


def _leaves(params: dict) -> list:
  import jax

  return jax.tree.leaves(params)


if __name__ == "__main__":
  app.run(main)
