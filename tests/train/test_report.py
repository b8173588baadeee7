"""What a run reports: FLOPs, metrics.jsonl across restarts, curves, events, W&B, progress."""

import dataclasses
import io
import itertools
import json
import math
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.errors import NON_FINITE, Stop
from model.flops import matmul_params, model_flops, visible_pairs
from model.hardware import peak_flops
from model.heads import abstract
from model.layers import param_info
from model.sharding import batch_sharding, make_mesh
from tests.train.tiny import MODELS, config
from train import report
from train.group import ALONE
from train.loop import run_steps
from train.metrics import MetricsLog, drop_after
from train.preemption import Preemption

GPT2 = ModelConfig(
  vocab_size=50_257, positions="learned", norm="layer", gated=False, activation="gelu_tanh",
  attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip


def program(cfg: ModelConfig):
  """The parts of a Program that are reported, without compiling a train step."""
  net, mesh = abstract(cfg), make_mesh(data=None, fsdp=1, tensor=1)
  params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  rows = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=batch_sharding(mesh))
  square = jax.jit(jnp.square).lower(jax.ShapeDtypeStruct((256,), np.float32)).compile()
  state = types.SimpleNamespace(params=params, frozen={})
  return types.SimpleNamespace(
    info=param_info(net), state=state, batch={"tokens": rows}, train_step=square,
  )  # fmt: skip


def metrics(step: int, loss: float | None = None) -> dict:
  loss = 3 / math.sqrt(step) if loss is None else loss
  values = dict(
    {"tokens.decoder": 100.0, "tokens.head": 100.0, "pairs.decoder.None": 850.0,
     "pairs.decoder.3": 300.0},
    loss=loss, learning_rate=1e-3 * min(1.0, step / 20), grad_norm=0.1,
  )  # fmt: skip
  bad = jnp.int32(0 if math.isfinite(loss) else 1)
  return {k: np.float32(v) for k, v in values.items()} | {"bad_steps": bad}


def run(workdir, cfg, start: int, end: int, validate: int = 10) -> MetricsLog:
  log = MetricsLog(workdir, cfg, program(cfg.model), start)
  for step in range(start + 1, end + 1):
    log.step(step, metrics(step))
    if step % validate == 0:
      with log.paused():
        log.validation(step, {"loss": 3.1 / math.sqrt(step)})
  return log


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def lasting(line: dict) -> dict:
  return {k: v for k, v in line.items() if k != "tokens_per_second"}


def test_gpt2_flops_equal_the_formula_by_hand():
  tokens, length = 8 * 1024, 1024
  matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50_257
  pairs = 8 * length * (length + 1) // 2
  by_hand = 6 * matrices * tokens + 12 * 3 * 2 * 2 * pairs * 768
  assert sum(matmul_params(GPT2).values()) == matrices
  assert visible_pairs(length, None, causal=True) * 8 == pairs
  counts = dict(decoder=tokens, head=tokens)
  assert model_flops(GPT2, counts, {"decoder.None": pairs}) == by_hand


def test_a_windowed_layer_and_an_expert_layer_cost_what_their_tokens_use():
  tiny = MODELS["rotary_gqa_windows"]
  position = np.arange(16)
  seen = {w: int(np.minimum(position + 1, w or 16).sum()) for w in (None, 3)}
  assert {w: visible_pairs(16, w, causal=True) for w in seen} == seen
  heads, D, F, V = 4 * 8, 16, 32, 61
  layer = D * heads * 2 + D * 16 * 2 + 3 * D * F
  want = 6 * 16 * (3 * layer + D * V) + 12 * heads * (2 * seen[3] + seen[None])
  pairs = {f"decoder.{w}": n for w, n in seen.items()}
  assert model_flops(tiny, dict(decoder=16, head=16), pairs) == want
  experts = MODELS["experts"]  # The second of three layers has 4 and a shared one: a token uses 3.
  assert sum(matmul_params(experts).values()) == 3 * layer + 2 * 3 * D * F + D * 4 + D + D * V
  shared = MODELS["shared_layers_narrow_tables_two_positions"]  # 4 layers, 2 sets, 8 of width 16.
  assert sum(matmul_params(shared).values()) == 4 * layer + 8 * D + D * 8 + 8 * V


