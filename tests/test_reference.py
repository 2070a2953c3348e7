"""jgpt against an oracle that shares no code with it: scalar automatic differentiation, one float
at a time.
"""

import pytest
from equivalence import CPU, NAMES, check_gradients, check_training, names_experiment, options_of

from jgpt.devices.compute import resolve_compute

# The rate falls by 2% over the 20 updates compared, or all the way.
SCHEDULES = {"slow decay": 1000, "fast decay": 20}


def test_loss_and_every_gradient_entry_in_float64(x64):
  """Loss and gradient are the mathematical ones, for names that fit the context and names that are
  cut.

  At 1e-10 nothing hides behind rounding: an error in one term of one entry shows.
  """
  check_gradients(names_experiment(), "float64")


@pytest.mark.slow
def test_loss_and_every_gradient_entry_without_jit(x64):
  """What is compiled is what is written: run operation by operation, the loss and the gradient are
  the same.

  A disagreement of this test with the one above would be the compiler's, not the network's.
  """
  check_gradients(names_experiment(), "float64", jit=False, documents=(NAMES[0], NAMES[-1]))


@pytest.mark.parametrize("options", ["default", "shipped"])
def test_loss_and_every_gradient_entry_in_float32(options):
  """In the precision that training uses, loss and gradient are the mathematical ones up to
  float32's rounding.
  """
  experiment = names_experiment()
  if options == "shipped":
    experiment = resolve_compute(experiment, CPU)
  check_gradients(experiment, "float32", compiler_options=options_of(options))


@pytest.mark.parametrize("decay_steps", SCHEDULES.values(), ids=SCHEDULES)
def test_twenty_adam_steps_in_float64(x64, decay_steps):
  """Adam's bias corrections, its moments and the decaying rate are the textbook's: 20 updates end
  at the same place.

  One gradient would not tell them apart: an error in a moment or in the rate shows only from the
  second update on.
  """
  check_training(names_experiment(optimizer__decay_steps=decay_steps), "float64")


@pytest.mark.parametrize(
  ("schedule", "options"),
  [
    ("slow decay", "shipped"),
    pytest.param("fast decay", "default", marks=pytest.mark.slow),
  ],
)
def test_twenty_losses_in_float32(schedule, options):
  """The program that users run, in its precision and with its compiler options, follows the
  oracle's losses.
  """
  experiment = names_experiment(optimizer__decay_steps=SCHEDULES[schedule])
  if options == "shipped":
    experiment = resolve_compute(experiment, CPU)
  check_training(experiment, "float32", options_of(options))


def test_two_layers(x64):
  """Layers are applied in order and each gets its own gradient: with one layer, a mix-up of layers
  cannot show.
  """
  experiment = names_experiment(model__num_layers=2, optimizer__decay_steps=20)
  check_gradients(experiment, "float64", documents=NAMES[-1:])
  check_training(experiment, "float64")
