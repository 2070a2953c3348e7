"""Reads a run: `python -m reader RUN DIGESTS` loads the newest checkpoint until there is a file
`over` beside DIGESTS.

It begins when there is one.

Prints, as JSON, the steps that it got and what went wrong. DIGESTS is JSON: step -> SHA-256 of the
token embedding.
"""

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

from jgpt.runs.open import open_run


def main(workdir: str, digests: str) -> None:
  expected, seen, errors = json.loads(Path(digests).read_text()), [], []
  over = Path(digests).with_name("over")

  while not list(Path(workdir).glob("checkpoints/*/manifest.json")):
    time.sleep(0.01)

  def read() -> None:
    while not over.exists():
      try:
        run = open_run(workdir)
      except Exception as error:
        errors.append(repr(error)[:300])
        continue
      if (
        hashlib.sha256(np.asarray(run.params["tok_embed"]).tobytes()).hexdigest()
        != expected[str(run.step)]
      ):
        errors.append(f"step {run.step} has other values")
      seen.append(run.step)

  threads = [threading.Thread(target=read) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  print(json.dumps({"seen": seen, "errors": errors}))


if __name__ == "__main__":
  main(*sys.argv[1:])
