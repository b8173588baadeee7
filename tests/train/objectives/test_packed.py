"""Rows of several examples teach what the examples teach one by one."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.train.objectives import tasks

CASES = [
  ("seq2seq", "encoder_decoder", dict(label_smoothing=0.1, z_loss=0.01)),
  ("classification", "encoder", dict(problem="multi_label", label="labels")),
  ("pairs", "encoder", dict(token_types=2, pooling="mean", label_smoothing=0.1)),
  ("classification", "decoder", {}),
  ("tagging", "encoder", {}),
  ("span_qa", "encoder", dict(token_types=2, label_smoothing=0.1, z_loss=0.01)),
  ("contrastive", "encoder", dict(pooling="mean")),
  ("sft", "decoder", {}),
]
SLOW = [
  ("seq2seq", "decoder", {}),
  ("classification", "encoder", {}),
  ("classification", "encoder_decoder", {}),
  ("classification", "encoder_decoder", dict(problem="regression", label="number")),
  ("tagging", "decoder", dict(z_loss=0.01)),
  ("span_qa", "decoder", {}),
  ("contrastive", "decoder", {}),
  ("contrastive", "encoder_decoder", dict(negative=None)),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("objective", "shape", "changes"), CASES, ids=str)
def test_packed_equals_separate_in_loss_and_gradients(tmp_path, objective, shape, changes):
  tasks.write(tmp_path / "rows.jsonl", tasks.rows(12))
  config = tasks.config(tmp_path, objective, shape, **changes)
  packed, data, batch = tasks.epoch(config)
  apart = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
  separate, alone, single = tasks.epoch(apart)
  assert len(batch["tokens"]) < len(single["tokens"]) >= 12 and batch["segments"].max() > 1
  assert single["segments"].max() == 1
  assert data.tokens_per_epoch == alone.tokens_per_epoch
  params = tasks.fresh(packed)
  got, weight, means, grads = tasks.gradient(packed, params, batch)
  want, want_weight, want_means, want_grads = tasks.gradient(separate, params, single)
  assert weight == want_weight > 0 and np.isfinite(want) and want > 0
  np.testing.assert_allclose(got, want, rtol=2e-5)
  largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(want_grads))
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1.0, largest))
  jax.tree.map(same, means, want_means)
  jax.tree.map(same, grads, want_grads)
