"""Which of these tests run where.

And children are started with limits set between fork and exec, which jax warns of.
"""

from pathlib import Path

import children
import pytest

# Of the slow ones here CI runs these; all others are exhaustive.
IN_CI = (
  "test_fuzz_10000_inputs",
  "test_row_03_a_long_run_killed_again_and_again[20]",
  "test_row_03_killed_at[leaf:5]",
  "test_row_03_killed_at[manifest:3]",
  "test_row_03_killed_at[deleting:3]",
  "test_row_03_killed_while_the_best_state_is_saved[",
  "test_row_04_a_signal_at[save]",
  "test_row_04_a_signal_at[call=evaluation.evaluate_heldout]",
  "test_row_04_a_signal_while_something_takes_long_is_heard_at_once[compile-term]",
  "test_row_04_a_signal_while_something_takes_long_is_heard_at_once[final evaluation-int]",
  "test_row_05_as_commands",
  "test_row_06_resume",
  "test_row_07_a_disk_that_is_full",
  "test_row_07_a_result_that_cannot_be_written",
  "test_row_10_a_second_writer_is_refused",
  "test_row_11_restored_on_another_mesh_the_leaves_are_the_same[2x2x2-1x1x1]",
  "test_row_11_restored_on_another_mesh_the_leaves_are_the_same[1x1x1-1x4x1]",
  "test_row_11_restored_on_another_mesh_the_leaves_are_the_same[2x2x2-4x1x2]",
  "test_row_11_any_reader_has_one_device",
  "test_row_11_a_run_goes_on_over_other_processes[fsdp]",
  "test_row_11_two_processes_save_and_restore",
  "test_row_12_options_of_jax_in_the_environment_change_no_bit",
  "test_row_13_a_run_that_gets_worse_keeps_its_best",
  "test_row_14_a_skipped_update_changes_nothing_but_step_and_rate[infinite loss]",
  "test_row_16_loss_and_gradients_are_one_whatever_the_way[documents, all at once]",
  "test_row_18_one_program_trains_and_one_evaluates",
  "test_row_23_a_folder_that_lost",
  "test_row_26_names_that_are_no_words",
  "test_row_28_every_transfer_is_explicit",
  "test_row_28_without_jit_the_plain_functions_train",
  "test_row_30_a_process_that[dies in a step]",
  "test_row_30_a_process_that[hangs in a step]",
  "test_row_30_a_process_that_never_starts[0",
  "test_row_31_an_end_that_is_caught_does_not_end_what_comes_next",
  "test_row_31_two_processes_train_as_one",
  "test_row_31_a_signal_to_one_process_ends_all[training]",
  "test_row_31_a_signal_to_one_process_ends_all[evaluating]",
  "test_row_31_an_error_of_one_process_is_shown_once",
  "test_the_tasks_of_srun_are_one_run",
  "test_mpirun_starts_one_run",
)
# Whole files that the default run, which is to take less than five minutes, leaves to CI.
SLOW_FILES = (
  "test_row_12_identity.py",
  "test_row_16_equalities.py",
  "test_row_20_sizes.py",
  "test_row_22_prompts.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    if Path(__file__).parent in item.path.parents:
      item.add_marker(pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"))
      if item.get_closest_marker("slow") and not item.name.startswith(IN_CI):
        item.add_marker(pytest.mark.exhaustive)
      if item.path.name in SLOW_FILES:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A folder with the texts that children train on."""
  folder = tmp_path_factory.mktemp("texts")
  children.write_texts(folder)
  return folder


@pytest.fixture(scope="module")
def expected(texts, request):
  """What the uninterrupted run of a module's `RUN` leaves."""
  children.train(*children.arguments("names", "straight", **request.module.RUN), cwd=texts)
  return children.bits(texts / "straight")
