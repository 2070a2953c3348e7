"""Other programs' names: what stands for each of them, as a setting and as an option."""

import re
import shlex

import pytest

from jgpt import cli, evaluate, export, run, sample
from jgpt.config import catalog
from jgpt.config.settings import (
  change,
  explain_unknown,
  list_settings,
  parse_setting,
  setting_names,
)
from jgpt.config.synonyms import LETTERS, SYNONYMS, squeeze, synonym_names, translate
from jgpt.errors import UserError
from jgpt.plan import plan_run

NAMES = catalog.load_experiment("names")
CHARS = catalog.load_experiment("shakespeare_char_cpu")  # batch 12, windows of 64, rate 1e-3

# What other programs' users write, and the settings that stand for it in `shakespeare_char_cpu`.
SETTINGS = {
  # nanoGPT
  "block_size=256": "model.max_seq_len=256 data.seq_len=256",
  "batch_size=64": "data.batch_size=64",
  "n_embd=96": "model.d_model=96 model.d_ff=384",
  "n_layer=6": "model.num_layers=6",
  "n_head=8": "model.num_heads=8",
  "learning_rate=6e-4": "optimizer.peak_lr=6e-4",
  "max_iters=5000": "train.steps=5000",
  "lr_decay_iters=5000": "optimizer.decay_steps=5000",
  "min_lr=6e-5": "optimizer.end_lr=6e-5",
  "warmup_iters=100": "optimizer.warmup_steps=100",
  "beta2=0.99": "optimizer.b2=0.99",
  "grad_clip=0.0": "optimizer.clip_norm=none",
  "grad_clip=0.5": "optimizer.clip_norm=0.5",
  "decay_lr=False": "optimizer.schedule=constant",
  "eval_interval=250": "train.eval_every=250",
  "eval_iters=200": "train.eval_batches=200",
  "log_interval=10": "train.log_every=10",
  "gradient_accumulation_steps=4": "train.micro_batch_size=3",
  "gradient_accumulation_steps=40": "data.batch_size=480 train.micro_batch_size=12",
  "dropout=0.2": "model.dropout=0.2 model.dropout_places=embedding,attention,attention_out,mlp_out",
  "dropout=0.0": "model.dropout=0.0",
  "bias=True": "model.biases=all",
  "pretrained=gpt2-xl": "train.init_from=gpt2-xl",
  "num_samples=3": "sample.num=3",
  "max_new_tokens=500": "sample.max_tokens=500",
  "start=ROMEO": "sample.prompt=ROMEO",
  # Hugging Face
  "num_train_epochs=3": "train.epochs=3 train.steps=none data.batching=epochs",
  "per_device_train_batch_size=8": "data.batch_size=8",
  "lr_scheduler_type=constant_with_warmup": "optimizer.schedule=constant",
  "warmup_ratio=0.1": "optimizer.warmup_steps=200",
  "logging_steps=20": "train.log_every=20",
  "save_steps=500": "train.save_every=500",
  "save_total_limit=2": "train.keep_latest=2",
  "eval_steps=50": "train.eval_every=50",
  "max_steps=-1": "",
  "adam_beta1=0.8": "optimizer.b1=0.8",
  "adam_epsilon=1e-7": "optimizer.eps=1e-7",
  "optim=adamw_torch_fused": "optimizer.name=adamw",
  "optimizer=SGD": "optimizer.name=sgd",
  "optim=adafactor": "",
  "mu=0.9": "optimizer.momentum=0.9 optimizer.name=sgd",
  "max_grad_norm=1.0": "optimizer.clip_norm=1.0",
  "n_positions=512": "model.max_seq_len=512 data.seq_len=512",
  "n_inner=1024": "model.d_ff=1024",
  "hidden_size=256": "model.d_model=256 model.d_ff=1024",
  "num_hidden_layers=3": "model.num_layers=3",
  "num_attention_heads=2": "model.num_heads=2",
  "activation_function=gelu_new": "model.activation=gelu_tanh",
  "activation_function=silu": "",
  "attn_pdrop=0.1": "model.dropout=0.1 model.dropout_places=attention",
  "tie_word_embeddings=False": "model.tied_head=false",
  "initializer_range=0.01": "model.init_std=0.01",
  # llm.c
  "total_batch_size=1024": "data.batch_size=16",
  "sequence_length=32": "model.max_seq_len=32 data.seq_len=32",
  "num_iterations=50": "train.steps=50",
  "val_loss_every=0": "train.eval_every=none",
  "val_max_steps=20": "train.eval_batches=20",
  "learning_rate_decay_frac=0.1": "optimizer.end_lr=0.0001",
  "overfit_single_batch=1": "data.num_batches=1",
  "input_bin=a b.bin": "data.path=a b.bin",
  # Books, courses, and programs of one page
  "num_steps=1000": "train.steps=1000",
  "total_steps=10": "train.steps=10",
  "betas=(0.9, 0.95)": "optimizer.b1=0.9 optimizer.b2=0.95",
  "betas=0.85,0.99": "optimizer.b1=0.85 optimizer.b2=0.99",
  "epsilon=1e-8": "optimizer.eps=1e-8",
  "eps_adam=1e-8": "optimizer.eps=1e-8",
  "lr=3e-4": "optimizer.peak_lr=3e-4",
  "n_heads=2": "model.num_heads=2",
  "emb_dim=64": "model.d_model=64 model.d_ff=256",
  "context_length=16": "model.max_seq_len=16 data.seq_len=16",
  "drop_rate=0.1": "model.dropout=0.1 "
  "model.dropout_places=embedding,attention,attention_out,mlp_out",
  "hidden_dim=99": "model.d_ff=99",
  "train_ratio=0.9": "data.heldout_fraction=0.1",
  "random_state=7": "train.seed=7",
  "top_k=5": "sample.top_k=5",
  "dtype=bfloat16": "compute.dtype=bfloat16",
  "bf16=True": "compute.dtype=bfloat16",
  "amp=False": "compute.dtype=float32",
  "allow_tf32=false": "compute.precision=highest",
  "gradient_checkpointing=True": "compute.remat=block",
  "n_gpu=all": "mesh.data=-1",
  "fsdp=4": "mesh.fsdp=4",
  "tensor_parallel=2": "mesh.tensor=2",
}
# What nothing stands for, and a word of the reason.
REASONS = {
  "device=cuda": "JAX_PLATFORMS",
  "fp16=True": "bfloat16, which needs no scaled loss",
  "compile=True": "compiled",
  "wandb_log=True": r"metrics\.jsonl",
  "backend=nccl": "mesh.data, mesh.fsdp and mesh.tensor divide the work",
  "zero_stage=3": "mesh.fsdp devices share parameters",
  "fsdp=full_shard": "mesh.fsdp=-1 takes all",
  "nnodes=4": "--num-processes N",
  "master_addr=10.0.0.1": "--coordinator HOST:PORT",
  "always_save_checkpoint=False": r"train\.keep_best",
  "init_from=resume": "--resume",
  "eval_only=True": r"jgpt\.evaluate",
  "dataset=openwebtext": "--experiment",
  "head_dim=64": r"model\.d_model / model\.num_heads",
  "layer_norm_epsilon=1e-6": "1e-5",
  "resume_from_checkpoint=out": "--resume",
  "num_workers=4": "made on the device",
  "sgd=true": r"optimizer\.name=sgd",
  "nesterov=True": "in their plain forms",
}


