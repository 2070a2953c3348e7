"""The start and the end of a run's output: what is said about its settings, what is suggested."""

from jgpt.config import catalog
from jgpt.config.settings import change
from jgpt.report.summary import describe_widths


def test_the_ratio_of_the_mlps_width_is_said_where_it_is_not_four():
  """Changing `model.d_model` alone leaves `model.d_ff` behind; what is advised mends that."""
  names = catalog.load_experiment("names")
  assert describe_widths(names) == []
  wide = change(names, {"model.d_model": 48})
  ((_, line),) = describe_widths(wide)
  assert line.startswith("model.d_ff=64 is 1.33 times model.d_model=48;")
  assert line.endswith("--set model.d_ff=192")
  assert describe_widths(change(wide, {"model.d_ff": 192})) == []
