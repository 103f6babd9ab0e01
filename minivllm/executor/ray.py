"""The worker as one Ray actor in a placement group, in a cluster that is there or one we start.

Owns the actor, the placement group and, if we started it, the cluster. What moves is bytes that we encoded
(see ray_worker.py). A cluster of ours listens on loopback only, and its files live in a private directory.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from minivllm.config.cpu import CpuConfig
from minivllm.exceptions import ConfigError, EngineError, ModelFilesError
from minivllm.executor.abstract import Executor
from minivllm.executor.ray_worker import RayWorker, Reply
from minivllm.logger import init_logger
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput, WorkerReady
from minivllm.utils.sockets import RunDirectory

logger = init_logger(__name__)

_PLACEMENT_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 3.0
_OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; plans and results are small and travel inline
_LONGEST_SOCKET = len("session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store")


class RayExecutor(Executor):
    """One actor. RAY_ADDRESS in the environment names a cluster to join; without it we start our own."""

    worker_class = "minivllm.worker.worker:Worker"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.scheduler.async_scheduling:  # the actor takes its calls in order, so it may have two
            self.max_concurrent_batches = 2
        self._ray: Any = None
        self._has_joined = False
        self._stopping = False
        self._run_directory: RunDirectory | None = None
        self._placement_group = self._actor = self._watcher = None

    def initialize(self) -> WorkerReady:
        self._ray = _import_ray()
        self._has_joined = self._ray.is_initialized()  # this program's own connection; we leave it open
        self._decode_reply, self._decode_output = Decoder(Reply), Decoder(ModelRunnerOutput)
        self._connect()
        self._place()
        self._start_actor()
        self.on_progress("loading the model in a Ray actor")
        ready = Decoder(WorkerReady)(self._fetch(self._actor.initialize.remote()))
        self.max_concurrent_batches = ready.plans_in_flight
        return ready

    # -- start

    def _connect(self) -> None:
        """Join the cluster of RAY_ADDRESS, or start one of our own; nothing if this program is connected already."""
        if self._has_joined:
            return
        quiet = {"logging_level": "ERROR", "configure_logging": True, "log_to_driver": True}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                self.on_progress(f"joining the Ray cluster at {address}")
                self._ray.init(address=address, **quiet)
            else:
                self.on_progress("starting a local Ray cluster")
                self._run_directory = RunDirectory(_LONGEST_SOCKET)
                self._ray.init(
                    address="local",
                    num_cpus=_num_cpus(self.config.cpu),
                    num_gpus=0,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(self._run_directory.path),
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"join the Ray cluster at {address}" if address else "start a local Ray cluster"
            raise ConfigError(
                f"cannot {where}: {' '.join(str(error).split())}; check `ray status` and RAY_ADDRESS, and set "
                "RAY_AUTH_MODE=token if the cluster asks for one"
            ) from error

    def _place(self) -> None:
        """Reserve what the actor needs, or say what is missing."""
        from ray.util import placement_group

        needed = {"CPU": float(_num_cpus(self.config.cpu))}
        self._placement_group = placement_group([needed])
        if not self._placement_group.wait(_PLACEMENT_TIMEOUT_S):
            available = {
                name: n for name, n in self._ray.available_resources().items() if name in ("CPU", "GPU")
            }
            raise ConfigError(
                f"the Ray cluster gave no placement group within {_PLACEMENT_TIMEOUT_S:.0f} s: {needed} is needed "
                f"on one node, {available or 'nothing'} is free in the cluster; set --cpu-threads, or free some"
            )

    def _start_actor(self) -> None:
        """Start the actor, and the thread that learns of its end."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote_class = self._ray.remote(concurrency_groups={"watch": 1})(RayWorker)
        self._actor = remote_class.options(
            num_cpus=_num_cpus(self.config.cpu),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=self._placement_group),
        ).remote(encode(self.config), self.worker_class)
        call = self._actor.watch.options(concurrency_group="watch").remote()
        self._watcher = threading.Thread(
            target=self._watch, args=(call,), name="watch-ray-actor", daemon=True
        )
        self._watcher.start()

    def _watch(self, call: Any) -> None:
        """Wait for the end of the actor; unless we ended it, report it."""
        try:
            self._ray.get(call)
            cause = "it returned"
        except Exception as error:  # Ray wraps every kind of end in one of its many errors
            cause = _reason(error)
        if not self._stopping:
            self.on_death(f"the Ray worker is gone: {cause}")

    # -- the verbs

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        self._actor.execute_model.remote(encode(plan))  # its failure comes with the sampling's reply
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        reply = self._actor.sample_tokens.remote(encode(grammar))
        return _Fetched(lambda: self._decode_output(self._fetch(reply)))

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        result = self._fetch(self._actor.call.remote(method, encode(list(args))))
        return [Decoder(Any)(result)]

    def _fetch(self, ref: Any) -> bytes:
        """Wait for a reply.

        Raises:
            ConfigError, ModelFilesError, EngineError: what the worker raised; or the actor is gone.
        """
        try:
            reply = self._decode_reply(self._ray.get(ref))
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"the Ray worker is gone: {_reason(error)}") from error
        if reply.failure is None:
            return reply.result
        if reply.exit_code is None:
            raise EngineError(reply.failure)
        raise (ModelFilesError if reply.exit_code == ModelFilesError.exit_code else ConfigError)(
            reply.failure
        )

    # -- end

    def shutdown(self) -> None:
        if self._stopping or self._ray is None:
            return
        self._stopping = True
        try:
            self._remove_actor()
        finally:
            if not self._has_joined:
                self._ray.shutdown()
            if self._run_directory is not None:
                self._run_directory.remove()

    def _remove_actor(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
            self._watcher.join(_STOP_TIMEOUT_S)
        if self._placement_group is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._placement_group)


class _Fetched(Future):
    """A future whose result is fetched when it is asked for."""

    def __init__(self, fetch: Callable[[], Any]) -> None:
        super().__init__()
        self._fetch = fetch

    def result(self, timeout: float | None = None) -> Any:
        return self._fetch()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS"):
        # These are read while ray is imported. The first name is historical: 0 keeps the addresses of a local
        # cluster on loopback, on every system.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A token of our own, so that no other user of the machine can join, and none is written to the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            '--distributed-executor-backend ray needs Ray: pip install "minivllm[ray]"'
        ) from error
    return ray


def _num_cpus(cpu: CpuConfig) -> int:
    """What the kernels' thread pool uses on this machine: --cpu-threads, else the processors this process may use, or
    fewer where a control group grants less time."""
    if cpu.cpu_threads is not None:
        return cpu.cpu_threads
    from minivllm.utils.native import lib

    return lib.num_threads() if lib is not None else os.cpu_count() or 1


def _reason(error: BaseException) -> str:
    """What happened, without the lines of fields that Ray puts before it."""
    text = str(error)
    start = max(text.find("The actor is dead"), 0)
    told = text[start:].partition("Some common causes")[0]
    return " ".join(told.split()) or type(error).__name__
