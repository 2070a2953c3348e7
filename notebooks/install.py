"""Installs jgpt where it is missing, and says what computes here. A cell of every notebook."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = ""  # your copy of jgpt: a folder, a wheel or "git+https://..."; empty looks for one

needed = ("jgpt", "jax", "flax", "optax", "orbax", "platformdirs", "rich", "uniplot")
wanted = [] if importlib.util.find_spec("matplotlib") else ["matplotlib"]
if not all(importlib.util.find_spec(name) for name in needed):
  folders = [path for path in (Path(".."), Path(), Path("jgpt")) if (path / "jgpt/cli.py").exists()]
  wheels = sorted(Path().glob("jgpt-*.whl"), key=os.path.getmtime, reverse=True)
  found = [Path(SOURCE).expanduser()] if SOURCE else [*folders, *wheels]
  if not found:
    raise FileNotFoundError(
      f"jgpt is not installed, and {Path.cwd()} has no wheel of it (jgpt-*.whl). Where you have jgpt's "
      "repository, `pip wheel --no-deps .` makes one. Upload it beside this notebook and run this "
      "cell again; or set SOURCE, above, to your own copy of the repository."
    )
  if "://" not in SOURCE and not found[0].exists():
    raise FileNotFoundError(f"SOURCE is {SOURCE!r}, and nothing is at {found[0].absolute()}")
  wanted.append(SOURCE if "://" in SOURCE else str(found[0].resolve()))
if wanted:
  pip = [sys.executable, "-m", "pip"]
  there = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True).stdout
  fixed = ("jax", "libtpu", "nvidia", "numpy", "scipy", "ml_dtypes", "ml-dtypes", "protobuf")
  kept = [package for package in there.splitlines() if package.startswith(fixed)]
  constraints = Path(tempfile.mkdtemp(), "constraints.txt")
  constraints.write_text("\n".join(kept))
  print("Installing", *wanted, "and keeping", *kept)
  command = [*pip, "install", "--constraint", str(constraints), *wanted]
  pip_run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if pip_run.returncode:
    lines = [line for line in pip_run.stdout.splitlines() if "already satisfied" not in line]
    raise RuntimeError(
      "\n".join(lines[-12:])
      + "\n\npip failed and installed nothing; its last lines are above. If they ask for another version of "
      "a package that is kept, this machine is too old for jgpt: choose a newer runtime. If pip found no "
      "package or no address, the machine has no network: switch it on (on Kaggle in Settings, Internet)."
    )
  importlib.invalidate_caches()

import jax

import jgpt
from jgpt.devices.compute import explain_products

devices = jax.devices()
precision = jax.config.jax_default_matmul_precision
print(f"jgpt      {jgpt.__version__}")
print(f"jax       {jax.__version__}")
print(f"devices   {len(devices)} × {devices[0].platform.upper()} ({devices[0].device_kind})")
print(f"products  {explain_products(devices[0].platform, devices[0].device_kind, precision)}")
