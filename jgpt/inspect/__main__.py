"""Runs `python -m jgpt.inspect`."""

import sys

from jgpt.cli import guard
from jgpt.inspect import main

if __name__ == "__main__":
  sys.exit(guard(main))
