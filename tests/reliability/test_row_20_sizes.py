"""Sizes that do not go together: an error before any device work, whose advice leads to a run.

`tests/config/test_settings.py` follows the advice of settings by themselves; here it is followed
through data and devices too.
"""

import re

import pytest
from bad_input import NO_DEVICE, TRAINS, Case, advice, assert_refused, give, settings

SMALL = ("data.seq_len=16", "model.max_seq_len=16")
BEFORE_DEVICES = {
  ("names", "model.num_heads=3"): "heads that divide it: 2 or 4. Try --set model.num_heads=2",
  ("names", "model.d_model=15"): "model.d_model=15 must be a multiple of model.num_heads=4",
  ("names", "model.d_model=1", "model.num_heads=2"): "Try --set model.num_heads=1",
  ("names", "data.seq_len=17"): "longer than the model's model.max_seq_len=16 positions",
  ("names", "model.max_seq_len=8"): "data.seq_len=16 is longer than",
  ("names", "data.batch_size=6", "train.micro_batch_size=4"): "Try --set train.micro_batch_size=3",
  ("names", "data.batch_size=6", "mesh.data=4"): "must be a multiple of mesh.data=4",
  (
    "names",
    "data.batch_size=8",
    "train.micro_batch_size=2",
    "mesh.data=4",
  ): "train.micro_batch_size=2 must be a multiple",
  ("names", "mesh.data=none"): "Try --set mesh.data=-1, which takes all devices",
  ("names", "mesh.tensor=0"): "or -1 for the devices left over. Try --set mesh.tensor=1",
  ("names", "mesh.data=-1", "mesh.fsdp=-1"): "can be -1. Try --set mesh.fsdp=1",
  ("names", "mesh.data=-1", "mesh.fsdp=2"): "data.batch_size=1 must be a multiple of mesh.fsdp=2",
  (
    "names",
    "data.batch_size=8",
    "mesh.data=2",
    "mesh.fsdp=3",
  ): "must be a multiple of mesh.data * mesh.fsdp=6. Try --set mesh.fsdp=1",
  ("names", "model.norm=layer"): "Try --set model.norm_embed=false",
  ("names", "model.dropout=0.1"): "Try --set model.dropout_places=mlp_out",
  ("names", "data.tokenizer=bytes"): "Try --set data.batching=random",
  ("names", "data.tokenizer=bpe", "data.batching=random"): "Try --set data.bpe_vocab_size=2000",
  ("names", "data.heldout_tokens=100"): "exclude each other",
  ("names", "data.heldout_fraction=0.999999"): "held out by data.heldout_fraction=0.999999",
  ("names", "model.vocab_size=26"): "smaller than the tokenizer's 27 ids",
  ("names", "train.steps=none"): "how long should it train? Try --set train.steps=1000",
  ("names", "train.steps=none", "train.epochs=2"): "train.epochs goes with data.batching=epochs",
  ("names", "data.batching=random", "data.batch_size=2147483647"): "must be at most 1,073,741,824",
  (
    "shakespeare_bytes",
    "data.seq_len=5000",
    "model.max_seq_len=5000",
  ): "the held-out part of six lines of Hamlet",
  (
    "shakespeare_bytes",
    "data.seq_len=20000",
    "model.max_seq_len=20000",
  ): "has 11,070 tokens, and a batch needs 20,001",
  (
    "shakespeare_bytes",
    "data.batching=sequential",
    "data.batch_size=4096",
  ): "a batch needs 262,145",
  ("shakespeare_bytes", "data.mark_paragraphs=true"): "goes with data.tokenizer=gpt2 only",
  (
    "shakespeare_bytes",
    "data.heldout_tokens=10",
    "data.heldout_fraction=0",
  ): "has 10 tokens, and a batch needs 65",
  (
    "shakespeare_bytes",
    "data.heldout_tokens=5000000",
    "data.heldout_fraction=0",
  ): "takes 12,300 of 12,300 tokens",
  ("shakespeare_bytes", "sample.max_tokens=2147483647"): "must be at most 100000000",
  (
    "microgpt",
    "train.init=microgpt",
    "train.init_from=weights",
  ): "exclude each other. Try --set train.init=normal",
}
# On eight devices, which training would be divided over.
DIVIDED = {
  (
    "names",
    "data.batch_size=6",
    "mesh.data=-1",
  ): "nearest: 8. Try --set mesh.data=6, or for a new run --set data.batch_size=8",
  ("names", "mesh.data=-1"): "data.batch_size=1 must be a multiple of the 8 devices",
  (
    "names",
    "data.batch_size=8",
    "mesh.data=-1",
    "mesh.tensor=3",
  ): "mesh.tensor=3 must divide the 8 devices there are, since mesh.data=-1 takes the others",
  (
    "names",
    "data.batch_size=12",
    "mesh.data=-1",
    "mesh.fsdp=6",
    "mesh.tensor=4",
  ): "mesh.fsdp=6 * mesh.tensor=4 must divide the 8 devices",
  (
    "names",
    "data.batch_size=8",
    "mesh.data=4",
    "mesh.tensor=4",
  ): "mesh.data=4, mesh.tensor=4 asks for more than the 8 devices there are. Try --set mesh.data=8",
  (
    "shakespeare_bytes",
    "data.batch_size=12",
    "mesh.data=-1",
    "mesh.fsdp=2",
  ): "nearest: 8 or 16. Try --set mesh.data=6 --set mesh.fsdp=1",
  (
    "names",
    "data.batch_size=9",
    "mesh.data=9",
  ): "more than the 8 devices there are. Try --set mesh.data=3",
  (
    "names",
    "data.batch_size=12",
    "train.micro_batch_size=6",
    "mesh.data=-1",
  ): "train.micro_batch_size=6 must be",
  ("names", "data.batch_size=20", "train.micro_batch_size=5", "mesh.data=-1"): (
    "mesh.data=5, or for a new run --set train.micro_batch_size=8 --set data.batch_size=24"
  ),
  (
    "names",
    "data.batch_size=16",
    "train.micro_batch_size=4",
    "mesh.data=8",
  ): "train.micro_batch_size=4 must be a multiple",
  (
    "shakespeare_bytes",
    "data.batch_size=12",
    "mesh.data=-1",
  ): "nearest: 8 or 16. Try --set mesh.data=6, or for a new run --set data.batch_size=16",
  ("shakespeare_bytes", "data.batch_size=2147", *SMALL, "mesh.data=-1"): "nearest: 2144 or 2152",
}