def test_peaks_are_those_of_the_compute_dtype_and_unknown_devices_have_none():
  assert peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
  assert peak_flops("NVIDIA H200", jnp.float8_e4m3fn) == 1978.9e12
  assert peak_flops("TPU v5 lite", "float32") == peak_flops("TPU v5e", "bfloat16") == 197e12
  assert peak_flops("NVIDIA H200", "float64") is None
  assert peak_flops(jax.devices()[0].device_kind, "float32") is None


def test_a_resumed_run_writes_each_line_once_and_as_if_never_stopped(tmp_path):
  cfg = config(steps=60)
  never, killed = tmp_path / "never", tmp_path / "killed"
  for folder in (never, killed):
    folder.mkdir()
  run(never, cfg, 0, 60).close()
  run(killed, cfg, 0, 37).flush()  # Then killed: steps after the checkpoint at 20 are repeated.
  with (killed / "metrics.jsonl").open("a") as file:
    file.write('{"step": 38, "lo')
  run(killed, cfg, 20, 60).close()
  got, want = lines(killed), lines(never)
  assert [lasting(line) for line in got] == [lasting(line) for line in want]
  assert len(got) == 66 and got[3]["loss"] == float(str(np.float32(1.5))) and got[3]["mfu"] is None
  before = (killed / "metrics.jsonl").read_bytes()
  drop_after(killed / "metrics.jsonl", 60)
  assert (killed / "metrics.jsonl").read_bytes() == before


def test_events_of_a_resumed_run_hide_the_repeated_steps(tmp_path):
  proto = pytest.importorskip("tensorboardX.proto.event_pb2")
  cfg = config(steps=4)
  run(tmp_path, cfg, 0, 3, validate=2).close()
  run(tmp_path, cfg, 2, 4, validate=2).close()
  seen: list[tuple[int, str]] = []
  for file in sorted(tmp_path.glob("events.*"), key=lambda f: f.stat().st_mtime_ns):
    for event in events(file.read_bytes(), proto):
      if event.HasField("session_log"):  # What TensorBoard does at the start of a session.
        seen = [(step, tag) for step, tag in seen if step < event.step]
      seen += [(event.step, value.tag) for value in event.summary.value]
  losses = [step for step, tag in seen if tag == "loss"]
  assert losses == [1, 2, 3, 4] and (4, "validation_loss") in seen


def events(data: bytes, proto):
  """Records are: length (8 bytes), its checksum (4), payload, its checksum (4)."""
  at = 0
  while at < len(data):
    size = int.from_bytes(data[at : at + 8], "little")
    yield proto.Event.FromString(data[at + 12 : at + 12 + size])
    at += 16 + size


def test_lines_with_nan_are_valid_json_that_says_so(tmp_path):
  cfg = config(steps=2)
  log = MetricsLog(tmp_path, cfg, program(cfg.model), 0)
  log.step(1, metrics(1))
  log.step(2, metrics(2, loss=math.nan))
  log.close()
  strict = lambda text: json.loads(text, parse_constant=lambda name: pytest.fail(name))
  last = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
  assert last["loss"] is None and last["non_finite"] == {"loss": "nan"}
  assert log.bad_steps == 1 and log.last_finite["step"] == 1


@pytest.mark.parametrize(("late", "steps"), [(False, 50), (True, 50), (True, 4)])
def test_a_run_that_stays_non_finite_ends_and_names_the_last_step(
  tmp_path, monkeypatch, late, steps
):
  """Whether the metrics of a step are there at once or when the next one is under way."""
  cfg, made = config(steps=steps, max_bad_steps=3), program(ModelConfig(vocab_size=61))
  given = [metrics(1)]
  given += [metrics(n, math.nan) | {"bad_steps": jnp.int32(n - 1)} for n in range(2, 6)]
  made.train_step = lambda step, batch: (step + 1, given[step])
  monkeypatch.setattr(type(given[0]["bad_steps"]), "is_ready", lambda array: not late)
  data = types.SimpleNamespace(batches=lambda start: itertools.repeat({}))
  kept = types.SimpleNamespace(close=lambda: None)
  with Preemption(ALONE) as preemption, pytest.raises(Stop) as ended:
    run_steps(cfg, tmp_path, made, kept, data, preemption, 0, 0)  # pyright: ignore[reportArgumentType]
  assert ended.value.status == NON_FINITE
  assert "3 steps in a row, the last of them step 4, rows 8 to 31 of" in ended.value.message
  assert "last finite metrics: {'step': 1," in ended.value.message


