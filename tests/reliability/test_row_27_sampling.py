"""Sampling at the ends of its settings, through the command: defined there, a clear error beyond.

`tests/test_generate.py` holds frequencies, filters and seeds of the functions to what they should
be.
"""

import pytest
from bad_input import Case, assert_refused, give, settings

from jgpt import sample

REFUSED = {
  ("--temperature", "-1"): "sample.temperature=-1.0 must be at least 0",
  ("--temperature", "nan"): "sample.temperature=nan must be a finite number",
  ("--temperature", "inf"): "sample.temperature=inf must be a finite number",
  ("--temperature", "1e7"): "sample.temperature=10000000.0 must be at most 1e6",
  ("--top-k", "-1"): "sample.top_k=-1 must be at least 0",
  ("--top-p", "1.0001"): "sample.top_p=1.0001 must be from 0 to 1",
  ("--top-p", "-0.1"): "sample.top_p=-0.1 must be from 0 to 1",
  ("--top-p", "nan"): "sample.top_p=nan must be a finite number",
  ("--num", "0"): "sample.num=0 must be at least 1",
  ("--num", "1000001"): "must be at most 1,000,000",
  ("--max-tokens", "0"): "sample.max_tokens=0 must be at least 1",
  ("--max-tokens", "2147483647"): "must be at most 100000000. Try --set sample.max_tokens=50000000",
  ("--seed", "-1"): "seed=-1 must be at least 0",
  ("--seed", "2147483648"): "must be below 2**31",
  ("--step", "7"): "no checkpoint of step 7",
  ("--temperature", "warm"): "--temperature: 'warm' must be a number",
  ("--top-k", "1.5"): "--top-k: '1.5' must be a whole number",
  ("--num", ""): "--num: '' must be a whole number",
}
DRAWN = {
  "plain": (),
  "again": (),
  "another seed": ("--seed", "1"),
  "all by 0": ("--top-k", "0"),
  "all by many": ("--top-k", "1000000"),
  "all by 1": ("--top-p", "1"),
  "greedy": ("--temperature", "0"),
  "greedy, another seed": ("--temperature", "0", "--seed", "1"),
  "almost greedy": ("--temperature", "1e-300"),
  "the best one": ("--top-k", "1"),
  "the least share": ("--top-p", "0"),
  "hot": ("--temperature", "1e6"),
}


@pytest.mark.slow
def test_row_27_sampling_at_and_beyond_the_ends_of_its_settings(tmp_path):
  train = [*settings("names", "sample.num=2"), "--steps", "20", "--workdir", "run"]
  cases = [*REFUSED, *DRAWN.values(), ("--num", "1"), ("--num", "1", "--max-tokens", "100")]
  given = [Case(argv=["sample", "--run", "run", *words]) for words in cases]
  trained, *outcomes = give([Case(argv=train), *given], cwd=tmp_path, JAX_PLATFORMS="cpu")
  assert trained.status == 0, trained
  for outcome, words in zip(outcomes, REFUSED.values(), strict=False):
    assert_refused(outcome, words)
  drawn = outcomes[len(REFUSED) :]
  assert [(outcome.status, outcome.err, outcome.left) for outcome in drawn] == [(0, "", [])] * len(
    drawn
  )
  *texts, one, long = [outcome.out for outcome in drawn]
  out = dict(zip(DRAWN, texts, strict=True))
  plain, greedy = out["plain"], out["greedy"]
  assert plain == out["again"] == out["all by 0"] == out["all by many"] == out["all by 1"]
  assert len({plain, greedy, out["another seed"], out["hot"]}) == 4
  assert (
    greedy
    == out["greedy, another seed"]
    == out["almost greedy"]
    == out["the best one"]
    == out["the least share"]
  )
  assert len(set(greedy.splitlines())) == 1 and len(greedy.splitlines()) == 2
  assert plain.startswith(one) and long.startswith(
    one[:-1]
  )  # fewer are the first of more; a longer one goes on


def test_row_27_a_terminal_is_shown_no_control_characters():
  """A stranger's tokenizer may have any: what moves the cursor or names the window is escaped."""
  assert sample.escape_controls("two\tlines\nand é") == "two\tlines\nand é"
  assert (
    sample.escape_controls("\x1b]0;owned\x07\rgone\x9b2K\x7f")
    == r"\x1b]0;owned\x07\rgone\x9b2K\x7f"
  )
