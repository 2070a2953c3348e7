"""One of the two processes of a test: `python -m peer FUNCTION ADDRESS ID WORKDIR`.

It has one device. What it finds is printed as one JSON object. The tests are in
`test_row_11_processes.py`.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jgpt import sharding
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices import processes
from jgpt.errors import UserError
from jgpt.keys import INIT, derive_key
from jgpt.runs import checkpoint
from jgpt.runs.manifest import list_steps
from jgpt.step import init_state

# Parameters and moments of 512 MB.
LARGE = {
  "model.d_model": 1088,
  "model.num_layers": 3,
  "model.num_heads": 2,
  "model.d_ff": 4 * 1088,
}
SIZES = {
  "data.batch_size": 8,
  "model.d_model": 32,
  "model.num_layers": 2,
  "model.num_heads": 2,
  "model.d_ff": 64,
}


def make_experiment(sizes=SIZES, **mesh):
  experiment = change(load_experiment("names"), SIZES | sizes)
  return resolve(change(experiment, {f"mesh.{name}": n for name, n in mesh.items()}), 27)


def shape_state(experiment, devices, *, layers="scan"):
  """Shapes of a state with shardings, and what draws it from a key."""
  mesh = sharding.make_mesh(experiment, devices)
  key = sharding.place(derive_key(0, INIT), sharding.replicated(mesh))

  def draw(key):
    return sharding.arrange_blocks(init_state(key, experiment), layers)

  shapes = jax.eval_shape(draw, key)
  shardings = sharding.state_shardings(shapes, experiment.model, mesh)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return shapes, lambda: jax.jit(draw, out_shardings=shardings)(key)


def with_step(state, step):
  return state.replace(step=sharding.place(np.int32(step), state.step.sharding))


def try_to(function):
  """What an error says, and after how many seconds it came."""
  began = time.monotonic()
  try:
    function()
  except UserError as error:
    return [type(error).__name__, str(error), time.monotonic() - began]
  return None


def digest(state):
  items = {"params": state.params, "opt_state": state.opt_state}
  return {name: checkpoint.format_digest(x[0]) for name, x in checkpoint.survey(items).items()}


def save_and_restore(workdir: Path) -> dict:
  found = {}
  me = jax.process_index()
  _, draw = shape_state(make_experiment(fsdp=2), jax.devices(), layers="unroll")
  stacked, _ = shape_state(make_experiment(fsdp=2), jax.devices())
  state = draw()
  found["whole"] = sum(x.nbytes for x in jax.tree.leaves(state))
  found["here"] = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)

  def save(state, step):
    with checkpoint.open_checkpoints(workdir, keep_latest=9) as manager:
      checkpoint.save_checkpoint(manager, with_step(state, step))
    return manager.steps

  found["steps"] = save(state, 1)
  found["digests"] = digest(checkpoint.restore(workdir / "checkpoints" / "1", stacked))

  # A disk that is full for one process.
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  if me == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  found["full"] = try_to(lambda: save(state, 2))
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  found["after full"] = processes.on_lead("the steps", lambda: list_steps(workdir))
  found["again"] = save(state, 2)

  # A number that is not finite, in one process's part.
  bad = jnp.where(jnp.arange(32)[None] == 31, jnp.nan, state.params["tok_embed"])
  found["not finite"] = try_to(
    lambda: save(state.replace(params=state.params | {"tok_embed": bad}), 3)
  )

  # A checkpoint of one process, and one that lacks what only the other process reads.
  found["restored"] = digest(checkpoint.restore(workdir / "one" / "checkpoints" / "7", stacked))
  if me == 0:
    shutil.rmtree(workdir / "checkpoints" / "2" / "params" / "ocdbt.process_1")
  processes.together("the damage", lambda: None)
  found["damaged"] = try_to(lambda: checkpoint.restore(workdir / "checkpoints" / "2", stacked))
  return found


class Peak:
  """The most memory that this process has had since this was made, over what it had then."""

  def __init__(self):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest size so far
    self._before = self.read("VmRSS")

  def read(self, name: str = "VmHWM") -> int:
    """Bytes of an entry of the kernel's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

  def measure(self) -> int:
    return self.read() - self._before


def measure_memory(workdir: Path) -> dict:
  """What making, saving and restoring a large state takes in this process."""
  found = {}
  for layers in ("scan", "unroll"):
    experiment = make_experiment(LARGE, fsdp=2)
    _, draw = shape_state(experiment, jax.devices(), layers=layers)
    peak = Peak()
    state = jax.block_until_ready(draw())
    found |= {
      "whole": sum(x.nbytes for x in jax.tree.leaves(state)),
      "here": sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards),
      f"{layers}: making": peak.measure(),
    }
    peak = Peak()
    with checkpoint.open_checkpoints(workdir, keep_latest=1) as manager:
      checkpoint.save_checkpoint(manager, with_step(state, 1 + len(found)))
    found[f"{layers}: saving"] = peak.measure()
    del state
  stacked, _ = shape_state(experiment, jax.devices())
  peak = Peak()
  jax.block_until_ready(
    checkpoint.restore(workdir / "checkpoints" / str(manager.steps[-1]), stacked)
  )
  return found | {"restoring": peak.measure()}


def main(function: str, address: str, number: str, workdir: str) -> None:
  jax.config.update("jax_num_cpu_devices", 1)
  jax.distributed.initialize(address, 2, int(number))
  processes.set_timeout(60)
  print(json.dumps(globals()[function](Path(workdir))), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
