"""The keys of a DeepSpeed configuration (0.19), so that a misspelt one is an error and not a default.

DeepSpeed reads past a key that it does not know, at the top and in some sections; in others it raises where
the ranks run. Knows neither deepspeed nor torch: a test compares the names with the installed ones.
"""

from __future__ import annotations

from typing import Any, Final

from rayrm.settings import nearest

Table = dict[str, Any]

_OFFLOAD: Final = {"device", "nvme_path", "buffer_count", "pin_memory"}
_STAGE_3: Final = {
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
    "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
    "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
}  # fmt: skip
"""With and without the prefix `stage3_`."""
KEYS: Final[dict[tuple[str, ...], set[str]]] = {
    (): {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "managed_gradient_accumulation", "gradient_clipping", "prescale_gradients",
        "gradient_predivide_factor", "gradient_allreduce_op", "communication_data_type",
        "seq_parallel_communication_data_type", "sequence_parallel_size", "data_parallel_size",
        "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types",
        "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
        "activation_checkpointing", "disable_allgather", "disable_python_gc", "dataloader_drop_last",
        "vocabulary_size", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
        "log_level", "timers", "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor",
        "comet",
    },
    ("zero_optimization",): {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm",
        "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint", "offload_param",
        "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload", "cpu_offload_param",
        "cpu_offload_params", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment",
        "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint",
        "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory", "leaf_module",
        *_STAGE_3, *(f"stage3_{name}" for name in _STAGE_3),
    },
    ("zero_optimization", "offload_param"): {*_OFFLOAD, "buffer_size", "max_in_cpu"},
    ("zero_optimization", "offload_optimizer"): {
        *_OFFLOAD, "pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload",
        "cpuadam_cores_perc",
    },
    ("zero_optimization", "leaf_module"): {"classes", "names", "name_suffixes"},
    ("fp16",): {
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
        "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads", "opt_level",
    },
    ("bf16",): {
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
    ("amp",): {"enabled", "opt_level"},
    ("torch_autocast",): {"enabled", "dtype", "lower_precision_safe_modules"},
    ("data_types",): {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    ("optimizer",): {"type", "params", "legacy_fusion"},
    ("scheduler",): {"type", "params"},
    ("aio",): {
        "block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds",
    },
    ("activation_checkpointing",): {
        "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
        "number_checkpoints", "synchronize_checkpoint_boundary", "profile",
    },
}  # fmt: skip
"""A section's place -> its keys; sections that are not here only tell of a run, and DeepSpeed checks them."""
KEYS["bfloat16",] = KEYS["bf16",]
_ELSEWHERE: Final = {
    "pipeline", "tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism", "hybrid_engine",
    "autotuning", "compile", "data_efficiency", "weight_quantization", "checkpoint", "datastates_ckpt",
}  # fmt: skip
"""DeepSpeed's, of which a run here uses nothing."""


def check_keys(table: Table) -> list[str]:
    """One line for each key that DeepSpeed does not know, and for each section that is no table."""
    problems = []
    for path, known in KEYS.items():
        section: Any = table
        for key in path:
            section = section.get(key) if isinstance(section, dict) else None
        if section is None:
            continue
        place = ".".join(("deepspeed", *path))
        if not isinstance(section, dict):
            problems.append(f"`{place}` ({section!r}) must be a table, as in {{}}.")
            continue
        for key in sorted(set(section) - known):
            if not path and key in _ELSEWHERE:
                problems.append(f"`{place}.{key}`: a run here uses nothing of it. Delete it.")
            else:
                meant = nearest(key, known)
                problems.append(f"`{place}.{key}` is no setting of DeepSpeed's.{meant} Correct or delete it.")
    return problems
