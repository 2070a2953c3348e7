"""Runs `python -m jgpt <verb>`, the same as the console script `jgpt`; alone it lists the verbs."""

from __future__ import annotations

import sys

from jgpt.cli import main

sys.exit(main())
