"""Makes the pictures of the README: `python notebooks/pictures/make.py [FOLDER]`.

    names.svg       the curves of the experiment `names`, as `python -m jgpt.plot` draws them
    attention.svg   what that run's four heads read in a name

It trains `names`, which takes seconds, in a folder that is deleted. The pictures that are committed
are of `names.txt`, which `JGPT_DATA_DIR` holds or jgpt downloads; the list of names that comes with
jgpt gives other curves. Needs the extra `plot`.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import jgpt
from jgpt import model
from jgpt.inspect.attention import draw_attention
from jgpt.inspect.predictions import label_token
from jgpt.report.figures import render_figure

NAME = "gabriella"
WIDTH, HEIGHT = 8.0, 2.75  # inches of the maps: their letters are legible where a README shows them


def make_pictures(folder: Path) -> None:
  """Makes the pictures in a folder, in place of those that are there."""
  with tempfile.TemporaryDirectory() as scratch:
    workdir = Path(scratch, "names")
    jgpt.train_run(jgpt.plan_run(jgpt.load_experiment("names"), workdir=workdir, name="names"))
    run, curves = jgpt.open_run(workdir), jgpt.plot_runs(workdir)
  (folder / "names.svg").write_bytes(render_figure(curves, ".svg"))
  ids = run.tokenizer.encode_document(NAME)[:-1]  # BOS and the letters
  found = jax.jit(model.trace, static_argnums=2)(run.params, jnp.asarray([ids]), run.experiment)
  labels = [label_token(token_id, run.tokenizer) for token_id in ids]
  attention = draw_attention(jax.device_get(found.attention_LBNTS[:, 0]), labels)
  attention.set_size_inches(WIDTH, HEIGHT)
  for ax in attention.axes:
    ax.tick_params(labelsize=7.5)  # BOS beside a letter
  (folder / "attention.svg").write_bytes(render_figure(attention, ".svg"))


if __name__ == "__main__":
  make_pictures(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
