"""Runs `python -m jgpt.doctor`."""

import sys

from jgpt.cli import guard
from jgpt.doctor import main

if __name__ == "__main__":
  sys.exit(guard(main))