def assert_leads_on(outcome, goal):
  """Every way that an error advises ends, after no more than three other errors, at `goal`."""
  if goal in outcome.err:
    return
  assert outcome.status == 2 and outcome.followed, outcome
  for further in outcome.followed:
    assert further.err != outcome.err, further
    assert_leads_on(further, goal)


def test_row_20_advice_before_devices_leads_to_them(tmp_path):
  """Where looking at a device is an error of its own: none of these looks, and with the advice
  taken each would.
  """
  outcomes = give([Case(argv=settings(*case), follow=3) for case in BEFORE_DEVICES], cwd=tmp_path)
  for outcome, words in zip(outcomes, BEFORE_DEVICES.values(), strict=True):
    assert_refused(outcome, words)
    # Weights are not there, and what is no value stays on the command line.
    if not re.search("weights|must be a whole number", " ".join([outcome.err, *outcome.argv])):
      assert_leads_on(outcome, NO_DEVICE)
  assert list(tmp_path.iterdir()) == []


def test_row_20_what_devices_do_not_divide_is_refused_before_compiling(tmp_path):
  """Eight devices are there.

  Nothing is compiled, printed or written, and what is advised can be divided.
  """
  env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  cases = [Case(argv=settings(*case), follow=3, plan_only=True) for case in DIVIDED]
  for outcome, words in zip(give(cases, cwd=tmp_path, **env), DIVIDED.values(), strict=True):
    assert_refused(outcome, words)
    assert_leads_on(outcome, TRAINS)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_row_20_what_is_advised_trains(tmp_path):
  """Each way of mending a batch that eight devices do not divide, as a run of two updates."""
  env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  argv = [*settings(*next(iter(DIVIDED))), "--steps", "2"]
  (refused,) = give([Case(argv=argv)], cwd=tmp_path, **env)
  ways = advice(refused.err)
  assert len(ways) == 2
  for outcome in give([Case(argv=argv + words) for words in ways], cwd=tmp_path, **env):
    assert outcome.status == 0 and outcome.err == "", outcome
