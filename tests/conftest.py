"""Eight simulated devices in every test process, and programs that are compiled quickly.

With JAX_PLATFORMS=cuda tests run on an NVIDIA GPU, as JAX compiles for it by default.
"""

import os

from tests.quick import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ.setdefault("WANDB_MODE", "offline")
