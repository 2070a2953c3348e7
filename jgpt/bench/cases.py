"""The cases of `bench`: what is measured, with which peers, and how often.

Each case is a function that adds to the results of a session; `cli.py` calls them by name. Timers
are in `timing.py`, `startup.py` and `rounds.py`, results in `results.py`. jax is imported when a
case runs, so that `--help` does not import it.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt.bench.results import (
  BANDWIDTH,
  OURS,
  OWN_SHAPES,
  SQUARE,
  Limit,
  Parts,
  Results,
  Row,
  Split,
  divide_rounds,
)
from jgpt.config import catalog
from jgpt.config.settings import change, experiment_to_json
from jgpt.devices import limits

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  import jax

  from jgpt.plan import Plan

SLOW_ROUNDS = 3  # at most, of whole commands
SAVING_STEPS = 6  # of GPT-2; they take longer than writing a checkpoint
NEW_TOKENS = 64  # in each text that GPT-2 draws


@dataclasses.dataclass(frozen=True)
class Session:
  """The arguments of a call, and its results so far.

  Attributes:
    rounds: that are counted.
    peers: "torch", "scalar", both or none.
    devices: those there are.
    results: cases add to it.
  """

  rounds: int
  peers: tuple[str, ...]
  devices: Sequence[jax.Device]
  results: Results


@dataclasses.dataclass(frozen=True)
class Training:
  """A training case.

  Attributes:
    label: name in the table.
    experiment: its name.
    changes: to its settings.
    steps: of jgpt in a round.
    peer_steps: of a torch peer in a round.
    scalar: whether plain Python is fast enough to take part, with three steps a round.
  """

  label: str
  experiment: str
  changes: dict[str, Any]
  steps: int
  peer_steps: int
  scalar: bool = False


FLOAT32, BFLOAT16 = {"compute.dtype": "float32"}, {"compute.dtype": "bfloat16"}
# Numbers of steps for which a round takes each contender 0.1 to 3 seconds.
TRAININGS = {
  "names": (
    Training("names, batch 1", "names", {"data.batch_size": 1}, 5000, 250, scalar=True),
    Training("names, batch 16", "names", {"data.batch_size": 16}, 3000, 250),
    Training("names, batch 64", "names", {"data.batch_size": 64}, 1000, 200),
  ),
  "shakespeare_char_cpu": (
    Training("shakespeare_char_cpu", "shakespeare_char_cpu", FLOAT32, 40, 40),
    Training("shakespeare_char_cpu, bf16", "shakespeare_char_cpu", BFLOAT16, 40, 40),
  ),
  "shakespeare_char": (
    Training(
      "shakespeare_char, batch 8", "shakespeare_char", FLOAT32 | {"data.batch_size": 8}, 3, 2
    ),
    Training(
      "shakespeare_char, no dropout",
      "shakespeare_char",
      FLOAT32 | {"data.batch_size": 8, "model.dropout": 0.0},
      3,
      2,
    ),
    Training(
      "shakespeare_char, bf16",
      "shakespeare_char",
      BFLOAT16 | {"data.batch_size": 8},
      3,
      2,
    ),
  ),
  "gpt2_shakespeare": (
    Training("gpt2_shakespeare, batch 4", "gpt2_shakespeare", FLOAT32, 2, 1),
    Training("gpt2_shakespeare, bf16", "gpt2_shakespeare", BFLOAT16, 2, 1),
  ),
}


# --- Training ---


def bench_training(session: Session, trainings: tuple[Training, ...]) -> None:
  """Times the steps of training cases, their parts, their matrix products, and peers."""
  import jax

  from jgpt.bench import timing

  if session.results.find_limit(SQUARE) is None:
    session.results.limits.append(
      Limit(SQUARE, timing.measure_square(max(3, session.rounds)), "FLOP/s")
    )
  for training in trainings:
    _bench_steps(session, training)
    gc.collect()
    # Sampling is the same program at every batch size, and compiling it counts for each.
    jax.clear_caches()


def _bench_steps(session: Session, training: Training) -> None:
  from jgpt.bench import timing
  from jgpt.bench.rounds import interleave, open_workers
  from jgpt.devices.compute import choose_step_options
  from jgpt.plan import plan_run

  changes = training.changes | {"mesh.data": 1}  # products and peaks are of one device too
  plan = plan_run(change(catalog.load_experiment(training.experiment), changes))
  model, data = plan.experiment.model, plan.experiment.data
  steps = timing.StepTimer(plan, session.devices)
  parts = timing.PartsTimer(steps)
  with (
    tempfile.TemporaryDirectory() as folder,
    open_workers(_training_peers(session, training, plan, folder)) as workers,
  ):
    live = {name: worker for name, worker in workers.items() if not isinstance(worker, str)}
    counts = [3 if name == "plain Python" else training.peer_steps for name in live]
    ours, *peers, divided = interleave(
      [steps, *live.values(), parts],
      [training.steps, *counts, max(1, training.steps // 2)],
      session.rounds,
    )
  seq_len = data.seq_len
  per_sample = float(plan.data.train.lengths.mean()) if plan.data.documents else seq_len
  tokens = data.batch_size * per_sample
  amounts = {
    "per": "step",
    "samples": data.batch_size if plan.data.documents else None,
    "tokens": tokens,
    "flops": tokens * limits.count_train_flops(model, seq_len),
  }
  own = Row(
    training.label,
    OURS,
    ours,
    compile_seconds=steps.compile_seconds,
    memory_bytes=steps.memory_bytes,
    **amounts,
  )
  forward, gradient, update = zip(*divided, strict=True)
  session.results.rows.extend(
    [own, *_peer_rows(own, amounts, workers, dict(zip(live, peers, strict=True)))]
  )
  session.results.parts.append(
    Parts(training.label, list(forward), list(gradient), list(update), own.median)
  )
  products = limits.list_products(model, data.batch_size, seq_len)
  rate = timing.measure_products(
    products,
    min(3, session.rounds),
    choose_step_options(timing.resolve_plan(plan, session.devices[0])),
  )
  session.results.limits.append(Limit(OWN_SHAPES, rate, "FLOP/s", training.label))


def _peer_rows(
  own: Row, amounts: dict, workers: dict, seconds: dict[str, list[float]]
) -> list[Row]:
  """Makes the rows of a case's peers, including those that cannot run here."""
  return [
    Row(own.case, name, seconds[name], ratios=divide_rounds(seconds[name], own.seconds), **amounts)
    if name in seconds
    else Row(own.case, name, [], reason=worker)
    for name, worker in workers.items()
  ]


