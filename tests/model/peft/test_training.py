"""The same adapter, begun the same, learns as with torch PEFT: outputs, gradients, 20 steps."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import model
from model.peft.attach import apart, of_adapter
from model.peft.files import with_adapter
from tests.model.peft import theirs

KINDS = ("lora", "rslora", "dora", "ia3", "patterns")
# Fused matrices learn one A there, and one for each of theirs here.
CASES = [
  pytest.param(name, kind, marks=pytest.mark.slow)
  for name in ("llama", "bert", "t5")
  for kind in KINDS
]
STEPS, RATE = 20, 1e-3


def batch(name):
  """(tokens, what the decoder reads or None, targets)."""
  rows = theirs.tokens()
  read = rows[:, :5] if name == "t5" else None
  targets = np.random.default_rng(1).integers(
    0, theirs.VOCAB, (rows if read is None else read).shape
  )
  return rows, read, targets


def torch_loss(pm, name):
  torch = theirs.torch
  rows, read, targets = batch(name)
  more = {} if read is None else dict(decoder_input_ids=torch.tensor(read))
  logits = pm(input_ids=torch.tensor(rows), **more).logits
  return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())


def trained_there(pm, name):
  """(gradients of the first step by name, losses); plain AdamW."""
  trained = [p for p in pm.parameters() if p.requires_grad]
  optimizer = theirs.torch.optim.AdamW(
    trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
  )
  first, losses = {}, []
  for step in range(STEPS):
    optimizer.zero_grad()
    loss = torch_loss(pm, name)
    loss.backward()
    if step == 0:
      first = {n: p.grad.clone() for n, p in pm.named_parameters() if p.requires_grad}
    optimizer.step()
    losses.append(float(loss))
  return first, losses


def twenty_steps(loss, moving, rate):
  """Adam as torch has it: (what is trained after it, the first gradient, losses)."""
  tx = optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8)

  @jax.jit
  def step(moving, state):
    value, grads = jax.value_and_grad(loss)(moving)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(moving, updates), state, value, grads

  state, losses, first = tx.init(moving), [], None
  for _ in range(STEPS):
    moving, state, value, grads = step(moving, state)
    first = grads if first is None else first
    losses.append(float(value))
  return moving, first, losses


def trained_here(m, name):
  rows, read, targets = batch(name)
  more = {} if read is None else dict(decoder_tokens=read)
  base, adapter = apart(m.params)
  fixed = {p: a for p, a in flatten_dict(adapter).items() if p[-1] == "scale"}
  moving = {p: a for p, a in flatten_dict(adapter).items() if p[-1] != "scale"}

  def loss(moving):
    leaves = flatten_dict(base) | fixed | moving
    logits = m.apply(unflatten_dict(leaves), rows, **more)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

  moving, first, losses = twenty_steps(loss, moving, RATE)
  return first, losses, unflatten_dict(flatten_dict(base) | fixed | moving)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_outputs_gradients_and_twenty_steps_equal_those_of_peft(tmp_path, name, kind):
  base = theirs.base(name, tmp_path / "base")
  pm = theirs.adapted(base, theirs.config(name, kind))
  pm.save_pretrained(tmp_path / "begin")
  m = model.load(tmp_path / "base", adapter=tmp_path / "begin")
  close(theirs.ours(m, name), theirs.logits(pm, name))
  their_grads, their_losses = trained_there(pm, name)
  grads, losses, params = trained_here(m, name)
  close(losses, their_losses)
  assert losses[-1] < losses[0] - 1e-3
  # Gradients by way of the file: theirs in the place of an adapter's parameters.
  with theirs.torch.no_grad():
    begin = {n: p.clone() for n, p in pm.named_parameters() if p.requires_grad}
    for n, p in pm.named_parameters():
      if p.requires_grad:
        p.copy_(their_grads[n])
    pm.save_pretrained(tmp_path / "gradients")
    for n, p in pm.named_parameters():
      if p.requires_grad:
        p.copy_(begin[n])
  plain = dataclasses.replace(m, params=apart(m.params)[0], adapted=None)
  want = flatten_dict(with_adapter(plain, tmp_path / "gradients").params)
  for path, got in grads.items():
    close(got, want[path])
  pm.save_pretrained(tmp_path / "end")
  end = flatten_dict(model.load(tmp_path / "base", adapter=tmp_path / "end").params)
  got = flatten_dict(params)
  for path, leaf in end.items():
    if of_adapter(path):
      close(got[path], leaf)
  frozen = flatten_dict(apart(m.params)[0])
  assert all(np.array_equal(got[path], leaf) for path, leaf in frozen.items())
