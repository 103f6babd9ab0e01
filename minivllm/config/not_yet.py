"""Options of vLLM, present and past, that this version does not have.

Naming one is an error that says so, rather than "unknown option": who moves a working command over learns what is
missing. An option moves from here to a config class when its feature lands. A value that asks for nothing beyond
what we do anyway is let pass.
"""

from __future__ import annotations

NOT_YET = frozenset(
    """
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains anthropic_disabled_thinking_effort
    attention_backend attention_config aux_output_config
    code_revision cohere_format cohere_is_reasoning_model collect_detailed_traces
    config_format convert cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb
    cpu_offload_params cudagraph_metrics custom_histogram_buckets data_parallel_address
    data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb
    data_parallel_rank data_parallel_rpc_port data_parallel_size data_parallel_size_local
    data_parallel_start_rank data_parallel_supervisor_port dbo_decode_token_threshold
    dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
    decode_context_parallel_size default_mm_loras device_ids
    device_memory_utilization diffusion_config disable_cascade_attn
    disable_chunked_mm_input disable_custom_all_reduce disable_log_requests
    disable_nccl_for_dp_synchronization disable_sliding_window distributed_timeout_seconds
    dp_supervisor_probe_failure_threshold dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s
    dp_sync_interval ec_manager_config ec_transfer_config elastic_ep_max_dp_size
    enable_batch_sharded_sampling enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter
    enable_eplb enable_expert_parallel enable_fault_tolerance enable_flash_late_interaction
    enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
    enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
    enable_moe_shared_loras enable_nccl_comm_suspend enable_offline_docs enable_per_request_metrics
    enable_prompt_adapter enable_reasoning
    enable_return_routed_experts enable_scale_out
    enable_shm_tensor_arena
    enable_tower_connector_lora enable_trace_replay engram_config eplb_config
    expert_placement_strategy fail_on_environ_validation
    fault_tolerance_config fingerprint_mode fingerprint_value fully_sharded_loras gdn_prefill_backend grpc
    grpc_port guided_decoding_backend headless hf_config_path
    hf_token ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode
    jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config
    kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample kv_offloading_backend
    kv_offloading_size kv_sharing_fast_prefill kv_transfer_config language_model_only limit_mm_per_prompt
    linear_backend logging_config
    long_prefill_token_threshold_adaptive lora_dtype lora_target_modules mamba_backend
    mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_ssm_cache_dtype
    mamba_ssu_algorithm master_addr master_port max_cpu_loras
    max_lora_cls_labels max_lora_rank max_loras
    max_num_scheduled_tokens max_parallel_loading_workers max_seq_len_to_capture media_io_kwargs
    mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode
    mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type mm_processor_device
    mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc model_class_overrides model_impl
    model_loader_extra_config moe_backend nnodes node_rank num_scheduler_steps num_speculative_tokens numa_bind
    numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group offload_params
    offload_prefetch_step optimization_level per_request_spec_decode_metrics
    performance_mode pipeline_parallel_size pooler_config preemption_mode prefill_context_parallel_size
    prefill_schedule_interval prefix_cache_retention_interval prefix_match_unit
    pt_load_map_location quantization_config ray_workers_use_nsight
    reasoning_config renderer_num_workers replayssm_buffer_len
    return_sampling_mask rope_scaling rope_theta runner safetensors_load_strategy
    safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls
    show_hidden_metrics_for_version skip_mm_profiling sleep_mode_offload_cudagraph
    sleep_preserve_parameter_names sparse_indexer_topk_backend spec_method spec_model spec_tokens
    specialize_active_lora speculative_config speculative_model swa_bounded_replay swap_space
    task tensor_parallel_size tokens_only tool_server
    trust_request_mm_kwargs ubatch_size use_fp64_gumbel use_replayssm
    use_v2_block_manager video_pruning_method video_pruning_rate watermark_config
    weight_transfer_config worker_cls worker_extension_cls
    """.split()
)

ALIASES = {
    "-ac": "attention_config",
    "-dc": "diffusion_config", "-dcp": "decode_context_parallel_size", "-dp": "data_parallel_size",
    "-dpa": "data_parallel_address", "-dpb": "data_parallel_backend", "-dpe": "data_parallel_external_lb",
    "-dph": "data_parallel_hybrid_lb", "-dpl": "data_parallel_size_local",
    "-dpm": "data_parallel_multi_port_external_lb", "-dpn": "data_parallel_rank", "-dpp": "data_parallel_rpc_port",
    "-dpr": "data_parallel_start_rank", "-ep": "enable_expert_parallel", "-n": "nnodes",
    "-pcp": "prefill_context_parallel_size", "-pp": "pipeline_parallel_size",
    "-r": "node_rank", "-sc": "speculative_config", "-tp": "tensor_parallel_size",
}  # fmt: skip

# What each of these says when it asks for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "config_format": ("auto", "hf"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "enable_lora": (False,),
    "model_impl": ("auto",),
    "nnodes": (1,),
    "pipeline_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "swap_space": (0,),
    "task": ("auto", "generate"),
    "tensor_parallel_size": (1,),
}


# Flags without a value that ask for what is so anyway. A --no-… of any of NOT_YET is another.
_NEUTRAL_FLAGS = ("disable_log_requests",)

_INSTEAD = {
    "aggregate_engine_logging": "leave it out; there is one engine and one log line",
    "data_parallel_size": "start one server per replica behind a load balancer instead",
    "enable_offline_docs": "leave it out; /openapi.json needs no network",
    "enable_per_request_metrics": "read the histograms of GET /metrics instead",
    "fail_on_environ_validation": "leave it out; an unknown MINIVLLM_ variable is an error anyway",
    "grpc": "use the HTTP API instead",
    "grpc_port": "use the HTTP API instead",
    "guided_decoding_backend": "there is one backend; --structured-outputs-config has its options",
    "headless": "leave it out; engine and API server run on one machine",
    "hf_token": "set the environment variable HF_TOKEN instead",
    "logging_config": "use --log-config-file and --log-level instead",
    "max_seq_len_to_capture": "leave it out; it has no use any more, in vLLM either",
    "num_scheduler_steps": "leave it out; it has no use any more, in vLLM either",
    "rope_scaling": "use --hf-overrides with rope_parameters instead",
    "rope_theta": "use --hf-overrides with rope_theta instead",
    "swap_space": "leave it out; a preempted request is computed again",
    "use_v2_block_manager": "leave it out; it has no use any more, in vLLM either",
}


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether an option of NOT_YET with this value (typed, or as typed on a command line) may be ignored."""
    return value is None or any(str(value) == str(neutral) for neutral in _NEUTRAL.get(name, ()))


def words_to_ignore(name: str, value: str | None) -> int | None:
    """How many words behind an option of NOT_YET on a command line may be ignored with it; None: it may not be.

    name: with underscores, perhaps with no_ before it; value: the word behind it, or None.
    """
    if name in _NEUTRAL_FLAGS or name.removeprefix("no_") in NOT_YET and name.startswith("no_"):
        return 0
    return 1 if value is not None and asks_for_nothing(name, value) else None


def refusal(name: str, spelling: str) -> str:
    """The error's text for an option of NOT_YET, spelt as the user did."""
    instead = _INSTEAD.get(name, "leave it out")
    return f"{spelling} is an option of vLLM that minivllm does not support yet; {instead}"
