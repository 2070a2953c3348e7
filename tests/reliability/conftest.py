"""Children are started with limits and signal handlers set between fork and exec, which jax warns of."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
  for item in items:
    if Path(__file__).parent in item.path.parents:
      item.add_marker(pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"))