def _training_peers(
  session: Session, training: Training, plan: Plan, folder: str
) -> dict[str, dict[str, Any]]:
  """Returns for each peer of a training case what to build, and writes its data to `folder`."""
  import numpy as np

  corpus = plan.data.train
  tokens = Path(folder) / "tokens.npz"
  np.savez(tokens, **{name: value for name, value in corpus._asdict().items() if value is not None})
  common = {"experiment": experiment_to_json(plan.experiment), "tokens": str(tokens)}
  specs = {}
  if "torch" in session.peers:
    warm_up = min(20, training.peer_steps)
    common_torch = common | {
      "kind": "torch",
      "platform": session.devices[0].platform,
      "warm_up": warm_up,
    }
    if plan.experiment.compute.dtype == "bfloat16":
      specs["torch, autocast"] = common_torch | {"compiled": False, "autocast": True}
      if session.devices[0].platform != "cpu":
        specs["compiled, autocast"] = common_torch | {"compiled": True, "autocast": True}
    else:
      specs |= {
        "torch": common_torch | {"compiled": False, "autocast": False},
        "torch.compile": common_torch | {"compiled": True, "autocast": False},
      }
  if "scalar" in session.peers and training.scalar:
    specs["plain Python"] = common | {"kind": "scalar", "warm_up": 1}
  return specs


# --- Sampling ---


def bench_sampling(session: Session) -> None:
  """Times drawing 1,000 names, and 1 and 16 texts of GPT-2 124M with random weights."""
  _bench_names_sampling(session)
  gc.collect()
  _bench_gpt2_sampling(session)


