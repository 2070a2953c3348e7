"""A program of a user's own that trains in several processes: `python -m library_user COORDINATOR
NUMBER OF-PROCESSES FOLDER STEPS TIMEOUT`.

It starts them as jax documents it, and catches what `train_run` raises.
"""

import sys

import jax

import jgpt
from jgpt.config.settings import change
from jgpt.errors import TrainingError


def main() -> None:
  coordinator, number, of, folder, steps, timeout = sys.argv[1:]
  jax.distributed.initialize(coordinator, int(of), int(number))
  changes = {
    "data.path": "verse.txt",
    "data.batch_size": 4,
    "data.seq_len": 16,
    "model.max_seq_len": 16,
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.d_ff": 32,
    "train.steps": int(steps),
    "train.log_every": 1,
    "mesh.timeout_seconds": float(timeout),
    "optimizer.decay_steps": 100,
    "optimizer.warmup_steps": 5,
  }
  experiment = change(jgpt.load_experiment("shakespeare_bytes"), changes)
  try:
    result = jgpt.train_run(jgpt.plan_run(experiment, workdir=folder))
  except TrainingError as error:
    print(f"caught: {error}", flush=True)
    raise SystemExit(3) from None
  print(f"trained {result.step} steps, {len(result.losses)} losses", flush=True)


if __name__ == "__main__":
  main()
