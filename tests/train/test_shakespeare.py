"""nanoGPT's settings on tiny Shakespeare: PyTorch's losses step by step, and the figure."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import shakespeare, shakespeare_cpu
from model.sharding import make_mesh
from train.data.pipeline import load_data
from train.program import build_program, put_batch
from train.resolve import resolved
from train.schedules import make_schedule

ROOT = Path(__file__).parents[2]
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
pytestmark = pytest.mark.skipif(
  not TEXT.exists(), reason="the tiny Shakespeare corpus is not on this machine"
)


def setting(module, cache: Path):
  """A config of nanoGPT's without dropout and in float64, so that both sides compute the same.

  Training is chaotic: what float32 rounds, one part in ten millions, grows to percents within 150
  to 300 steps of these settings, on either side.
  """
  config = module.get_config()
  data = dataclasses.replace(config.data, source=str(TEXT))
  model = dataclasses.replace(
    config.model, dropout=0.0, attention_dropout=0.0, dtype="float64", param_dtype="float64"
  )
  return dataclasses.replace(config, data=data, model=model, cache_dir=str(cache))


def torch_trainer(config, params):
  """A GPT written with torch.nn alone, from the same weights: (its parts, a step of training)."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  device = "cuda" if torch.cuda.is_available() else "cpu"
  m, tensor = config.model, lambda a: torch.tensor(np.array(a), device=device)
  D, N = m.d_model, m.num_heads

  class Layer(nn.Module):
    def __init__(self, tree, i):
      super().__init__()
      at = lambda *path: tensor(jax.tree_util.tree_map(lambda a: a[i], tree_at(tree, path)))
      self.norms = nn.ParameterList([at("attn_norm", "scale"), at("mlp_norm", "scale")])
      flat = lambda name: at("attn", name, "w").reshape(D, D)
      self.attn = nn.ParameterList([flat(f"{n}_proj") for n in "qkvo"])
      self.mlp = nn.ParameterList([at("mlp", f"{n}_proj", "w") for n in ("up", "down")])

    def forward(self, x, mask):
      B, T, _ = x.shape
      y = F.layer_norm(x, (D,), self.norms[0], eps=m.norm_eps)
      q, k, v = ((y @ w).view(B, T, N, D // N).transpose(1, 2) for w in self.attn[:3])
      y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
      x = x + y.transpose(1, 2).reshape(B, T, D) @ self.attn[3]
      y = F.layer_norm(x, (D,), self.norms[1], eps=m.norm_eps)
      return x + F.gelu(y @ self.mlp[0]) @ self.mlp[1]

  class GPT(nn.Module):
    def __init__(self):
      super().__init__()
      body = params["decoder"]
      self.wte = nn.Parameter(tensor(params["embed"]["table"]))
      self.wpe = nn.Parameter(tensor(body["position_embed"]["table"]))
      self.layers = nn.ModuleList([Layer(body["layers"][0], i) for i in range(m.num_layers)])
      self.norm = nn.Parameter(tensor(body["final_norm"]["scale"]))

    def forward(self, tokens, pos, seg):
      x = self.wte[tokens] + self.wpe[pos.clamp(min=0)]
      mask = (seg[:, :, None] == seg[:, None, :]) & (pos[:, :, None] >= pos[:, None, :])
      for layer in self.layers:
        x = layer(x, mask[:, None])
      return F.layer_norm(x, (D,), self.norm, eps=m.norm_eps) @ self.wte.T

  net, o = GPT(), config.optimizer
  groups = [
    dict(params=[p for p in net.parameters() if p.ndim >= 2], weight_decay=o.weight_decay),
    dict(params=[p for p in net.parameters() if p.ndim < 2], weight_decay=0.0),
  ]
  adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, o.b2), eps=1e-8)
  schedule = make_schedule(o, config.steps)

  def step(number, batch):
    tokens, targets, pos, seg = (
      tensor(batch[n]).long() for n in ("tokens", "targets", "positions", "segments")
    )
    weights = tensor(batch["weights"]).flatten()
    logits = net(tokens, pos, seg)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (nats * weights).sum() / weights.sum()
    adamw.zero_grad()
    loss.backward()
    clip(net.parameters(), o.clip_norm)
    for group in adamw.param_groups:
      group["lr"] = float(schedule(number))
    adamw.step()
    return loss.item()

  return {"net": net, "adamw": adamw}, step