def answer(text, base=CHARS):
  """The error that `--set` ends in."""
  with pytest.raises(UserError) as refused:
    change(base, dict([parse_setting(text)]))
  return str(refused.value)


def advised(message):
  """The words after "Try", as a shell splits them; none without."""
  return shlex.split(message.rpartition(". Try ")[2]) if ". Try " in message else []


def as_set(settings):
  """The words that set the settings of `SETTINGS`."""
  pairs = re.split(r" (?=\w+\.\w+=)", settings) if settings else []
  return [word for setting in pairs for word in ("--set", setting)]


@pytest.mark.parametrize(("text", "settings"), SETTINGS.items())
def test_a_setting_of_another_program_is_answered_with_jgpts_and_its_value(text, settings):
  """What is advised is accepted, as written by a shell; the option has the same answer."""
  name, _, value = text.partition("=")
  message = answer(text)
  assert message.startswith(f"there is no setting '{name}'") and advised(message) == as_set(
    settings
  )
  change(CHARS, dict(parse_setting(word) for word in advised(message)[1::2]))
  for flags in (
    [f"--{name}", value],
    [f"--{name.replace('_', '-')}={value}"],
    [f"--{name}={value}"],
  ):
    with pytest.raises(UserError) as refused:
      run.main(["--experiment", "shakespeare_char_cpu", *flags])
    assert advised(str(refused.value)) == as_set(settings)


