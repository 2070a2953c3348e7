"""A run's programs: traced from shapes, for any devices, and compiled before they are called."""

import jax
import pytest
import small_runs

from jgpt import generate, program
from jgpt.bench import hlo
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.evaluation import begin_evaluation, finish_evaluation
from jgpt.params import count_params
from jgpt.plan import plan_run
from jgpt.runs import checkpoint
from jgpt.runs.folder import RunFiles, write_run_files


def test_every_program_is_traced_from_shapes():
  """For eight devices and for one; nothing is computed, and no device has to be free."""
  changes = {"data.batch_size": 16, "mesh.data": -1, "train.eval_batches": 1}
  experiment = resolve(change(load_experiment("names"), changes), 27)
  programs = program.lower_programs(experiment, jax.devices(), 17 * 1000, num_heldout=17 * 600)
  names = ["init", "steps", "save", "sampling", "evaluation", "evaluation of 1 batches"]
  assert list(programs) == names
  for name, lowered in programs.items():
    text = lowered.as_text()
    assert "num_partitions = 8 " in text, name
    assert ("all_reduce" in text) == (name == "steps" or name.startswith("evaluation")), name
  (corpus, *_) = jax.tree.leaves(programs["steps"].args_info)
  assert corpus.shape == (1000, 17)
  experiment = change(experiment, {"model.num_layers": 2, "mesh.data": 1})
  programs = program.lower_programs(experiment, jax.devices()[3:], 17 * 50, num_heldout=0)
  assert list(programs) == ["init", "steps", "save", "stack", "sampling"]


@pytest.mark.slow
def test_programs_are_compiled_before_they_are_called(tmp_path, monkeypatch):
  """What `compile_program` traced is what a step, an evaluation, samples and a save call."""
  monkeypatch.setattr(program, "choose_step_options", lambda experiment: small_runs.QUICK)
  changes = {"data.batch_size": 8, "mesh.data": -1, "model.num_layers": 2}
  changes["train.eval_batches"] = 1
  plan = plan_run(change(load_experiment("names"), changes))
  found = {"kind": "", "location": "", "sha256": ""}
  write_run_files(tmp_path, RunFiles("names", plan.experiment, plan.data.tokenizer, found))
  compiled = []

  def listen(event, seconds, **kwargs):
    if event.endswith("/backend_compile_duration"):
      compiled.append(kwargs["fun_name"])

  with checkpoint.open_checkpoints(tmp_path, keep_latest=1) as manager:
    made = program.compile_program(plan.experiment, jax.devices()[:2], plan.data, manager=manager)
    assert len(made.heldout.tokens.sharding.device_set) == 2
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      state, _ = made.advance(made.state, 0, 1)
      for num_batches in (None, 1):
        finish_evaluation(
          begin_evaluation(state.params, made.heldout, made.experiment, num_batches)
        )
      generate.sample_texts(state.params, plan.data.tokenizer, 0, made.experiment)
      checkpoint.save_checkpoint(manager, state)
    finally:
      jax.monitoring.clear_event_listeners()
  ours = ("run_steps", "evaluate", "generate", "stack_blocks", "survey_leaves")
  assert not {f"jit({name})" for name in ours}.intersection(compiled)


SMALL = {
  "model.num_layers": 2,
  "model.max_seq_len": 24,
  "data.seq_len": 24,
  "data.batch_size": 80,
  "mesh.data": -1,
}
PLACES = ("embedding", "attention", "attention_out", "activation", "mlp_out")
DROPOUT = {"model.dropout": 0.1, "model.dropout_places": PLACES}
DIVIDED = {
  "a stream": ("shakespeare_bytes", {}),
  "micro-batches": ("shakespeare_bytes", {"train.micro_batch_size": 16, **DROPOUT}),
  "documents": ("names", {"train.micro_batch_size": 40, **DROPOUT}),
  "a loop over layers": ("shakespeare_bytes", {"compute.layers": "scan"}),
  "saving memory": ("shakespeare_bytes", {"compute.remat": "block", "compute.loss_chunks": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DIVIDED)
def test_gradients_are_summed_once_and_no_device_has_the_whole_batch(case, monkeypatch):
  """On 8 CPUs: as many bytes as the parameters have, outside of every loop but that over steps."""
  name, changes = DIVIDED[case]
  monkeypatch.setattr(program, "choose_step_options", lambda experiment: small_runs.QUICK)
  experiment = resolve(change(load_experiment(name), SMALL | changes), 256)
  names = ("steps", "evaluation")
  programs = program.lower_programs(experiment, jax.devices(), 25 * 400, names=names)
  modules = {n: hlo.parse_module(x.compile().as_text()) for n, x in programs.items()}
  collectives = hlo.find_collectives(modules["steps"])
  expected = 4 * count_params(experiment.model)
  assert expected <= sum(c.num_bytes for c in collectives) <= 1.02 * expected
  assert all(c.kind == "all-reduce" and len(c.loops) == 1 for c in collectives)
  for found, module in modules.items():
    assert hlo.find_arrays_of_batch(module, 80, 24) == [], found