def test_a_full_disk_is_an_error_where_events_are_written(tmp_path, monkeypatch):
  from tensorboardX import record_writer

  threads = threading.active_count()
  monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: PTH123, SIM115
  log = MetricsLog(tmp_path, config(steps=400), program(ModelConfig(vocab_size=61)), 0)
  assert threading.active_count() == threads  # One that wrote would end, and nobody would hear it.
  with pytest.raises(OSError, match="No space left on device"):
    for step in range(1, 401):
      log.step(step, metrics(step))
  with pytest.raises(OSError, match="No space left on device"):
    log.close()
  assert len(lines(tmp_path)) == step


def test_curves_are_a_png_of_a_run(tmp_path):
  run(tmp_path, config(steps=200), 0, 200).close()
  data = (tmp_path / "curves.png").read_bytes()
  assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
  width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
  assert width >= 800 and height >= 600 and len(data) > 10_000


def test_wandb_continues_one_offline_run(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  cfg = dataclasses.replace(config(steps=4), wandb_project="test")
  run(tmp_path, cfg, 0, 2).close()
  name = (tmp_path / "wandb_id").read_text()
  run(tmp_path, cfg, 2, 4).close()
  written = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
  assert (tmp_path / "wandb_id").read_text() == name and len(written) == 2
  assert all(file.stat().st_size > 0 for file in written)


def test_progress_is_one_line_on_a_terminal_and_few_lines_elsewhere():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  for stream in (Terminal(), io.StringIO()):
    now = iter(range(10_000))
    progress = report.Progress(100, 0, stream, clock=lambda now=now: float(next(now)))
    for step in range(1, 101):
      progress.step(step, 2.0, 12345.6, None)
    progress.validation(100, 2.5)
    progress.close()
    text = stream.getvalue()
    if stream.isatty():
      assert text.count("\n") == 1 and text.count("\r\x1b[K") == 102
      last = text.split("\r\x1b[K")[-1]
      assert "loss 2.0000  val 2.5000  12,346 tokens/s  0:00:00 left" in last and len(last) <= 80
    else:
      assert 5 < text.count("\n") < 30 and "\r" not in text and "\x1b" not in text
      *_, step, validation = text.splitlines()
      assert step == "step 100/100  loss 2.0000  12,346 tokens/s  0:00:00 left  unknown device"
      assert validation == "step 100/100  validation loss 2.5000"


def test_the_report_before_a_run_counts_every_parameter_once(capsys):
  cfg = config(dataclasses.replace(MODELS["experts"], vocab_multiple=128))
  data = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(vocab_size=61), rows_per_epoch=100, tokens_per_epoch=1600,
    validation_tokens=0, num_validation_batches=0, truncated_documents=0, truncated_tokens=0,
    dropped_documents=0,
  )  # fmt: skip
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  report.before(cfg, program(cfg.model), data, mesh, start=5)
  out, text = capsys.readouterr()
  assert not out
  rows = {line[2:20].strip(): line[20:].split() for line in text.splitlines() if "%" in line}
  count = lambda name: int(rows[name][0].replace(",", ""))
  parts = [count(name) for name in rows if name != "trained"]
  assert sum(parts) == count("trained") == cfg.model.num_params()
  assert count("token embedding") == 61 * 16 and rows["token embedding"][2:] == ["8.0", "KiB"]
  for part in ("learning_rate=0.01", "data=2 x fsdp=2 x tensor=2", "8 x 16 = 128 tokens",
               "unknown device", "5 of 50 done, continuing", "KiB a device"):  # fmt: skip
    assert part in text