@pytest.mark.parametrize(("text", "reason"), REASONS.items())
def test_what_nothing_stands_for_is_said_with_the_reason(text, reason):
  message = answer(text)
  assert re.search(reason, message) and not advised(message)
  with pytest.raises(UserError, match=reason):
    run.main([f"--{text}"])


def test_every_name_of_the_table_has_an_answer():
  """However it is written; and no name has two."""
  squeezed = [squeeze(name) for name in synonym_names()]
  assert len(squeezed) == len(set(squeezed)) > 500
  for name in synonym_names():
    words = name.split("_")
    camel = words[0] + "".join(word.title() for word in words[1:])
    found = {translate(n, "2", CHARS) for n in (name, name.upper(), name.replace("_", "-"), camel)}
    assert len(found) == 1 and None not in found
    if (setting := f"train.{name}") not in setting_names():
      assert answer(f"{setting}=2").startswith(f"there is no setting '{setting}'")
  for letter, name in LETTERS.items():
    assert translate(name, "2", CHARS) or squeeze(name) in map(squeeze, setting_names()), letter


def test_the_settings_of_the_table_exist_and_its_values_are_read():
  for synonym in SYNONYMS:
    for setting in synonym.settings:
      name, equals, _ = setting.partition("=")
      assert name in (*setting_names(), "model.size")
      if equals:
        parse_setting(setting)
    assert synonym.settings or synonym.flags or synonym.note
    for theirs, ours in synonym.values.items():
      assert theirs == theirs.lower()
      if ours and not synonym.rule:
        taking = [setting for setting in synonym.settings if "=" not in setting]
        changed = change(CHARS, dict(parse_setting(f"{setting}={ours}") for setting in taking))
        assert "model.size" in taking or {list_settings(changed)[name] for name in taking}


def test_a_command_line_of_nanogpt_becomes_one_of_jgpt(monkeypatch, capsys):
  """That of its README for a laptop: every setting in one answer, which trains as given."""
  line = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
  )
  with pytest.raises(UserError, match=r"JAX_PLATFORMS.*compiled") as e:
    run.main(["--experiment", "names", *line.split()])
  words = advised(str(e.value))
  assert len(words) == 24
  assert run.main(["--experiment", "names", *words, "--print-config"]) == 0
  printed = capsys.readouterr().out.splitlines()
  assert {"data.seq_len=64", "model.d_ff=512", "train.steps=2000"} <= set(printed)


def test_a_command_line_of_llm_c_becomes_one_of_jgpt(capsys):
  """Its batch in tokens is over all passes of -b sequences of -t tokens; -q is a share of -l."""
  line = "-b 4 -t 32 -d 1024 -x 10 -l 1e-4 -q 0.5 -u 7 -c 0.1 -v 5 -s 6 -a 0 -k cosine -o out"
  with pytest.raises(UserError) as refused:
    run.main(["--experiment", "shakespeare_char_cpu", *line.split()])
  words = advised(str(refused.value))
  assert run.main(["--experiment", "shakespeare_char_cpu", *words, "--print-config"]) == 0
  printed = set(capsys.readouterr().out.splitlines())
  assert printed >= {
    "data.batch_size=32", "train.micro_batch_size=4", "data.seq_len=32", "train.steps=10",
    "optimizer.end_lr=5e-05", "optimizer.warmup_steps=7", "optimizer.weight_decay=0.1",
    "train.eval_every=5", "train.sample_every=6", "data.num_batches=none",
  }  # fmt: skip


def test_accumulated_batches_multiply_beside_a_batch_size(capsys):
  """The batch size of nanoGPT is that of one pass; jgpt's own, set by its name, is the whole."""
  flags = ["--batch_size=16", "--gradient_accumulation_steps=5"]
  with pytest.raises(UserError) as refused:
    run.main(["--experiment", "names", *flags])
  assert advised(str(refused.value)) == as_set("data.batch_size=80 train.micro_batch_size=16")
  with pytest.raises(UserError) as refused:
    change(NAMES, {"data.batch_size": 60, "gradient_accumulation_steps": 5})
  assert advised(str(refused.value)) == as_set("train.micro_batch_size=12")


def test_passes_over_documents_are_no_epochs():
  assert not advised(answer("num_epochs=3", NAMES))
  assert "only train.steps counts" in answer("epochs=3", NAMES)


