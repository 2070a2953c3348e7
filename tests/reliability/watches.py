"""A program of a user's own whose processes watch each other several times, each ended otherwise:
`python -m watches COORDINATOR NUMBER`. No device is used.
"""

import sys
import time

import jax
from jax._src import distributed

from jgpt.devices import processes, watch
from jgpt.errors import TrainingError
from jgpt.system.signals import Stop

EXCHANGES = 500


def main() -> None:
  coordinator, number = sys.argv[1], int(sys.argv[2])
  jax.distributed.initialize(coordinator, 2, number)
  stop = Stop()
  with watch.watching(stop, seconds=20):
    for i in range(EXCHANGES):
      assert processes.decide("a number", i + 1000 * number) == i
    stop.signal = 15 if number else None
    time.sleep(1.5)  # until it is told, and what all have passed is deleted
    keys = len(distributed.global_state.client.key_value_dir_get("jgpt/"))
    print(f"signal {stop.signal}, {keys} keys", flush=True)
  for error in (LookupError("nothing there"), KeyboardInterrupt()):
    try:
      with watch.watching(None, seconds=20):
        if number:
          raise error
        processes.together("what never comes", lambda: None)
    except (LookupError, TrainingError, KeyboardInterrupt) as caught:
      print(f"caught {type(caught).__name__} {caught}", flush=True)
  stop = Stop()
  with watch.watching(stop, seconds=20):
    time.sleep(0.6)  # until news would have come
    assert processes.together("the numbers", lambda: number) == [0, 1] and stop.signal is None
  print("the end", flush=True)


if __name__ == "__main__":
  main()