def _bench_names_sampling(session: Session) -> None:
  from jgpt.bench import timing
  from jgpt.bench.rounds import interleave
  from jgpt.plan import plan_run

  plan = plan_run(catalog.load_experiment("names"))
  steps = timing.StepTimer(plan, session.devices)
  state = steps.run(steps.donate_state(), plan.experiment.train.steps)
  sample = dataclasses.replace(plan.experiment.sample, num=1000)
  timer, compile_seconds = timing.make_sample_timer(state.params, plan, sample)
  [seconds] = interleave([timer], [10], session.rounds)
  session.results.rows.append(
    Row(
      "1,000 names, trained",
      OURS,
      seconds,
      per="call",
      samples=sample.num,
      compile_seconds=compile_seconds,
    )
  )


def _bench_gpt2_sampling(session: Session) -> None:
  import jax.numpy as jnp

  from jgpt.bench import timing
  from jgpt.bench.rounds import interleave, open_workers
  from jgpt.config import SampleConfig
  from jgpt.plan import plan_run

  plan = plan_run(catalog.load_experiment("gpt2_shakespeare"))
  plans = {
    dtype: dataclasses.replace(plan, experiment=change(plan.experiment, {"compute.dtype": dtype}))
    for dtype in ("float32", "bfloat16")
  }
  model, platform_name = plan.experiment.model, session.devices[0].platform
  params = timing.draw_params(plan, session.devices[0])
  bandwidth = timing.measure_bandwidth(max(3, session.rounds))
  session.results.limits.append(Limit(BANDWIDTH, bandwidth, "B/s"))
  for batch_size, (dtype, plan) in itertools.product((1, 16), plans.items()):
    sample = SampleConfig(num=batch_size, temperature=1.0, max_tokens=NEW_TOKENS)
    timer, compile_seconds = timing.make_sample_timer(params, plan, sample)
    spec = {
      "kind": "transformers",
      "experiment": experiment_to_json(plan.experiment),
      "platform": platform_name,
    }
    spec |= {"batch_size": batch_size, "new_tokens": NEW_TOKENS, "warm_up": 1}
    has_peer = "torch" in session.peers and dtype == "float32"
    with open_workers({"Transformers": spec} if has_peer else {}) as workers:
      live = {name: worker for name, worker in workers.items() if not isinstance(worker, str)}
      ours, *peers = interleave([timer, *live.values()], [1] * (1 + len(live)), session.rounds)
    amounts = {"per": "call", "samples": batch_size, "tokens": batch_size * NEW_TOKENS}
    own = Row(
      f"GPT-2 124M draws {batch_size} x {NEW_TOKENS}, {dtype}",
      OURS,
      ours,
      compile_seconds=compile_seconds,
      **amounts,
    )
    session.results.rows.extend(
      [own, *_peer_rows(own, amounts, workers, dict(zip(live, peers, strict=True)))]
    )
    # The first token is drawn with one position in the cache, the last with 64.
    context = (1 + NEW_TOKENS) / 2
    size = jnp.dtype(dtype).itemsize
    most = limits.compute_decoding_limit(model, batch_size, context, bandwidth, size)
    reached = own.rate(own.tokens) / most
    session.results.limits.append(Limit("decoding by memory", most, "tokens/s", own.case, reached))


# --- Start-up ---


def bench_startup(session: Session) -> None:
  """Times `run --help`, and a run with an empty and with a filled compilation cache."""
  from jgpt.bench import startup
  from jgpt.data.sources import find_text, get_source

  experiment = catalog.load_experiment("names")
  text, filename = find_text(experiment.data).text, get_source(experiment.data.source).filename
  helps, splits = [], {"nothing compiled yet": [], "compilations cached": []}
  with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "data"
    data.mkdir()
    (data / filename).write_text(text, encoding="utf-8", newline="\n")
    for i in range(min(session.rounds, SLOW_ROUNDS)):
      env = {"JGPT_DATA_DIR": str(data), "JGPT_CACHE_DIR": f"{folder}/cache{i}"}
      helps.append(startup.time_command(["--help"], env))
      for name, found in splits.items():
        workdir = f"{folder}/{name.replace(' ', '-')}{i}"
        found.append(startup.split_command(["--experiment", "names", "--workdir", workdir], env))
  session.results.rows.append(Row("run --help", OURS, helps))
  for name, found in splits.items():
    case = f"run names, {name}"
    session.results.rows.append(Row(case, OURS, [sum(parts.values()) for parts in found]))
    session.results.splits.append(
      Split(case, {part: [parts[part] for parts in found] for part in startup.STARTUP_PARTS})
    )