@pytest.mark.parametrize(
  ("main", "args", "words"),
  [
    (sample.main, ["--run", "r", "--num_samples=5", "--start", "an"], "--num 5 --prompt an"),
    (sample.main, ["--out_dir=o", "--max_new_tokens", "7", "--topk=-1"], "--run o --max-tokens 7"),
    (sample.main, ["--run=r", "--random-seed", "3", "--temp=0"], "--seed 3 --temperature 0"),
    (export.main, ["--output_dir", "o"], "--run o"),
    (evaluate.main, ["--run", "o", "--train_file=a b.txt"], "--set data.path=a b.txt"),
    (run.main, ["--log_every", "5"], "--log-every 5"),
    (run.main, ["--output-dir", "o", "--config=x.py"], "--workdir o --experiment x.py"),
    (run.main, ["--init_from=gpt2-xl"], "--init-from gpt2-xl"),
    (run.main, ["--init_from=scratch"], "--set train.init_from=none"),
    (run.main, ["names"], "--experiment names"),
    (run.main, ["mine/wide.py"], "--experiment mine/wide.py"),
  ],
)
def test_options_are_those_of_the_command(main, args, words):
  with pytest.raises(UserError) as refused:
    main(args)
  assert " ".join(advised(str(refused.value))) == words


def test_settings_are_those_of_run():
  """Other commands read a run, whose settings stand."""
  for main in (sample.main, evaluate.main, export.main):
    with pytest.raises(UserError, match=r"are settings of python -m jgpt\.run$"):
      main(["--run", "r", "--block_size=4"])


def test_options_are_not_abbreviated():
  """`--step` is an option of other commands, and `--f` would have set a run folder aside."""
  for args in (["--step", "5"], ["--f"], ["--init=gpt2"], ["--work", "x"]):
    with pytest.raises(UserError, match="has no option"):
      run.main(["--experiment", "names", *args])
  with pytest.raises(UserError, match="Did you mean --steps"):
    run.main(["--step", "5"])


@pytest.mark.parametrize(
  ("text", "setting"),
  [
    ("learning_rte=0.1", "optimizer.peak_lr=0.1"),  # misspelt, and another program's
    ("max_iter=7", "train.steps=7"),
    ("layers=scan", "compute.layers=scan"),  # the value says which is meant
    ("optimizer.seed=4", "train.seed=4"),  # the right field in another section
    ("gent=5", "sample.max_tokens=5"),
  ],
)
def test_near_names_and_names_in_another_section(text, setting):
  assert advised(answer(text)) == ["--set", setting]


@pytest.mark.parametrize(
  "value", [None, True, 3, 0.5, (0.9, 0.95), [], {}, 10**400, "x" * 999, "\x1b[2J", "' ; rm"]
)
def test_any_value_of_another_programs_setting_is_refused_in_one_line(value):
  for name in ("block_size", "betas", "device", "gradient_accumulation_steps", "n_embd", "k"):
    with pytest.raises(UserError) as refused:
      change(NAMES, {name: value})
    assert str(refused.value).count("\n") == 0 and len(str(refused.value)) < 3000


def test_an_experiment_file_with_another_programs_field_says_what_it_is_here(tmp_path):
  path = tmp_path / "own.py"
  path.write_text("from jgpt.config import ModelConfig\nModelConfig(n_layer=3)\n")
  with pytest.raises(UserError, match=r"line 2: TypeError: .*'n_layer'.*it is model\.num_layers"):
    catalog.load_experiment(str(path))


def test_without_an_experiment_values_that_follow_from_it_are_said_in_words():
  text = explain_unknown("no", {"grad_accum": "4"}, None)
  assert "data.batch_size counts" in text and not advised(text)


@pytest.mark.parametrize(
  ("verb", "meant"),
  [("train", "run"), ("generate", "sample"), ("eval", "evaluate"), ("rnu", "run")],
)
def test_other_programs_verbs_lead_to_jgpts(verb, meant, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["jgpt", verb])
  assert cli.main() == 2
  assert f"no verb '{verb}'. Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("word", "advice"), [("resume", "--resume"), ("scratch", "Try --set train.init_from=none")]
)
def test_nanogpts_words_for_weights_are_answered(word, advice):
  with pytest.raises(UserError, match=rf"train.init_from='{word}' does not exist: .*{advice}"):
    plan_run(change(NAMES, {"train.init_from": word}))