def clip(parameters, limit):
  """clip_grad_norm_ without its 1e-6 beside the norm, which float64 would tell apart."""
  import torch

  gradients = [p.grad for p in parameters]
  norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
  for g in gradients:
    g.mul_((limit / norm).clamp(max=1))


def tree_at(tree, path):
  for part in path:
    tree = tree[part]
  return tree


def compare(config, steps, kept=None):
  """Yields (ours, PyTorch's) loss of each step; `kept`: a folder from which a cut run goes on."""
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with jax.enable_x64(True), jax.set_mesh(mesh):
    data = load_data(config)
    config = resolved(config, data)
    program = build_program(config, mesh)
    state = program.init()
    theirs, torch_step = torch_trainer(config, jax.device_get(state.params))
    state, pairs = restored(kept, state, theirs)
    yield from pairs
    for step in range(len(pairs), steps):
      batch = data.batch(step)
      state, metrics = program.train_step(state, put_batch(program, batch))
      pairs.append((float(metrics["loss"]), torch_step(step, batch)))
      yield pairs[-1]
      if kept and len(pairs) % 10 == 0:
        keep(kept, state, theirs, pairs)


def keep(folder, state, theirs, pairs):
  """Both sides and their losses, as one file which is there whole or not at all."""
  import torch

  ours = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
  parts = {name: part.state_dict() for name, part in theirs.items()}
  torch.save((ours, parts, pairs), folder / "new.pt")
  (folder / "new.pt").replace(folder / "kept.pt")


def restored(folder, state, theirs):
  """(our state, pairs of losses so far); PyTorch's parts are set to where they were."""
  import torch

  if folder is None or not (folder / "kept.pt").exists():
    return state, []
  ours, parts, pairs = torch.load(folder / "kept.pt", weights_only=False)
  for name, part in theirs.items():
    part.load_state_dict(parts[name])
  leaves, structure = jax.tree.flatten(state)
  put = lambda new, old: jax.device_put(new, old.sharding)
  return jax.tree.unflatten(structure, map(put, ours, leaves)), pairs


def test_twenty_steps_of_the_cpu_setting_equal_pytorch(tmp_path):
  pytest.importorskip("torch")
  pairs = np.array(list(compare(setting(shakespeare_cpu, tmp_path), 20)))
  np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=1e-12)
  assert pairs[-1, 0] < pairs[0, 0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
  "module, tolerance", [(shakespeare_cpu, 1e-6), (shakespeare, 0.005)], ids=["cpu", "gpu"]
)
def test_three_hundred_steps_equal_pytorch(tmp_path, module, tolerance):
  """The GPU setting takes three and a half hours on two cores. Cut, it goes on from its last
  tenth step. It accumulates its batch: what float64 holds of it at once would wait for memory.
  """
  pytest.importorskip("torch")
  kept = Path.home() / ".cache" / "triune" / "three_hundred"
  kept.mkdir(parents=True, exist_ok=True)
  config = setting(module, tmp_path)
  if module is shakespeare:
    config = dataclasses.replace(config, accumulation=16)
  pairs = compare(config, 300, kept if module is shakespeare else None)
  for step, (ours, theirs) in enumerate(pairs):
    print(json.dumps(dict(step=step, ours=ours, pytorch=theirs)), flush=True)
    assert math.isclose(ours, theirs, rel_tol=tolerance), step
  (kept / "kept.pt").unlink(missing_ok=True)


@pytest.mark.slow
def test_the_cpu_setting_reaches_the_published_loss_over_three_seeds(tmp_path):
  losses = []
  for seed in range(3):
    workdir = tmp_path / str(seed)
    command = [
      sys.executable, "-m", "train", "--config=configs/shakespeare_cpu.py", f"--workdir={workdir}",
      f"--config.data.source={TEXT}", f"--config.seed={seed}",
      f"--config.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, env=plain_environment())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses.append([line["validation_loss"] for line in lines if "validation_loss" in line][-1])
  print(json.dumps(dict(validation_losses=losses, mean=float(np.mean(losses)))))
  assert np.mean(losses) <= 1.88, losses


def plain_environment():
  """Without the flags of the tests, which compile without optimization for many devices."""
  import os

  return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
