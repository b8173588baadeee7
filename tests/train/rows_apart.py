"""One of two processes whose devices hold rows that lie apart; ends with 0 if the batch is whole.

python -m tests.train.rows_apart TEXT CACHE
"""

import sys

import jax
import numpy as np

from model.sharding import make_mesh
from tests.train.test_run import CONFIG
from train.config import MeshConfig
from train.data.pipeline import load_data
from train.processes import joined, leave
from train.program import build_program, local_rows, put_batch
from train.resolve import resolved


def main(text: str, cache: str) -> None:
  with joined(60) as group:
    # Neighbours in `data` are devices of different processes, those in `tensor` of the same one.
    devices = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2).flatten()
    mesh = make_mesh(data=4, tensor=2, devices=devices)
    space: dict = {}
    exec(CONFIG.read_text(), space)
    config = space["get_config"]()
    config.batch_size, config.cache_dir, config.data.source = 4, cache, text
    config.mesh = MeshConfig(data=4, tensor=2)
    rows = local_rows(mesh, config.batch_size)
    data, whole = load_data(config, rows=rows, group=group), load_data(config)
    config = resolved(config, data)
    with jax.set_mesh(mesh):
      program = build_program(config, mesh)
      for step in range(3):
        batch, want = put_batch(program, data.batch(step)), whole.batch(step)
        for name, array in batch.items():
          for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[name][shard.index])
    print(f"process {group.index} built rows {rows.tolist()}", flush=True)
  leave(0)


if __name__ == "__main__":
  main(*sys.argv[1:])
