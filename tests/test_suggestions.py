"""What commands suggest works as it is printed: lines under "next:", and what errors say to try.

Names of settings and options are jgpt's, a shell gets the words that are meant, and the next error,
if any, is about something else. The commands' own tests follow more of them: `test_settings.py`
those of settings that do not go together, `test_preparation.py` and `test_commands.py` the lines
under "next:".
"""

import argparse
import ast
import re
import shlex
from pathlib import Path
from unittest import mock

import jax
import pytest

import jgpt
from jgpt import cli, export, run, sample
from jgpt.config import catalog
from jgpt.config.settings import change, is_circumstance, parse_setting, setting_names
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.report import summary
from jgpt.report.summary import choose_prompt, format_command
from jgpt.sharding import make_mesh
from jgpt.system.command import python_command
from jgpt.text.tokenizer import ByteTokenizer, train_char_tokenizer

ROOT = Path(jgpt.__file__).parent
HOLE = "\0"  # in place of a value that is computed
OPTIONS = {
  *("--prompt", "--out", "--run", "--step", "--heldout-tokens", "--text", "--experiment"),
  *("--workdir", "--init-from", "--continue-from", "--data", "--fresh", "--part", "--set"),
  *("--profile", "--layer", "--x", "--mesh", "--aot"),
}
STEPS = ["--steps", "3"]


def texts_of(path):
  """The strings of a file, with holes for what is computed."""
  inside = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.JoinedStr):
      inside |= {id(part) for part in ast.walk(node)} - {id(node)}
      parts = [v.value if isinstance(v, ast.Constant) else HOLE for v in node.values]
      yield node.lineno, "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
      yield node.lineno, node.value


def suggestions():
  """Every "Try" and "try" of jgpt that gives options: where, and the words."""
  found = []
  for path in ROOT.rglob("*.py"):
    for line, text in texts_of(path):
      for words in re.findall(r"[Tt]ry (--.*)", text):
        found.append((f"{path.relative_to(ROOT.parent)}:{line}", words))
  return found


SUGGESTIONS = suggestions()


def test_there_are_suggestions():
  assert len(SUGGESTIONS) > 25


@pytest.mark.parametrize(("place", "words"), SUGGESTIONS)
def test_what_is_to_be_tried_has_jgpts_names_and_no_placeholder(place, words):
  """FILE, NAME or "..." after "Try" would be pasted as they are."""
  for name, value in re.findall(r"--set '?([\w.]+)=([^\s,;]*)", words):
    assert name in setting_names(), place
    if value and HOLE not in value:
      parse_setting(f"{name}={value.rstrip('.')}")
    assert "..." not in value and not re.fullmatch(r"[A-Z]{2,}", value), place
  for option, value in re.findall(r"(--[a-z][a-z-]*) ?([A-Z]{2,}\b)?", words):
    assert option in OPTIONS and not value, place


# --- Errors of a plan ---


def advised(error):
  """The words of the first alternative after "Try", as a shell splits them."""
  tried = re.search(r"[Tt]ry (?:a longer text, or )?(--.*)", str(error))
  assert tried, error
  return shlex.split(re.split(r",? or (?:for a new run )?--|, or ", tried[1])[0])


