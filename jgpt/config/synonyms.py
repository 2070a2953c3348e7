"""Other programs' names for settings, and what stands for them in jgpt: one table.

The names are those of nanoGPT, minGPT, microgpt, llm.c (`train_gpt2.py`, and the letters of
`train_gpt2cu`), Hugging Face's GPT2Config, TrainingArguments and `generate`, and of books and
courses. A name that jgpt has itself, such as `batch_size`, is here only where it needs more than
its section. What is printed for a name is put together in `settings.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from jgpt.config import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synonym:
  """What stands in jgpt for other programs' names of one thing.

  Attributes:
    names: of other programs, separated by spaces. Case, dashes and underscores do not matter.
    settings: `section.field`s that take the value; `section.field=value` stands as it is.
    flags: of commands, tried before `settings`; the first that the command has takes the value.
    values: other programs' values -> jgpt's, "" where nothing stands for one; others are taken as
      they are.
    rule: how the value becomes jgpt's; see `_compute`.
    note: what differs, or why nothing stands for it.
  """

  names: str
  settings: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  values: dict[str, str] = dataclasses.field(default_factory=dict)
  rule: Literal["", "passes", "width", "pair", "parts", "tokens", "of_peak", "of_steps", "rest"] = (
    ""
  )
  note: str = ""


class Translation(NamedTuple):
  """What stands in jgpt for one name and value of another program.

  Attributes:
    settings: texts `section.field=value`; without "=value" where the value is not known.
    flags: of commands, in order of preference.
    value: for a flag; None where it takes none.
    note: "" where there is nothing to say.
  """

  settings: tuple[str, ...]
  flags: tuple[str, ...]
  value: str | None
  note: str


_NO = {"0": "none", "0.0": "none", "-1": "none", "-1.0": "none", "false": "none"}
_SCHEDULES = {
  "cosine_with_min_lr": "cosine",
  "constant_with_warmup": "constant",
  "none": "constant",
  "warmup_stable_decay": "wsd",
  "trapezoidal": "wsd",
}
_ADAMW = "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused fused_adamw"
_OPTIMIZERS = {
  **{name: name for name in ("adamw", "adam", "sgd")},
  **dict.fromkeys(_ADAMW.split(), "adamw"),
  "fused_adam": "adam",
  **dict.fromkeys(("momentum", "sgdm"), "sgd"),
  **dict.fromkeys(("adafactor", "lion", "muon", "rmsprop", "adagrad", "nadam", "radam"), ""),
}
_ACTIVATIONS = {
  "gelu": "gelu_erf",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "tanh": "gelu_tanh",
}
_ALL_PLACES = "model.dropout_places=embedding,attention,attention_out,mlp_out"
_PLACES = {
  "attention": "attn_pdrop attention_dropout attn_dropout attention_probs_dropout_prob",
  "attention_out,mlp_out": "resid_pdrop residual_dropout resid_dropout hidden_dropout "
  "hidden_dropout_prob",
  "embedding": "embd_pdrop embedding_dropout embd_dropout embed_dropout emb_dropout",
}
_DTYPES = {
  **dict.fromkeys(("true", "1", "bf16", "bf16-mixed", "bf16-true"), "bfloat16"),
  **dict.fromkeys(("false", "0", "no", "fp32", "32", "32-true"), "float32"),
}
_ON_DEVICE = (
  "batches are made on the device, by the compiled program; there are no loader processes"
)
_FSDP = (
  "mesh.fsdp devices share parameters, gradients and moments, as in ZeRO's stage 3; mesh.data=1 "
  "beside mesh.fsdp=-1 takes all devices for it, and a larger mesh.data has as many copies"
)
_PROCESSES = (
  "each host has one process, which takes all of its devices; --coordinator HOST:PORT, "
  "--num-processes N and --process-id I of python -m jgpt.run say which where no cluster does"
)
_METRICS = "every update's metrics are in metrics.jsonl of the run folder; there is no tracker"
_RUNS_OWN = "the run folder records the experiment's name and every setting"

# Names that nothing stands for -> why, or what does the same.
_NOTES = {
  "skip_update_gradz": "updates are skipped by their loss alone, optimizer.skip_spikes",
  "nesterov use_nesterov dampening amsgrad": (
    "optimizer.name is adamw, adam, or sgd with optimizer.momentum, in their plain forms"
  ),
  "eval_batch_size per_device_eval_batch_size val_batch_size": (
    "evaluations take batches of data.batch_size; train.eval_batches says how many"
  ),
  "dataset dataset_name data_dir dataset_path dataset_dir": (
    "an experiment names its text: --experiment shakespeare_char, for example; "
    "data.path names a text or token files of your own"
  ),
  (
    "val_file val_path test_path test_file validation_file input_val_bin val_bin val_data "
    "eval_file val_data_path"
  ): (
    "the held-out part is cut from the text: data.heldout_fraction, or data.heldout_tokens; "
    "of token files it is those with val in their names"
  ),
  "shuffle stride drop_last packing group_by_length": (
    "data.batching says the order of sequences: documents, random, sequential or epochs"
  ),
  (
    "num_workers dataloader_num_workers pin_memory dataloader_pin_memory prefetch "
    "prefetch_factor preprocessing_num_workers num_proc"
  ): _ON_DEVICE,
  "mlp_ratio ffn_mult ff_mult expansion_factor expansion": (
    "model.d_ff is the MLP's width itself, in GPT-2 four times model.d_model"
  ),
  "head_size d_head dim_head d_k d_v head_dim": (
    "the size of a head is model.d_model / model.num_heads"
  ),
  "n_kv_head n_kv_heads num_kv_heads num_key_value_heads n_query_groups": (
    "every head has keys and values of its own"
  ),
  "qkv_bias attention_bias": (
    "model.biases=all gives every projection a bias, mlp those of the MLP, none none"
  ),
  "layer_norm_epsilon layer_norm_eps norm_eps rms_norm_eps ln_eps": (
    "the epsilon of norms is 1e-5 and no setting"
  ),
  (
    "rope rotary use_rope rope_theta rotary_dim alibi swiglu gated_mlp n_experts "
    "num_experts moe sliding_window qk_norm"
  ): (
    "the network is GPT-2's family: model.positions, model.activation, model.norm and "
    "model.biases are its choices"
  ),
  "clip_value gradient_clip_algorithm": (
    "gradients are clipped by their global norm, optimizer.clip_norm"
  ),
  "resume_from_checkpoint resume resume_from resume_path resume_ckpt": (
    "the same command again goes on from the newest checkpoint of its run folder; --resume "
    "insists on one"
  ),
  "overwrite_output_dir overwrite restart from_scratch": (
    "--fresh sets the run folder aside and starts over"
  ),
  (
    "always_save_checkpoint save_strategy save_best save_best_only load_best_model_at_end "
    "metric_for_best_model greater_is_better"
  ): (
    "checkpoints are saved by train.save_every and train.save_every_seconds and at the end; "
    "train.keep_best of the lowest held-out loss are kept, and --step best reads the best one"
  ),
  "eval_only do_eval inference_only do_predict eval_strategy evaluation_strategy": (
    "train.eval_every says how often a run evaluates; python -m jgpt.evaluate evaluates one "
    "that is there"
  ),
  "do_train mode task": "python -m jgpt.run trains",
  "early_stopping early_stopping_patience patience": (
    "a run makes train.steps updates; train.keep_best keeps the best checkpoints among them"
  ),
  "do_sample greedy": "sample.temperature=0 takes the most probable token, any other draws",
  (
    "num_beams beam_size beam_width repetition_penalty no_repeat_ngram_size length_penalty "
    "min_p typical_p frequency_penalty presence_penalty"
  ): "texts are drawn with a temperature, top-k and top-p, and in no other way",
  "min_length eos_token_id bos_token_id pad_token_id stop_token use_cache": (
    "a text ends at the tokenizer's stop token, after sample.max_tokens, or where the context "
    "is full"
  ),
  "device accelerator device_type use_cpu no_cuda use_cuda cuda gpu cpu tpu use_mps_device": (
    "jax chooses the device: JAX_PLATFORMS=cpu before the command takes the CPU"
  ),
  "fully_sharded_data_parallel hsdp zero zero_stage deepspeed sharding_strategy": _FSDP,
  (
    "backend ddp ddp_backend parallel distributed strategy local_rank master_port pipeline_parallel"
  ): f"mesh.data, mesh.fsdp and mesh.tensor divide the work; {_PROCESSES}",
  "fp16 half fp16_opt_level grad_scaler loss_scale fp32 param_dtype master_weights": (
    "compute.dtype is float32 or bfloat16, which needs no scaled loss; parameters and moments "
    "are float32"
  ),
  "compile torch_compile use_compile jit fullgraph": (
    "every step is compiled; JAX_DISABLE_JIT=1 before the command runs it uncompiled"
  ),
  "flash flash_attention use_flash use_flash_attention attn_implementation attn_impl sdpa": (
    "compute.attention chooses the form of attention, fused kernels among them"
  ),
  (
    "wandb_log wandb_project wandb_run_name use_wandb wandb report_to tensorboard "
    "use_tensorboard mlflow log_to_wandb wandb_entity"
  ): _METRICS,
  "run_name exp_name experiment_name project_name run_id": (
    f"{_RUNS_OWN}; --workdir names the folder"
  ),
  "push_to_hub hub_model_id hub_token": (
    "python -m jgpt.export --format hf writes a folder for Hugging Face's Transformers"
  ),
  "profile profiler write_tensors trace debug verbose quiet disable_tqdm": (
    "a run prints its progress and writes metrics.jsonl; --profile DIR writes a profile of "
    "some updates, python -m jgpt.bench measures speed, and python -m jgpt.inspect --trace follows "
    "a parameter"
  ),
  "label_smoothing loss loss_fn criterion label_smoothing_factor z_loss aux_loss ignore_index": (
    "the loss is the mean negative log-likelihood, in nats per token"
  ),
  "lora use_lora lora_r lora_rank lora_alpha peft freeze": "all parameters are trained",
}

SYNONYMS = (
  # --- The length of training, and its periods ---
  Synonym(
    names="num_steps n_steps max_steps total_steps num_iterations num_iters n_iters max_iters "
    "iters iterations max_iterations num_train_steps train_steps training_steps "
    "num_training_steps total_iters num_updates",
    settings=("train.steps",),
  ),
  Synonym(
    names="epochs epoch n_epoch num_epochs n_epochs max_epochs num_train_epochs",
    settings=("train.epochs", "train.steps=none", "data.batching=epochs"),
    rule="passes",
    note="passes over a stream of tokens; where data.batching is documents only train.steps counts",
  ),
  Synonym(
    names="eval_interval eval_steps eval_freq eval_frequency eval_period eval_every_steps "
    "val_loss_every val_every val_interval valid_interval val_check_interval evaluation_interval "
    "validation_interval test_interval",
    settings=("train.eval_every",),
    values=_NO,
  ),
  Synonym(
    names="eval_iters eval_iter eval_batches_count num_eval_batches val_max_steps val_steps "
    "max_eval_steps limit_val_batches val_iters",
    settings=("train.eval_batches",),
    values=_NO,
    note="only evaluations on the way; the last one takes the whole held-out part",
  ),
  Synonym(
    names="log_interval logging_steps log_steps log_freq print_every print_interval "
    "log_every_n_steps report_every",
    settings=("train.log_every",),
  ),
  Synonym(
    names="save_steps save_interval checkpoint_every checkpoint_interval ckpt_interval "
    "checkpoint_freq save_freq every_n_train_steps save_checkpoint_every",
    settings=("train.save_every",),
    values=_NO,
  ),
  Synonym(
    names="save_total_limit max_to_keep max_checkpoints keep_checkpoints",
    settings=("train.keep_latest",),
  ),
  Synonym(names="save_top_k", settings=("train.keep_best",)),
  Synonym(
    names="sample_interval generate_every gen_every sample_steps sample_freq",
    settings=("train.sample_every",),
    values=_NO,
  ),
  Synonym(
    names="random_seed random_state manual_seed rng_seed data_seed", settings=("train.seed",)
  ),
  # --- The optimizer ---
  Synonym(
    names="learning_rate lr max_lr base_lr init_lr initial_lr adam_lr step_size",
    settings=("optimizer.peak_lr",),
  ),
  Synonym(
    names="min_lr final_lr min_learning_rate eta_min lr_min end_learning_rate",
    settings=("optimizer.end_lr",),
  ),
  Synonym(
    names="learning_rate_decay_frac final_lr_frac lr_final_fraction min_lr_ratio min_lr_rate",
    settings=("optimizer.end_lr",),
    rule="of_peak",
    note="optimizer.end_lr is a rate, not a share of optimizer.peak_lr",
  ),
  Synonym(
    names="warmup_iters warmup warmup_iterations num_warmup_steps lr_warmup_steps lr_warmup_iters",
    settings=("optimizer.warmup_steps",),
  ),
  Synonym(
    names="warmup_ratio warmup_fraction warmup_frac pct_start",
    settings=("optimizer.warmup_steps",),
    rule="of_steps",
    note="optimizer.warmup_steps counts updates",
  ),
  Synonym(
    names="lr_decay_iters lr_decay_steps decay_iters t_max lr_max_steps",
    settings=("optimizer.decay_steps",),
  ),
  Synonym(
    names="warmdown_iters lr_cooldown_steps num_decay_steps cooldown_iters",
    settings=("optimizer.cooldown_steps", "optimizer.schedule=wsd"),
  ),
  Synonym(
    names="lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style scheduler_type "
    "learning_rate_schedule",
    settings=("optimizer.schedule",),
    values=_SCHEDULES,
  ),
  Synonym(
    names="decay_lr lr_decay",
    settings=("optimizer.schedule",),
    values={"true": "cosine", "1": "cosine", "false": "constant", "0": "constant"},
  ),
  Synonym(
    names="betas adam_betas",
    settings=("optimizer.b1", "optimizer.b2"),
    rule="pair",
    note="two settings, optimizer.b1 and optimizer.b2",
  ),
  Synonym(names="beta1 adam_beta1 adam_b1", settings=("optimizer.b1",)),
  Synonym(names="beta2 adam_beta2 adam_b2", settings=("optimizer.b2",)),
  Synonym(
    names="epsilon eps_adam adam_eps adam_epsilon adamw_eps optimizer_eps",
    settings=("optimizer.eps",),
  ),
  Synonym(names="wd l2 adam_weight_decay", settings=("optimizer.weight_decay",)),
  Synonym(
    names="grad_clip gradient_clip max_grad_norm grad_norm_clip grad_clip_norm clip_grad "
    "clip_grad_norm gradient_clip_val gradient_clip_norm max_norm clip",
    settings=("optimizer.clip_norm",),
    values=_NO,
  ),
  Synonym(
    names="skip_update_lossz loss_zscore skip_loss_z",
    settings=("optimizer.skip_spikes",),
    values=_NO,
  ),
  Synonym(
    names="optim optimizer optimizer_type optimizer_name optim_name opt opt_type",
    settings=("optimizer.name",),
    values=_OPTIMIZERS,
    note="jgpt has AdamW, Adam, and SGD with momentum",
  ),
  *(
    Synonym(
      names=name, settings=(f"optimizer.name={name}",), note=f"it is a value, optimizer.name={name}"
    )
    for name in ("adamw", "adam", "sgd")
  ),
  Synonym(names="sgd_momentum mu", settings=("optimizer.momentum", "optimizer.name=sgd")),
  # --- The batch, and the data ---
  Synonym(
    names="per_device_train_batch_size per_gpu_train_batch_size train_batch_size "
    "device_batch_size global_batch_size batch bs b mini_batch_size",
    settings=("data.batch_size",),
    note="data.batch_size counts the sequences of an update, over all devices and micro-batches",
  ),
  Synonym(
    names="total_batch_size batch_size_in_tokens tokens_per_batch desired_batch_size",
    settings=("data.batch_size",),
    rule="tokens",
    note="data.batch_size counts sequences of data.seq_len tokens",
  ),
  Synonym(
    names="gradient_accumulation_steps accumulate_grad_batches grad_accum_steps grad_accum "
    "accumulation_steps accum accumulate gradient_accumulation grad_accumulation_steps "
    "accum_steps",
    settings=("train.micro_batch_size",),
    rule="parts",
    note="data.batch_size counts the sequences of a whole update, and train.micro_batch_size those "
    "of one pass",
  ),
  Synonym(
    names="micro_batch microbatch_size per_device_batch_size",
    settings=("train.micro_batch_size",),
    note="data.batch_size counts the sequences of a whole update",
  ),
  Synonym(
    names="block_size t context_length context_size context_len ctx_len ctx_size context_window "
    "window_size sequence_length seq_length seqlen max_len max_seq_length max_sequence_length "
    "max_context_length model_max_length n_positions n_ctx max_position_embeddings "
    "max_position_embedding",
    settings=("model.max_seq_len", "data.seq_len"),
    note="the model's positions and the data's windows are two settings",
  ),
  Synonym(
    names="max_length",
    settings=("model.max_seq_len", "data.seq_len"),
    flags=("--max-tokens",),
    note="in sampling sample.max_tokens counts the new tokens",
  ),
  Synonym(
    names="train_file train_path text file filename training_file data_file data_path text_file "
    "input_file input_bin train_bin train_data train_data_path corpus file_path input data",
    settings=("data.path",),
    flags=("--data",),
  ),
  Synonym(
    names="val_split split val_ratio val_fraction val_size validation_split validation_ratio "
    "test_size test_split val_frac validation_split_percentage heldout",
    settings=("data.heldout_fraction",),
  ),
  Synonym(
    names="train_split train_ratio train_fraction train_frac split_ratio train_val_split",
    settings=("data.heldout_fraction",),
    rule="rest",
    note="data.heldout_fraction is the other part",
  ),
  Synonym(
    names="overfit_single_batch overfit_batches overfit",
    settings=("data.num_batches",),
    values={"true": "1", "false": "none", "0": "none", "0.0": "none", "1.0": "1"},
  ),
  Synonym(
    names="tokenizer_name tokenizer_type encoding",
    settings=("data.tokenizer",),
    flags=("--tokenizer",),
    values={"char": "characters", "byte": "bytes", "tiktoken": "gpt2"},
  ),
  Synonym(
    names="vocab vocabulary_size n_vocab num_tokens padded_vocab_size",
    settings=("model.vocab_size",),
  ),
  # --- The network ---
  Synonym(
    names="n_layer n_layers num_layer num_hidden_layers layers n_blocks num_blocks n_block "
    "num_transformer_blocks num_decoder_layers depth",
    settings=("model.num_layers",),
  ),
  Synonym(
    names="n_head n_heads num_head heads num_attention_heads n_attn_heads attention_heads "
    "n_query_heads",
    settings=("model.num_heads",),
  ),
  Synonym(
    names="n_embd c n_embed n_embedding emb_dim embed_dim embedding_dim embed_size embedding_size "
    "emb_size d_embed d_embd hidden_size model_dim dim_model dim d_emb embd_dim width",
    settings=("model.d_model", "model.d_ff"),
    rule="width",
    note="the MLP's width is a setting of its own, four times the model's in GPT-2",
  ),
  Synonym(
    names="n_inner intermediate_size hidden_dim ffn_dim ff_dim ffn_hidden_size ffw_dim d_hidden "
    "d_mlp mlp_dim mlp_hidden_dim dim_feedforward feed_forward_dim d_inner dim_ff ffn_size d_ffn "
    "n_hidden hidden_units",
    settings=("model.d_ff",),
  ),
  Synonym(
    names="activation_function hidden_act act activation_fn act_fn nonlinearity",
    settings=("model.activation",),
    values=_ACTIVATIONS,
  ),
  Synonym(
    names="bias use_bias add_bias",
    settings=("model.biases",),
    values={"true": "all", "1": "all", "false": "none", "0": "none"},
    note="model.biases is for the projections; those of norms go with model.norm=layer or "
    "layer_no_bias",
  ),
  Synonym(
    names="norm_type normalization layer_norm_type",
    settings=("model.norm",),
    values={"rmsnorm": "rms", "rms_norm": "rms", "layernorm": "layer", "layer_norm": "layer"},
  ),
  Synonym(
    names="dropout dropout_rate dropout_prob drop_rate p_dropout drop p_drop dropout_p",
    settings=("model.dropout", _ALL_PLACES),
  ),
  *(
    Synonym(
      names=names,
      settings=("model.dropout", f"model.dropout_places={places}"),
      note="one rate holds at all of model.dropout_places",
    )
    for places, names in _PLACES.items()
  ),
  Synonym(
    names="tie_word_embeddings tied tie tie_weights weight_tying tied_embeddings tie_embeddings "
    "share_embeddings tied_weights",
    settings=("model.tied_head",),
    values={"1": "true", "0": "false"},
  ),
  Synonym(
    names="initializer_range init_scale weight_init_std init_stddev std",
    settings=("model.init_std",),
  ),
  Synonym(
    names="position_embedding_type pos_encoding positional_encoding pos_embed_type pos_emb",
    settings=("model.positions",),
    values={"absolute": "learned", "sin": "sinusoidal", "sine": "sinusoidal"},
  ),
  Synonym(
    names="model model_size size gpt_size model_type",
    settings=("model.size",),
    values={"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"},
    note="the sizes are GPT-2's; its weights come with --init-from",
  ),
  # --- Where a run begins, and where it is kept ---
  Synonym(
    names="init_from init_weights",
    settings=("train.init_from",),
    values={"scratch": "none", "resume": ""},
    note="the same command again goes on with a run, and --resume insists on one; train.init_from "
    "names the weights that a new run begins from",
  ),
  Synonym(
    names="model_name_or_path ckpt load_path checkpoint model_name pretrained pretrained_model "
    "load_from checkpoint_path ckpt_path model_path pretrained_path from_pretrained",
    settings=("train.init_from",),
    flags=("--run",),
  ),
  Synonym(
    names="out_dir output_dir save_dir work_dir checkpoint_dir ckpt_dir log_dir logging_dir "
    "run_dir results_dir model_dir save_path output",
    flags=("--workdir", "--run", "--out"),
  ),
  # --- Sampling ---
  Synonym(
    names="num_samples n_samples num_return_sequences samples num_generate",
    settings=("sample.num",),
  ),
  Synonym(
    names="max_new_tokens max_tokens_to_generate gen_len gen_length max_gen_len max_gen_tokens "
    "generate_length sample_len sample_length new_tokens gent",
    settings=("sample.max_tokens",),
    values={"-1": "none"},
  ),
  Synonym(
    names="start start_text start_string seed_text prompt_text start_tokens start_context",
    settings=("sample.prompt",),
  ),
  Synonym(names="temp sampling_temperature", settings=("sample.temperature",)),
  Synonym(names="k topk", settings=("sample.top_k",)),
  Synonym(names="p topp nucleus nucleus_p", settings=("sample.top_p",)),
  # --- The machine ---
  Synonym(
    names="devices num_devices n_devices num_gpus n_gpu n_gpus gpus nproc_per_node nproc "
    "data_parallel data_parallel_size dp dp_size",
    settings=("mesh.data",),
    values=dict.fromkeys(("none", "all", "auto", "true"), "-1"),
    note="mesh.data copies of the model share a batch; -1 takes all devices",
  ),
  Synonym(
    names="fsdp fsdp_size",
    settings=("mesh.fsdp",),
    values=dict.fromkeys(("true", "1", "full_shard", "hybrid_shard"), ""),
    note=_FSDP,
  ),
  Synonym(
    names="tensor_parallel tensor_parallel_size tp tp_size tensor_model_parallel_size mp "
    "model_parallel model_parallel_size",
    settings=("mesh.tensor",),
  ),
  Synonym(names="world_size num_processes nnodes", flags=("--num-processes",), note=_PROCESSES),
  Synonym(names="node_rank process_id rank", flags=("--process-id",), note=_PROCESSES),
  Synonym(names="master_addr coordinator", flags=("--coordinator",), note=_PROCESSES),
  Synonym(
    names="dtype precision bf16 amp use_amp mixed_precision autocast torch_dtype",
    settings=("compute.dtype",),
    values=_DTYPES,
    note="of activations and products; parameters, moments and sums are float32",
  ),
  Synonym(
    names="tf32 tensorcores allow_tf32",
    settings=("compute.precision",),
    values={"true": "default", "1": "default", "false": "highest", "0": "highest"},
  ),
  Synonym(
    names="gradient_checkpointing activation_checkpointing recompute remat use_remat",
    settings=("compute.remat",),
    values={"true": "block", "1": "block", "2": "block", "false": "none", "0": "none"},
  ),
  Synonym(
    names="config config_file config_path cfg",
    flags=("--experiment",),
    note="an experiment is a Python file",
  ),
  Synonym(
    names="shard_size tokens_per_shard",
    flags=("--shard-tokens",),
    note="python -m jgpt.prepare makes token files",
  ),
  *(Synonym(names=names, note=note) for names, note in _NOTES.items()),
)

# The letters of llm.c's train_gpt2cu, by the names of the table or jgpt's own; -h is --help here.
LETTERS = {
  "-i": "train_data",
  "-j": "val_data",
  "-e": "init_from",
  "-o": "output_dir",
  "-n": "save_steps",
  "-nk": "max_to_keep",
  "-y": "resume_from_checkpoint",
  "-b": "batch_size",
  "-t": "sequence_length",
  "-d": "total_batch_size",
  "-x": "max_steps",
  "-k": "lr_scheduler_type",
  "-l": "learning_rate",
  "-u": "warmup_iters",
  "-q": "learning_rate_decay_frac",
  "-c": "weight_decay",
  "-sl": "skip_update_lossz",
  "-sg": "skip_update_gradz",
  "-v": "val_loss_every",
  "-m": "val_max_steps",
  "-s": "sample_every",
  "-g": "gent",
  "-a": "overfit_single_batch",
  "-f": "tf32",
  "-w": "dtype",
  "-z": "zero_stage",
  "-r": "recompute",
}


def squeeze(name: str) -> str:
  """Returns the last part of a dotted name without case, dashes and underscores."""
  return re.sub("[-_]", "", name.rpartition(".")[2].lower())


_BY_NAME = {squeeze(name): synonym for synonym in SYNONYMS for name in synonym.names.split()}


def synonym_names() -> list[str]:
  """Lists the names of the table, as other programs write them."""
  return [name for synonym in SYNONYMS for name in synonym.names.split()]


def follows_from_others(name: str) -> bool:
  """Returns whether a value of the table follows from other settings of the experiment."""
  synonym = _BY_NAME.get(squeeze(LETTERS.get(name, name)))
  return synonym is not None and synonym.rule in ("parts", "tokens", "of_peak", "of_steps")


def translate(
  name: str, value: str | None, experiment: Experiment | None, beside: Collection[str] = ()
) -> Translation | None:
  """Finds what stands for another program's setting.

  Args:
    name: as it was given; a section before it is ignored.
    value: its text; None for a flag without one, which means true where that is a value.
    experiment: the one that is changed, for values that follow from its own; None where there is
      none.
    beside: settings that other programs' names change at the same time.

  Returns:
    None for a name that the table does not have.
  """
  synonym = _BY_NAME.get(squeeze(name))
  if synonym is None:
    return None
  if value is not None:
    value = value.strip()
    word = value.lower()
    value = synonym.values.get(word, word if word in ("true", "false", "none") else value)
  elif "true" in synonym.values:
    value = synonym.values["true"]
  fixed = [setting for setting in synonym.settings if "=" in setting]
  taking = [setting for setting in synonym.settings if "=" not in setting]
  if value is None:
    return Translation(tuple(taking), synonym.flags, None, synonym.note)
  if not value:
    return Translation((), (), None, synonym.note)
  if taking[:1] == ["model.dropout"] and _read_number(value) == 0:
    fixed = []  # no place is needed
  computed = _compute(synonym.rule, taking, value, experiment, beside)
  settings = taking if computed is None else computed and [*computed, *fixed]
  return Translation(tuple(settings), synonym.flags, value, synonym.note)


def describe_synonym(name: str) -> str:
  """Describes what stands for a name, as the end of an error; "" for a name that is not here."""
  found = translate(name, None, None)
  if found is None:
    return ""
  settings = " and ".join(found.settings)
  return f" In jgpt it is {settings}." if settings else f" {found.note[0].upper()}{found.note[1:]}."


def _compute(
  rule: str,
  taking: list[str],
  value: str,
  experiment: Experiment | None,
  beside: Collection[str],
) -> list[str] | None:
  """Computes jgpt's settings from another program's value.

  The rules: "passes" holds for streams of tokens only; "width" sets the MLP's width to four times
  the model's; "pair" divides two numbers; "parts" takes the number of micro-batches; "tokens"
  divides by the length of a sequence; "of_peak" and "of_steps" take a share of the peak rate and of
  the steps; "rest" takes 1 - value. A batch size beside "parts" or "tokens" is that of one pass.

  Returns:
    None where the value cannot be computed; [] where nothing stands for it in this experiment.
  """
  if not rule:
    return [f"{setting}={value}" for setting in taking]
  if rule == "passes":
    documents = experiment is not None and experiment.data.batching == "documents"
    return [] if documents else [f"{taking[0]}={value}"]
  if rule == "pair":
    pair = [word for word in re.split(r"[\s,()\[\]]+", value) if word]
    if len(pair) != 2 or None in map(_read_number, pair):
      return None
    return [f"{setting}={word}" for setting, word in zip(taking, pair, strict=True)]
  number = _read_number(value)
  if number is None:
    return None
  if rule == "rest":
    return [f"{taking[0]}={1 - number:.6g}"]
  if rule == "width":
    return [f"{taking[0]}={value}", f"{taking[1]}={round(4 * number)}"]
  if experiment is None or number <= 0:
    return None
  data, train = experiment.data, experiment.train
  if rule == "of_peak":
    return [f"{taking[0]}={number * experiment.optimizer.peak_lr:.6g}"]
  if rule == "of_steps":
    return None if train.steps is None else [f"{taking[0]}={round(number * train.steps)}"]
  one_pass = [f"train.micro_batch_size={data.batch_size}"] if "data.batch_size" in beside else []
  if rule == "tokens":
    whole = round(number / data.seq_len)
    return None if number % data.seq_len else [f"data.batch_size={whole}", *one_pass]
  if one_pass or data.batch_size % number:  # "parts"
    whole = round(data.batch_size * number)
    return [f"data.batch_size={whole}", f"train.micro_batch_size={data.batch_size}"]
  return [f"train.micro_batch_size={round(data.batch_size / number)}"]


def _read_number(text: str) -> float | None:
  """Reads a finite number of a reasonable size; None for other text."""
  try:
    number = float(text)
  except ValueError:
    return None
  return number if abs(number) < 1e30 else None
