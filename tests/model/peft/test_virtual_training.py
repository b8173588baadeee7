"""Virtual tokens learn as with torch PEFT: outputs, gradients and 20 steps from the same init."""

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import model
from model.peft.attach import apart
from model.peft.names import KEY
from model.peft.written import written_out
from tests.model.peft import theirs, theirs_virtual
from tests.model.peft.test_training import twenty_steps

CASES = [
  pytest.param(name, kind, marks=() if (name, kind) == ("llama", "lstm") else pytest.mark.slow)
  for name in ("llama", "gpt2", "bert", "t5")
  for kind in theirs_virtual.KINDS
  if name != "bert" or kind in ("prompt", "mlp", "lstm")  # PEFT gives an encoder no prefix.
]
STEPS, RATE = 20, 1e-2
LINEAR = {"mlp": {0: "in", 2: "mid", 4: "out"}, "lstm": {0: "in", 2: "out"},
          "projected": {0: "in", 2: "out"}}  # fmt: skip


def base_of(name, folder):
  if name != "bert":
    return theirs.base(name, folder)
  theirs.base(name, folder / "body")
  made = theirs.transformers.BertForSequenceClassification
  theirs.torch.manual_seed(3)
  base = made.from_pretrained(folder / "body", num_labels=3).eval()
  base.save_pretrained(folder)
  return base


def ours_of(tensors, kind, m):
  """Our parameters from arrays by their name in PEFT's prompt encoder; linear, so that it serves
  gradients.
  """
  a = {name: np.array(t.detach()) for name, t in tensors.items()}  # Not in torch's memory.
  cfg = m.config
  stack, last = cfg.stacks[0], cfg.stacks[-1]
  heads = (cfg.depth(last), 2, cfg.kv_heads, cfg.head_width)
  if kind == "prompt":
    return {(stack, KEY, "prompt"): a["embedding.weight"][: theirs_virtual.COUNT]}
  if kind == "prefix":
    table = a["embedding.weight"].reshape(-1, *heads)
    if cfg.shape == "encoder_decoder":
      return {(last, KEY, "table"): table}
    rows = np.moveaxis(table, 0, 2)
    path = (last, "layers", 0, "attn", KEY)
    return {(*path, f"prefix_{n}"): rows[:, i] for i, n in enumerate("kv")}
  out = {"table": a["embedding.weight"]}
  for number, own in LINEAR[kind].items():
    of = "transform" if kind == "projected" else "mlp_head"
    out[f"{own}_w"] = a[f"{of}.{number}.weight"].T
    out[f"{own}_b"] = a[f"{of}.{number}.bias"]
  if kind == "projected":
    out["out_w"], out["out_b"] = out["out_w"].reshape(-1, *heads), out["out_b"].reshape(heads)
    return {(last, KEY, name): leaf for name, leaf in out.items()}
  for layer in range(2 if kind == "lstm" else 0):
    for side, end in (("forward", ""), ("backward", "_reverse")):
      for own, other in (("read", "ih"), ("state", "hh")):
        name = f"lstm{layer}_{side}_{own}"
        out[f"{name}_w"] = a[f"lstm_head.weight_{other}_l{layer}{end}"].T
        out[f"{name}_b"] = a[f"lstm_head.bias_{other}_l{layer}{end}"]
  return {(stack, KEY, name): leaf for name, leaf in out.items()}


def targets(name):
  rng = np.random.default_rng(1)
  if name == "bert":
    return rng.integers(0, 3, 2)
  rows = theirs.tokens()
  return rng.integers(0, theirs.VOCAB, (rows[:, :5] if name == "t5" else rows).shape)


def trained_there(pm, name):
  """(gradients of the first step by name, losses); plain AdamW, virtual tokens only."""
  torch, encoder = theirs.torch, pm.prompt_encoder["default"]
  wanted = torch.tensor(targets(name)).flatten()
  optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE, weight_decay=0)
  first, losses = {}, []
  for step in range(STEPS):
    optimizer.zero_grad()
    logits = theirs_virtual.say(pm, name, grad=True)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted)
    loss.backward()
    if step == 0:
      first = {n: p.grad.clone() for n, p in encoder.named_parameters()}
    optimizer.step()
    losses.append(float(loss))
  return first, losses


def trained_here(m, name, moving):
  base = flatten_dict(apart(m.params)[0])
  more = dict(decoder_tokens=theirs.tokens()[:, :5]) if name == "t5" else {}

  def loss(moving):
    params = written_out(unflatten_dict(base | moving), m.config)
    logits = m.apply(params, theirs.tokens(), **more)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets(name)).mean()

  moving, first, losses = twenty_steps(loss, moving, RATE)
  return first, losses, moving


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_outputs_gradients_and_twenty_steps_equal_those_of_peft(tmp_path, name, kind):
  base = base_of(name, tmp_path / "base")
  # Behind an encoder PEFT lets a recurrent network write twice as many as it reads.
  stacks = dict(num_transformer_submodules=1) if kind not in ("prefix", "projected") else {}
  pm = theirs_virtual.adapted(base, theirs_virtual.config(name, kind, **stacks))
  pm.save_pretrained(tmp_path / "begin")
  m = model.load(tmp_path / "base", adapter=tmp_path / "begin")
  encoder = pm.prompt_encoder["default"]
  begin = ours_of(dict(encoder.named_parameters()), kind, m)
  want = written_out(unflatten_dict(flatten_dict(apart(m.params)[0]) | begin), m.config)
  jax.tree.map(close, want, m.params)
  close(theirs.ours(m, name), theirs_virtual.say(pm, name))
  their_grads, their_losses = trained_there(pm, name)
  grads, losses, moved = trained_here(m, name, begin)
  close(losses, their_losses)
  assert losses[-1] < losses[0] - 1e-3
  largest = max(np.abs(g).max() for g in grads.values())
  for path, other in ours_of(their_grads, kind, m).items():
    np.testing.assert_allclose(grads[path], other, rtol=1e-4, atol=1e-4 * largest)
  end = ours_of(dict(encoder.named_parameters()), kind, m)
  for path, leaf in moved.items():
    close(leaf, end[path])
