"""Names of settings in Hugging Face's Trainer, Megatron, DeepSpeed and nanoGPT, and what says the same here.

For the remedy of an unknown key alone: none of them is read as if it were ours, as units differ (steps or tokens).
"""

_THEIRS = {
    "store": "data data_path data_dir dataset train_data",
    "model.width": "hidden_size n_embd d_model embed_dim dim",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.positions": "position_embedding_type",
    "model.rope_theta": "rotary_base",
    "curriculum.seqlen": "seq_length seq_len sequence_length block_size context_length max_seq_len max_seq_length "
    "max_position_embeddings max_length n_ctx n_positions",
    "curriculum.seqlen_start": "min_difficulty",
    "curriculum.seqlen_end": "max_difficulty",
    "curriculum.duration_steps": "total_curriculum_step",
    "curriculum.seqlen_multiple": "difficulty_step",
    "curriculum.degree": "root_degree",
    "batch.global_batch_sequences": "batch_size global_batch_size train_batch_size per_device_train_batch_size",
    "batch.micro_batch_tokens": "micro_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.min_lr": "min_learning_rate",
    "optimizer.warmup_steps": "warmup warmup_iters warmup_ratio lr_warmup_iters lr_warmup_steps num_warmup_steps",
    "optimizer.decay": "lr_scheduler_type lr_decay_style",
    "optimizer.decay_tokens": "lr_decay_iters lr_decay_steps",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon adam_eps",
    "optimizer.clip": "grad_clip clip_grad max_grad_norm gradient_clipping",
    "run.dir": "out_dir output_dir save save_dir",
    "run.total_tokens": "max_steps max_iters train_iters train_samples train_tokens num_steps steps",
    "run.epochs": "num_epochs num_train_epochs",
    "run.checkpoint_every_steps": "save_steps save_interval",
    "run.keep_checkpoints": "save_total_limit",
    "run.validate_every_steps": "eval_steps eval_interval",
    "run.log_every_steps": "log_interval logging_steps",
    "run.dtype": "bf16 fp16 precision mixed_precision torch_dtype",
    "run.compile": "torch_compile",
    "run.activation_checkpointing": "gradient_checkpointing recompute_granularity",
    "run.trackers": "report_to",
}
SAYS_THE_SAME = {name: ours for ours, names in _THEIRS.items() for name in names.split()}
"""Their name -> our key."""