# --- Weights ---


def bench_weights(session: Session) -> None:
  """Times reading and writing random weights of GPT-2 124M, for Hugging Face and for llm.c.

  Needs 1 GB of disk.
  """
  import jax
  import numpy as np

  from jgpt.config.settings import resolve
  from jgpt.model import init_params
  from jgpt.weights import hugging_face, llmc
  from jgpt.weights.initial import load_params, open_weights

  config = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257).model
  params = jax.tree.map(
    np.asarray, jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
  )
  writers = {
    "model.safetensors": lambda path: hugging_face.write_safetensors(
      path, hugging_face.to_tensors(params, config), "float32"
    ),
    "gpt2_124M.bin": lambda path: llmc.write_weights(path, params, config, "float32"),
  }
  rows = {
    (verb, name): Row(f"{verb} GPT-2 124M, {name}", OURS, [])
    for name in writers
    for verb in ("write", "read")
  }
  with tempfile.TemporaryDirectory() as folder:
    for _ in range(session.rounds):
      for name, write in writers.items():
        path = Path(folder) / name
        began = time.perf_counter()
        write(path)
        written = time.perf_counter()
        load_params(open_weights(str(path)), config)
        rows["write", name].seconds.append(written - began)
        rows["read", name].seconds.append(time.perf_counter() - written)
  session.results.rows.extend(rows.values())


# --- Checkpoints ---


def bench_saving(session: Session) -> None:
  """Times steps of GPT-2 124M with and without a checkpoint written in the background.

  Needs 3 GB of disk.
  """
  from jgpt.bench import timing
  from jgpt.plan import plan_run
  from jgpt.runs import checkpoint
  from jgpt.runs.folder import RunFiles, write_run_files

  plan = plan_run(change(catalog.load_experiment("gpt2_shakespeare"), {"mesh.data": 1}))
  found = {
    "kind": plan.data.text.kind,
    "location": plan.data.text.location,
    "sha256": plan.data.text.sha256,
  }
  with tempfile.TemporaryDirectory() as folder:
    write_run_files(Path(folder), RunFiles("saving", plan.experiment, plan.data.tokenizer, found))
    with checkpoint.open_checkpoints(Path(folder), keep_latest=1) as manager:
      timer = timing.SaveTimer(timing.StepTimer(plan, session.devices), manager)
      plain, saving, waited = zip(
        *(timer(SAVING_STEPS) for _ in range(min(session.rounds, SLOW_ROUNDS))), strict=True
      )
  added = [b - a for a, b in zip(plain, saving, strict=True)]
  case = f"GPT-2 124M, {SAVING_STEPS} steps"
  session.results.rows.append(Row(case, OURS, list(plain)))
  session.results.rows.append(Row(f"{case} and a save meanwhile", OURS, list(saving)))
  share = statistics.median(
    a / (a + 100 / SAVING_STEPS * p) for a, p in zip(added, plain, strict=True)
  )
  session.results.rows.append(
    Row(f"what a save adds ({share:.1%} of the time, every 100 steps)", OURS, added)
  )
  session.results.rows.append(Row("of that, the loop stands still", OURS, list(waited)))


CASES: dict[str, Callable[[Session], None]] = {
  **{
    name: lambda session, cases=cases: bench_training(session, cases)
    for name, cases in TRAININGS.items()
  },
  "sampling": bench_sampling,
  "startup": bench_startup,
  "weights": bench_weights,
  "saving": bench_saving,
}