def follow(name, changes, needed=1):
  """Plans a run, and adds what each error says to try until there is none; returns that."""
  changes, added = dict(changes), []
  for _ in range(4):
    try:
      plan_run(change(catalog.load_experiment(name), changes))
      break
    except UserError as error:
      words = advised(error)
      assert words[::2] == ["--set"] * (len(words) // 2)
      changes |= dict(parse_setting(word) for word in words[1::2])
      added += words[1::2]
  else:
    pytest.fail(f"{added} did not help")
  assert len(added) >= needed
  return added


BYTES = "shakespeare_bytes"


@pytest.mark.parametrize(
  ("name", "files", "changes"),
  [
    ("names", {"a.txt": "one\n"}, {"data.heldout_fraction": 0.9999}),
    ("names", {}, {"data.source": "names", "data.path": ""}),
    ("names", {}, {"model.vocab_size": 20}),
    ("names", {}, {"sample.prompt": "Zoë"}),
    ("names", {"it's/x.md": "one\ntwo\n"}, {"data.path": "it's"}),
    (BYTES, {"a.txt": "To be, or not to be? " * 9}, {"data.path": "a.txt", "data.seq_len": 64}),
    (BYTES, {}, {"data.batch_size": 2**27}),
    (
      BYTES,
      {"a.txt": "To be, or not to be? " * 9},
      {"data.path": "a.txt", "data.heldout_fraction": 0.0, "data.heldout_tokens": 185},
    ),
    ("shakespeare_char_cpu", {"a.txt": "abcdef " * 99}, {"data.path": "a.txt"}),
    ("text", {"a.txt": "abab " * 500}, {"data.path": "a.txt", "model.d_model": 130}),
  ],
)
def test_what_an_error_says_to_try_leads_to_a_plan(folder, name, files, changes):
  folder(files)
  if name == "names" and "a.txt" in files:
    changes = changes | {"data.path": "a.txt"}
  follow(name, changes)


@pytest.mark.parametrize("num_devices", [3, 5, 7, 8])
def test_a_batch_that_devices_do_not_divide_is_mended_by_what_a_resumed_run_may_change(num_devices):
  """The batch size is part of a run's identity; the number of devices is not."""
  plan = plan_run(change(catalog.load_experiment("names"), {"data.batch_size": 20}))
  devices = jax.devices()[:num_devices]
  experiment = change(plan.experiment, {"mesh.data": -1})
  if 20 % num_devices == 0:
    make_mesh(experiment, devices)
    return
  with pytest.raises(UserError) as error:
    make_mesh(experiment, devices)
  ((name, value),) = [parse_setting(word) for word in advised(error.value)[1::2]]
  assert is_circumstance(name)
  assert make_mesh(change(experiment, {name: value}), devices).size == value > 1
  other = re.search(r"for a new run --set (\S+)", str(error.value))[1]
  make_mesh(change(experiment, dict([parse_setting(other)])), devices)


@pytest.mark.parametrize("out", ["weights", "my weights", "it's"])
def test_a_name_for_an_exported_file_is_one(out, folder):
  folder({})
  with pytest.raises(UserError, match=r"must be a file ending in \.bin") as error:
    export.main(["--run", "r", "--format", "llmc", "--out", out])
  with pytest.raises(UserError, match="not a run folder"):  # the next thing that is wrong
    export.main(["--run", "r", "--format", "llmc", *advised(error.value)])


# --- Prompts, and the lines under "next:" ---

CHARS = train_char_tokenizer(["abc 'x-é\n"], bos=False)


@pytest.mark.parametrize(
  ("texts", "tokenizer", "encoding", "prompt"),
  [
    (["\ufffd\ufffda", "be"], ByteTokenizer(), "utf-8", "be"),
    (["\ufffd"], ByteTokenizer(), "utf-8", ""),
    (["\x1b[2J", "a\tb", "a\nb", "a b"], ByteTokenizer(), "utf-8", "a b"),
    (["", "-x 'a"], CHARS, "utf-8", "-x 'a"),
    (["Zoë", "ab"], CHARS, "utf-8", "ab"),
    (["é", "b"], CHARS, "ascii", "b"),
    (["é", "b"], CHARS, "latin-1", "é"),
    ([], CHARS, "utf-8", ""),
  ],
)
def test_a_prompt_that_is_suggested_can_be_pasted(texts, tokenizer, encoding, prompt):
  assert choose_prompt(texts, tokenizer, encoding) == prompt


@pytest.mark.parametrize(
  ("name", "changes", "texts"),
  [
    ("names", {"optimizer.peak_lr": 0.02}, ["", "al"]),
    (BYTES, {"sample.prompt": "it's -- \u00e9"}, ["\ufffd"]),
    (
      BYTES,
      {"data.path": "my text.txt", "sample.prompt": ""},
      ["\ufffd\x00", "--help", "$(rm x)\n"],
    ),
  ],
)
def test_the_lines_under_next_are_commands(folder, capsys, name, changes, texts):
  """As a shell splits them: `run` takes its settings, and `sample` its prompt, as they were."""
  folder({"my text.txt": "To be, or not to be: that is the question.\n" * 50})
  base = catalog.load_experiment(name)
  experiment = change(base, changes)
  plan = plan_run(experiment, workdir="runs/a, b's")
  summary.print_next(plan, texts, format_command(name, base, experiment))
  lines = capsys.readouterr().out.splitlines()
  commands = [shlex.split(line) for line in lines if line.startswith("  ")]
  assert lines[0] == "next:" and len(commands) == 2
  for words in commands:
    assert words[:2] == [python_command(), "-m"]
  right, parsed = argparse.ArgumentParser.parse_args, []
  with mock.patch.object(
    argparse.ArgumentParser, "parse_args", lambda *args: parsed.append(right(*args)) or 1 / 0
  ):
    for main, words in ((sample.main, commands[0]), (run.main, commands[1])):
      with pytest.raises(ZeroDivisionError):
        main(words[3:])
  assert parsed[0].run == "runs/a, b's"
  assert parsed[0].prompt is None or parsed[0].prompt in ("al", "it's -- \u00e9", "--help")
  assert run.main([*commands[1][3:], "--print-config"]) == 0
  printed = capsys.readouterr().out.splitlines()
  assert all(f"{setting}={value}" in printed for setting, value in changes.items())
  assert f"train.steps={2 * plan.experiment.train.steps}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names", BYTES])
def test_the_lines_under_next_run_one_after_the_other(folder, capsys, name):
  """After three updates bytes are seldom text."""
  folder({})
  assert run.main(["--experiment", name, *STEPS, "--set", "sample.num=3"]) == 0
  lines = capsys.readouterr().out.split("next:\n")[1].splitlines()
  mains = {"jgpt.run": run.main, "jgpt.sample": sample.main}
  commands = [shlex.split(line) for line in lines if line.startswith("  ")]
  assert len(commands) == 2
  for words in commands:
    assert cli.guard(lambda words=words: mains[words[2]](words[3:])) == 0
  assert "\nnext:\n" in capsys.readouterr().out
