"""The TRL and transformers settings that rayrm does not honour: one table, so that none is silently ignored.

A name in `NOT_HONOURED` is accepted at the default given here (TRL's own) and is an error at any other value.
A name in `RENAMED` belongs to an older transformers or TRL and is an error that names today's setting.
Everything else that a TRL `RewardConfig` takes is a field of `rayrm.config.RewardConfig`, with TRL's meaning.
"""

from __future__ import annotations

from typing import Any, Final

NOT_HONOURED: Final[dict[str, Any]] = {
    "accelerator_config": None,
    "auto_find_batch_size": False,
    "average_tokens_across_devices": True,
    "batch_eval_metrics": False,
    "bf16_full_eval": False,
    "dataloader_in_order": True,
    "dataloader_multiprocessing_context": None,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_pin_memory": True,
    "dataloader_prefetch_factor": None,
    "ddp_backend": None,
    "ddp_broadcast_buffers": None,
    "ddp_bucket_cap_mb": None,
    "ddp_find_unused_parameters": None,
    "ddp_static_graph": None,
    "ddp_timeout": 1800,
    "debug": "",
    "enable_jit_checkpoint": False,
    "eval_accumulation_steps": None,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "fp16_full_eval": False,
    "fsdp": None,
    "fsdp_config": None,
    "full_determinism": False,
    "hub_always_push": False,
    "ignore_data_skip": False,
    "include_for_metrics": [],
    "include_num_input_tokens_seen": "no",
    "label_names": None,
    "label_smoothing_factor": 0.0,
    "length_column_name": "length",
    "liger_kernel_config": None,
    "local_rank": -1,
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "neftune_noise_alpha": None,
    "optim_target_modules": None,
    "parallelism_config": None,
    "prediction_loss_only": False,
    "save_on_each_node": False,
    "save_only_model": False,
    "skip_memory_metrics": True,
    "tf32": None,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "torch_empty_cache_steps": None,
    "trackio_bucket_id": None,
    "trackio_space_id": None,
    "trackio_static_space_id": None,
    "use_cache": False,
    "use_liger_kernel": False,
}
"""Name -> the only value it may have: TRL's default."""

INSTEAD: Final[dict[str, str]] = {
    "auto_find_batch_size": "Set `max_tokens_per_microbatch`: it bounds memory and cannot change the loss.",
    "dataloader_num_workers": "Delete it: Ray Data reads and tokenizes in parallel by itself.",
    "dataloader_pin_memory": "Delete it: Ray Data feeds the workers.",
    "ddp_backend": "Delete it: NCCL is used on GPUs and gloo on CPUs.",
    "fsdp": "Set `zero_stage = 3` to shard parameters, gradients and optimizer state.",
    "label_smoothing_factor": "Set `label_smoothing`: TRL's trainer gives the factor no effect on this loss.",
    "liger_kernel_config": "Delete it, as `use_liger_kernel`: no kernels are replaced.",
    "parallelism_config": "Set `sequence_parallel_size` for rows that are too long for one worker.",
    "torch_compile": "Delete it: each packed batch has its own shape and attention plan, and would be "
    "compiled anew, which takes far longer than its step.",
    "torch_compile_backend": "Delete it, as `torch_compile`: each packed batch would be compiled anew.",
    "torch_compile_mode": "Delete it, as `torch_compile`: each packed batch would be compiled anew.",
    "use_liger_kernel": "Delete it: its kernels need a GPU and are not tested with shared prefixes; the one "
    "that saves most, the language model's loss, has no place in a reward model.",
}
"""Name -> why not, where that needs saying, and what to do instead; without an entry: delete the setting."""

RENAMED: Final[dict[str, str]] = {
    "eval_dataset": "data.eval",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "max_tokens_per_microbatch",
    "logging_dir": "output_dir",
    "max_seq_length": "max_length",
    "model_name_or_path": "model.name",
    "no_cuda": "use_cpu",
    "num_processes": "cluster.num_workers",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "train_dataset": "data.train",
    "warmup_ratio": "warmup_steps",
}
"""An old or foreign name -> today's setting."""
