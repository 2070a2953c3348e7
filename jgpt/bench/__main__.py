"""Runs `python -m jgpt.bench`."""

import sys

from jgpt.bench import main
from jgpt.cli import guard

if __name__ == "__main__":
  sys.exit(guard(main))
