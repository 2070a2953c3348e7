"""Attention as shades and as a figure, of maps that are made by hand."""

import numpy as np
import pytest

from jgpt.inspect.attention import draw_attention, format_attention, format_maps

# Of each shade a number on its lower bound or inside; above the diagonal what must not be shown.
MAP_TS = np.array(
  [[1.0, 9.0, 9.0, 9.0], [0.7, 0.3, 9.0, 9.0], [0.4, 0.55, 0.05, 9.0], [0.2, 0.01, 0.69, 0.1]]
)


def test_a_map_in_shades():
  """Every bound, both triangles, labels at the side and from top to bottom."""
  shown = format_maps([MAP_TS, MAP_TS], ["head 0", "head 1"], ["B", "a", "n", "e"])
  assert shown.split("\n") == [
    "  head 0     head 1",
    "  B a n e    B a n e",
    "B ██         ██",
    "a ██▒▒       ██▒▒",
    "n ▓▓▓▓░░     ▓▓▓▓░░",
    "e ▒▒· ▓▓░░   ▒▒· ▓▓░░",
  ]
  shown = format_maps([MAP_TS], ["x"], ["BOS", "a", "\\n", "verylongtoken"])
  assert shown.split("\n")[:9] == [
    "         x", "               v", "               e", "               r", "               y",
    "               l", "         B     o", "         O   \\ n", "         S a n …",
  ]  # fmt: skip
  assert shown.split("\n")[-1] == "verylon… ▒▒· ▓▓░░"


def test_maps_stand_side_by_side_as_the_width_allows():
  """A layer's heads follow each other; where two columns for a token are too many one is taken, and
  of longer texts the first tokens are shown.
  """
  weights = np.broadcast_to(MAP_TS, (2, 5, 4, 4))
  legend, *parts = format_attention(weights, [*"Bane"], first_layer=3).split("\n\n")
  assert "A row sums to 1:  · below 0.05  ░ to 0.2  ▒ to 0.4  ▓ to 0.7  █ to 1" in legend
  assert [part.split("\n")[0] for part in parts] == ["layer 3", "layer 4"]
  assert parts[0].split("\n")[1].split() == [w for i in range(5) for w in ("head", str(i))]
  narrow = format_attention(weights[:1], [*"Bane"], width=32).split("\n\n")[1:]
  assert len(narrow) == 2 and narrow[1].split("\n")[0].split() == ["head", "3", "head", "4"]
  assert max(len(line) for part in narrow for line in part.split("\n")) <= 32
  long = np.tril(np.ones((1, 40, 40)))
  one = format_maps(long, ["head 0"], ["t"] * 40, width=60)
  assert one.split("\n")[-1] == f"t {'█' * 40}" and "first" not in one
  assert format_maps(long, ["head 0"], ["t"] * 40, width=82).split("\n")[-1] == f"t {'█' * 80}"
  cut = format_maps(long, ["head 0"], ["t"] * 40, width=30).split("\n")
  assert cut[-3] == f"t {'█' * 28}" and cut[-1].startswith("the first 28 of 40 tokens")


def test_shades_of_a_long_text_are_relative_to_even_attention():
  """Row t reads t + 1 tokens, each with 1 / (t + 1) where attention is even: that has one shade in
  every row. Up to 20 tokens a shade is a probability.
  """
  for num_tokens in (20, 21, 300):
    rows = np.arange(1, num_tokens + 1)[:, None]
    weights = np.tril(np.ones((num_tokens, num_tokens))) / rows
    weights[-1, :10] = np.array([0.49, 0.51, 0.79, 0.81, 1.24, 1.26, 2.99, 3.01, 1, 0]) / num_tokens
    shown = format_attention(weights[None, None], ["t"] * num_tokens, width=2 + num_tokens)
    lines = [line[2:] for line in shown.split("\n") if line.startswith("t ")]
    assert len(lines) == num_tokens
    if num_tokens > 20:
      assert lines[:-1] == ["▒" * (t + 1) for t in range(num_tokens - 1)]
      assert lines[-1] == "·░░▒▒▓▓█▒·" + "▒" * (num_tokens - 10)
      assert "a row's n cells 1/n. In multiples of that:\n· below 0.5  ░ to 0.8  ▒ to 1.25" in shown
      assert "▓ to 3  █ more\n" in shown and "sums to 1" not in shown
    else:
      assert lines[0] == "█" and lines[-2] == "░" * 19 and lines[-1][:8] == "····░░░░"
      assert "A row sums to 1:" in shown and "1/n" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "heads"), [(1, 4), (1, 6), (2, 3), (12, 12)])
def test_a_figure_has_a_map_for_each_layer_and_head(layers, heads):
  """One scale from 0 to 1 for all; what comes later is masked; tokens at the edges."""
  rng = np.random.default_rng(0)
  weights = rng.uniform(size=(layers, heads, 4, 4))
  figure = draw_attention(weights, ["$x$", "a", "\\n", "verylongtoken"])
  figure.canvas.draw()  # lays it out; a label that is read as mathematics raises
  ax = figure.axes[0]
  titles = [f"layer {i}, head {j}" for i in range(layers) for j in range(heads)]
  assert [text.get_text() for text in ax.texts] == titles
  corners = set()
  for image, text, map_TS in zip(ax.images, ax.texts, weights.reshape(-1, 4, 4), strict=True):
    assert image.get_clim() == (0, 1)
    data = image.get_array()
    np.testing.assert_array_equal(data.mask, np.triu(np.ones((4, 4), bool), 1))
    np.testing.assert_array_equal(data.filled(0), np.tril(map_TS))
    left, right, bottom, top = image.get_extent()  # y grows downwards
    assert (right - left, bottom - top) == pytest.approx((1, 1))
    x, y = text.get_position()
    assert x == pytest.approx((left + right) / 2) and top - 0.1 < y < top
    corners.add((round(left, 6), round(top, 6)))
  assert len(corners) == layers * heads
  across = heads if layers > 1 else 4
  assert len({x for x, _ in corners}) == across and len({y for _, y in corners}) == max(
    layers, -(-heads // 4) if layers == 1 else 0
  )
  edge = [label.get_text() for label in ax.get_yticklabels()]
  assert edge[:4] == [r"\$x\$", "a", "\\n", "verylon…"]
  left, _, bottom, top = ax.images[0].get_extent()
  assert top < ax.get_yticks()[0] < ax.get_yticks()[3] < bottom
  width, height = figure.get_size_inches()
  assert 4 <= width <= 18 and 3 <= height <= 20


@pytest.mark.slow
def test_of_many_tokens_some_have_no_label():
  figure = draw_attention(np.tril(np.ones((1, 8, 300, 300))), ["t"] * 300)
  figure.canvas.draw()
  ax = figure.axes[0]
  sizes = {label.get_fontsize() for label in ax.get_xticklabels()}
  assert len(ax.get_xticks()) < 4 * 100 and min(sizes) >= 4
