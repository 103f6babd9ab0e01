"""One device's share of the engine: resolves what is still automatic, loads the model, lays out the cache, runs steps.

Every check that can be made without reading a weight is made before one is read. On a device with memory of its own the
cache gets what is left there when the weights are loaded and the largest step has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minivllm.attention.backend import AttentionBackend, AttentionSpec
from minivllm.attention.registry import select_backend
from minivllm.config.compilation import read_compilation
from minivllm.config.engine import EngineConfig
from minivllm.config.profiler import read_profiler_config
from minivllm.config.scheduler import step_limits
from minivllm.exceptions import ConfigError
from minivllm.layers.linear import batch_invariant
from minivllm.logger import init_logger
from minivllm.logits_processors import load_logits_processors
from minivllm.messages.engine import SLEEPING_PARTS
from minivllm.messages.kv_cache import KVCacheGroup, KVCacheSpec
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady
from minivllm.models import loader
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.models.registry import load_class
from minivllm.ops import cuda
from minivllm.ops.native import MemoryTaker
from minivllm.ops.op import NoImplementation, OpSpec
from minivllm.platforms.platform import Platform, detect
from minivllm.sample.custom import CustomProcessors
from minivllm.sample.sampler import Sampler
from minivllm.worker import kv_layout, largest_step, memory, warm_up
from minivllm.worker.device_sampling import DeviceSampling, Handle
from minivllm.worker.model_runner import ModelRunner
from minivllm.worker.profiler import WorkerProfiler
from minivllm.worker.sleeping import Sleeping

logger = init_logger(__name__)

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
}


class Worker:
    """Built cheaply; `initialize` does the work and may be called once."""

    def __init__(self, config: EngineConfig, platform: Platform | None = None) -> None:
        """platform: None for the one that the configuration and this machine give."""
        self.config = config
        self.platform = detect(config.device) if platform is None else platform
        self._captures = read_compilation(config.compilation, enforce_eager=config.model.enforce_eager)
        self._plans_in_flight = config.scheduler.max_plans_in_flight(leaves_host_free=not self.platform.is_host)
        self.runner: ModelRunner | None = None
        self.memory_taker: MemoryTaker | None = None
        self._sleeping: Sleeping | None = None
        profiler = read_profiler_config(config.observability.profiler_config)
        self._profiler = WorkerProfiler(profiler) if profiler.is_on else None

    @torch.inference_mode()
    def initialize(self, on_progress: Callable[[str], None]) -> WorkerReady:
        """Load the model and lay out the KV cache; what was resolved.

        Raises:
            ModelFilesError: the checkpoint is not what config.json says, or not whole.
            ConfigError: the model does not fit the machine or the arguments.
        """
        config, platform = self.config, self.platform
        platform.prepare(config.cpu)
        self._say_if_async()
        on_progress("checking the model")
        self._check_options()
        custom = self._custom_processors()
        dtype = resolve_dtype(config.model.dtype, config.hf_config.dtype)
        if dtype not in platform.supported_dtypes:
            raise ConfigError(f"--dtype {name_of(dtype)} is not served on {platform.name}")
        max_model_len = resolve_max_model_len(config)
        free_bytes = platform.memory_available_bytes()  # before anything of the model is there
        backend = self._attention_backend(dtype)
        model = self._build_model(backend, max_model_len)
        plan = self._check_files(model)
        size, (max_num_batched_tokens, max_num_seqs) = self._size_cache_and_step(
            model, backend, max_model_len, free_bytes
        )

        on_progress("loading weights")

        def load() -> None:
            if plan is None:
                scale = config.hf_config.initializer_range
                loader.load_dummy(model, dtype, config.model.seed, scale, device=platform.device)
            else:
                loader.load_weights(plan, dtype, platform, show_progress=config.load.use_tqdm_on_load)

        if platform.is_host:
            load()
        else:
            # What came beside the weights stays: the device's own memory for the first kernels of all.
            beside = max(0, platform.kept_bytes_of(load) - _weight_bytes(model))
            on_progress("measuring the largest step")
            measured = self._measure_step(model, backend, max_num_batched_tokens, max_num_seqs, size)
            measured = replace(measured, step_bytes=measured.step_bytes + beside)
            size, (max_num_batched_tokens, max_num_seqs) = self._size_cache_and_step(
                model, backend, max_model_len, free_bytes, measured
            )

        on_progress("laying out the KV cache")
        # Untouched pages take no memory: they are the system's until a block is written.
        tensors = [backend.new_kv_cache(size.num_blocks) for _ in range(size.spec.num_layers)]
        self._take_memory(tensors)
        self.runner = self._new_runner(
            model, backend, tensors, custom, size, max_num_batched_tokens, max_num_seqs
        )
        weights = [tensor for weight in model.weights() for tensor in weight.tensors]
        self._sleeping = Sleeping(platform, weights, tensors, load)
        if self.runner.capture_shapes is not None:
            on_progress("capturing decode steps")
            self._capture()
        self.runner.check_recording()
        return WorkerReady(
            max_model_len=size.max_model_len,
            num_blocks=size.num_blocks,
            block_size=size.block_size,
            kv_cache_bytes=size.num_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            dtype=name_of(dtype),
            numerics_id="-".join(
                filter(
                    None,
                    [platform.numerics_id, self._kernels_id(dtype), backend.numerics_id, config.model.quantization],
                )
            ),
            kv_cache_groups=tuple(size.spec.groups),
            plans_in_flight=self._plans_in_flight,
        )

    def execute_model(self, plan: SchedulerOutput) -> None:
        """Run the model on a plan's tokens."""
        if self._profiler is not None:
            self._profiler.before_step()
        if self.memory_taker is not None and plan.total_num_scheduled_tokens > len(plan.num_scheduled_tokens):
            self.memory_taker.hold(True)  # a prompt's step allocates
        try:
            self._initialized().execute_model(plan)
        except BaseException:
            self._let_memory_be_taken()  # there may be no sampling
            raise

    def sample_tokens(self, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample from the last `execute_model`; `grammar` says where not freely."""
        try:
            return self._initialized().sample_tokens(grammar)
        finally:
            self._end_step()

    def start_profile(self, prefix: str, delay: int | None, most: int | None) -> bool:
        """Record the steps to come; see WorkerProfiler."""
        assert self._profiler is not None, "asked for only where --profiler-config says where to write"
        return self._profiler.start(prefix, delay, most)

    def stop_profile(self) -> list[str]:
        """The files of the recording."""
        assert self._profiler is not None
        return self._profiler.stop()

    def sleep(self, level: int) -> None:
        """Give memory back as `sleeping.py` says. No step may follow before `wake_up`."""
        if self.memory_taker is not None:
            self.memory_taker.stop()
        before = self.platform.process_memory_bytes()
        self._initialized().forget_captures()
        self._sleeping.sleep(level)
        after = self.platform.process_memory_bytes()
        logger.info("asleep at level %d: %s of memory, before %s", level, memory.gib(after), memory.gib(before))

    def wake_up(self, parts: Sequence[str] = SLEEPING_PARTS) -> None:
        """Have memory again, as `Sleeping.wake_up`; the cache's comes as at the start."""
        runner = self._initialized()
        woken = self._sleeping.wake_up(parts)
        if "kv_cache" in woken:
            self._take_memory(list(runner.kv_caches))
        if woken and self._sleeping.is_awake:
            runner.record()
            if runner.capture_shapes is not None:
                self._capture()

    @property
    def is_asynchronous(self) -> bool:
        """Whether there is `start_sampling`, so that the next step need not wait for this one's tokens."""
        return self._initialized().is_asynchronous

    def start_sampling(self, grammar: GrammarOutput | None) -> Handle:
        """As `sample_tokens`; the handle's `result()` waits."""
        try:
            return self._initialized().start_sampling(grammar)
        finally:
            self._end_step()

    def _end_step(self) -> None:
        """All of the step has been given to the device, if it is not done: a recording that ends now waits for that."""
        self._let_memory_be_taken()
        if self._profiler is not None:
            self._profiler.after_step()

    def _let_memory_be_taken(self) -> None:
        if self.memory_taker is not None:
            self.memory_taker.hold(False)

    def shutdown(self) -> None:
        """Let go of the model and the cache. May be called again."""
        if self.memory_taker is not None:
            self.memory_taker.stop()
        self.runner = self._sleeping = self.memory_taker = None

    def _initialized(self) -> ModelRunner:
        assert self.runner is not None, "initialize comes first, and nothing after shutdown"
        return self.runner

    # Start -------------------------------------------------------------------

    def _say_if_async(self) -> None:
        if self._plans_in_flight > 1 and self.config.scheduler.async_scheduling is None:
            logger.info(
                "async scheduling is on: the next step is planned while %s runs this one; --no-async-scheduling "
                "turns it off",
                self.platform.name,
            )

    def _take_memory(self, caches: list[torch.Tensor]) -> None:
        if self.config.cache.touch_kv_cache and self.platform.is_host:
            self.memory_taker = MemoryTaker(caches)

    def _check_options(self) -> None:
        """Refuse what this platform does not have."""
        if self.platform.graphs is None and self._captures.asks_for_graphs:
            raise ConfigError(
                f"{self.platform.name} captures no graphs; leave out cudagraph_capture_sizes, "
                "max_cudagraph_capture_size and cudagraph_capture_at_start"
            )
        if self.config.model.quantization == "fp8" and not self.platform.has_fp8:
            raise ConfigError(
                f"--quantization fp8 needs a GPU of compute capability 8.9 or above, and this is {self.platform.name}; "
                "try --quantization int8"
            )
        if self.config.model.quantization == "int4" and not self.platform.is_host:
            raise ConfigError(
                f"--quantization int4 is there on CPUs only, and this is {self.platform.name}; try --quantization int8"
            )

    def _attention_backend(self, dtype: torch.dtype) -> AttentionBackend:
        hf, block_size = self.config.hf_config, self.config.cache.block_size
        block_size = self.platform.default_block_size if block_size is None else block_size
        self.platform.check_block_size(block_size)
        return select_backend(
            AttentionSpec(
                num_heads=hf.num_attention_heads,
                num_kv_heads=hf.num_key_value_heads,
                head_dim=hf.head_dim,
                block_size=block_size,
                dtype=dtype,
                device=self.platform.device,
                kv_cache_dtype=self.config.cache.kv_cache_dtype,
                batch_invariant=self.config.device.batch_invariant,
                cuda_decode=self.config.device.cuda_decode_attention,
            )
        )

    def _custom_processors(self) -> CustomProcessors | None:
        classes = load_logits_processors(self.config.model.logits_processors)
        if not classes:
            return None
        device = torch.device("cpu")  # where they see logits, on every platform
        try:
            return CustomProcessors(lambda: [each(self.config, device, False) for each in classes])
        except Exception as error:  # a constructor of the operator's
            raise ConfigError(f"logits_processors: {type(error).__name__}: {error}") from error

    def _build_model(self, backend: AttentionBackend, max_model_len: int) -> DecoderForCausalLM:
        """The model without its weights: pages that nobody has touched."""
        model_class = load_class(self.config.model_class)
        quantization = self.config.model.quantization
        if self.config.device.batch_invariant:
            quantization = batch_invariant(quantization)
        try:
            return model_class(self.config.hf_config, backend, max_model_len, quantization)
        except NoImplementation as error:
            raise ConfigError(f"this model cannot run on {self.platform.name}: {error}") from error

    def _kernels_id(self, dtype: torch.dtype) -> str:
        """What another installation on such a device may lack, and would do by others with other bits."""
        device, sizes = self.platform.device, {"vocab_size": self.config.hf_config.vocab_size}
        has_few_rows = cuda.few_rows_why_not(OpSpec(device, dtype)) is None
        truncates = cuda.truncation_why_not(OpSpec(device, torch.float32, sizes)) is None
        names = ["few_rows"] if has_few_rows and not self.config.device.batch_invariant else []
        return "-".join(names + (["cuda_truncation"] if truncates else []))

    def _check_files(self, model: DecoderForCausalLM) -> loader.LoadPlan | None:
        """What will be read from where; None for made-up weights."""
        if self.config.load.load_format == "dummy":
            return None
        return loader.make_plan(model, loader.check_files(Path(self.config.model.model)))

    def _new_runner(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        tensors: list[torch.Tensor],
        custom: CustomProcessors | None,
        size: memory.KVCacheSize,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> ModelRunner:
        """tensors: the KV cache's, one for each layer of the largest group."""
        places = kv_layout.places(size.spec.groups)
        return ModelRunner(
            model,
            backend,
            [tensors[place] for _, place in places],
            Sampler(self.config.hf_config.vocab_size, self.config.model.logprobs_mode, custom=custom),
            max_model_len=size.max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            group_of_layer=[group for group, _ in places],
            enforce_eager=self._captures.is_off,
            captures=self._captures,
            platform=self.platform,
        )

    def _capture(self) -> None:
        """Captures before the first request: all of them if that is asked for, else the largest.

        The largest comes first in any case: what it allocates then serves all others.
        """
        shapes = list(self.runner.capture_shapes)
        if not self._captures.at_start:
            shapes = shapes[:1]
        show = self.config.load.use_tqdm_on_load and len(shapes) > 1
        for num_rows, max_seq_len in tqdm(shapes, desc="Capturing decode steps", unit="", disable=not show):
            self.runner.capture(num_rows, max_seq_len)

    def _measure_step(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        num_tokens: int,
        num_seqs: int,
        size: memory.KVCacheSize,
    ) -> memory.Measured:
        """What the largest step takes as it runs, and what captured decodes will keep beside it."""
        most_tokens = min(num_tokens, num_seqs * size.max_model_len)

        def step() -> None:
            largest_step.run(model, backend, most_tokens, num_seqs)

        # The first brings what stays: kernels, the memory that the driver sets aside for them, workspaces of libraries.
        step_bytes = self.platform.kept_bytes_of(step)
        step_bytes += self.platform.peak_bytes_of(step)
        step_bytes += backend.scratch_bytes(min(num_seqs, num_tokens), size.max_model_len)
        step_bytes += DeviceSampling.num_bytes(self.config.hf_config.vocab_size)
        runners: list[ModelRunner] = []

        def make_runner() -> None:
            tensors = [backend.new_kv_cache(1)] * size.spec.num_layers
            runner = self._new_runner(model, backend, tensors, None, size, num_tokens, num_seqs)
            warm_up.run(runner, num_tokens, num_seqs)
            runners.append(runner)

        # The buffers of a step's inputs, and what the first requests of each kind bring: block tables, counts, kernels.
        step_bytes += self.platform.kept_bytes_of(make_runner)
        runner = runners.pop()
        if runner.capture_shapes is None:
            return memory.Measured(step_bytes)
        largest, *others = runner.capture_shapes
        # The first makes the places that all share; what each of the others takes is its own, whatever its size.
        graph_bytes = self.platform.kept_bytes_of(partial(runner.capture, *largest))
        if others:
            graph_bytes += len(others) * self.platform.kept_bytes_of(partial(runner.capture, *others[-1]))
        runner.forget_captures()
        self.platform.release_unused()
        return memory.Measured(step_bytes, graph_bytes, runner.most_captures)

    def _size_cache_and_step(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        max_model_len: int,
        free_bytes: int,
        measured: memory.Measured | None = None,
    ) -> tuple[memory.KVCacheSize, tuple[int, int]]:
        """The cache, max_num_batched_tokens and max_num_seqs.

        free_bytes: before anything of the model was there; measured: what steps take, None: about.

        With max_model_len `auto` the length follows from the cache, the cache from what a step needs, and without
        chunked prefill the step from the length. The least step gives a length that a larger step can only shorten:
        a step of that length is large enough.
        """
        config = self.config
        is_auto = config.model.max_model_len == "auto"
        limits = step_limits(config.scheduler, config.usage, 0 if is_auto else max_model_len)
        size, budget = self._size_cache(model, backend, max_model_len, limits, free_bytes, measured)
        if is_auto and not config.scheduler.enable_chunked_prefill:
            limits = step_limits(config.scheduler, config.usage, size.max_model_len)
            size, budget = self._size_cache(model, backend, size.max_model_len, limits, free_bytes, measured)
        if self.platform.is_host or measured is not None:
            logger.info("%s", memory.describe(size, budget))
        return size, limits

    def _size_cache(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        max_model_len: int,
        limits: tuple[int, int],
        free_bytes: int,
        measured: memory.Measured | None,
    ) -> tuple[memory.KVCacheSize, memory.Budget]:
        config = self.config
        dtype_bytes = backend.spec.dtype.itemsize
        step_tokens = limits[0] * self._plans_in_flight
        groups = self._kv_cache_groups(model, backend.spec.block_size, max_model_len, step_tokens)
        spec = KVCacheSpec(
            block_size=backend.spec.block_size,
            block_bytes=backend.block_bytes,
            num_layers=kv_layout.layers_per_block(groups),
            layout_id=backend.layout_id,
            groups=groups,
            step_tokens=step_tokens,
        )
        if measured is None:
            measured = memory.Measured(memory.step_bytes(config.hf_config, *limits, dtype_bytes))
        weight_bytes = _weight_bytes(model)
        cache = config.cache
        if self.platform.is_host:
            budget = memory.Budget(
                limit_bytes=self.platform.memory_limit_bytes(),
                available_bytes=self.platform.memory_available_bytes(),
                weight_bytes=weight_bytes,
                step_bytes=measured.step_bytes,
                process_bytes=self.platform.process_memory_bytes(),
            )
        else:
            # A share of what was free: what others hold of the device is not ours to count on.
            budget = memory.Budget(
                free_bytes,
                free_bytes,
                weight_bytes,
                measured.step_bytes,
                graph_bytes=measured.graph_bytes,
                num_graphs=measured.num_graphs,
            )
            if cache.gpu_memory_utilization is None:
                cache = replace(cache, gpu_memory_utilization=self.platform.default_memory_utilization)
        is_auto = config.model.max_model_len == "auto"
        return memory.size_kv_cache(cache, spec, budget, max_model_len, is_auto=is_auto), budget

    def _kv_cache_groups(
        self, model: DecoderForCausalLM, block_size: int, max_model_len: int, step_tokens: int
    ) -> tuple[KVCacheGroup, ...]:
        if self.config.cache.disable_hybrid_kv_cache_manager:
            return kv_layout.all_full(len(model.sliding_windows))
        return kv_layout.group_layers(
            model.sliding_windows, max_model_len=max_model_len, step_tokens=step_tokens, block_size=block_size
        )


def _weight_bytes(model: DecoderForCausalLM) -> int:
    return sum(weight.num_bytes for weight in model.weights())


def resolve_dtype(asked: str, checkpoint: str | None) -> torch.dtype:
    """The type of weights and activations; `auto` is the checkpoint's own, bfloat16 where it names none."""
    return _DTYPES[(checkpoint or "bfloat16") if asked == "auto" else asked]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_max_model_len(config: EngineConfig) -> int:
    """The longest prompt plus output: as asked, or what the model allows (`auto` may shorten it later).

    Raises:
        ConfigError: more is asked for than the model allows.
    """
    allowed = config.hf_config.max_context
    asked = config.model.max_model_len
    if asked is None or asked == "auto":
        return allowed
    if asked > allowed:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {allowed} tokens that config.json allows "
            "(max_position_embeddings and its rope scaling); lower it"
        )
    return asked
