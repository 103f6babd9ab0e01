"""What can be said of the CUDA platform without a card: when it is chosen, its name, and that a CPU never pays."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from minivllm.config.device import DeviceConfig
from minivllm.engine.arg_utils import EngineArgs
from minivllm.exceptions import ConfigError
from minivllm.platforms import platform as platforms
from minivllm.platforms.cpu import CpuPlatform
from minivllm.platforms.platform import detect


def pretend(monkeypatch: pytest.MonkeyPatch, *, capability=(9, 0), triton: bool = True) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.0")


def test_a_card_is_used_where_there_is_one_unless_the_cpu_is_asked_for(monkeypatch):
    pretend(monkeypatch)
    assert detect().name == "cuda"
    assert isinstance(detect(DeviceConfig(device="cpu")), CpuPlatform)


def test_its_numerics_are_the_cards_and_the_libraries(monkeypatch):
    pretend(monkeypatch)
    name = f"cuda-NVIDIA_H200-sm90-torch{torch.__version__}-triton3.6.0"
    assert detect().numerics_id == name
    assert detect(DeviceConfig(batch_invariant=True)).numerics_id == f"{name}-invariant"


@pytest.mark.parametrize(
    "lacks, reason",
    [({"capability": (7, 5)}, "7.5; 8.0 is the least"), ({"triton": False}, "pip install triton")],
)
def test_a_card_that_cannot_serve_is_passed_over_and_refused_where_it_is_asked_for(
    monkeypatch, lacks, reason
):
    pretend(monkeypatch, **lacks)
    assert isinstance(detect(), CpuPlatform)
    with pytest.raises(ConfigError, match=reason):
        detect(DeviceConfig(device="cuda"))


def test_8_bit_floats_need_ada_or_hopper(monkeypatch):
    for capability, has_fp8 in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        pretend(monkeypatch, capability=capability)
        assert detect().has_fp8 is has_fp8


def test_cuda_is_refused_with_the_reason_where_there_is_none():
    with pytest.raises(ConfigError, match="--device cuda: torch .*--device cpu"):
        detect(DeviceConfig(device="cuda"))
    assert platforms.cuda_why_not() is not None


def test_a_cpu_never_imports_triton_nor_the_cuda_kernels_nor_asks_for_cuda():
    code = """
import sys, torch
torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit(2)
from minivllm.platforms.platform import detect
from minivllm.config.cpu import CpuConfig
import minivllm.worker.worker
detect().prepare(CpuConfig())
sys.exit(any(name in sys.modules for name in ("triton", "minivllm._cuda", "minivllm.platforms.cuda")))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_flags_are_ours_and_a_block_of_16_is_the_workers_to_check_on_a_card(tiny_model):
    def parsed(**options):
        return EngineArgs(model=str(tiny_model), **options).create_engine_config()

    assert parsed(device="cuda", block_size=16, batch_invariant=True).device == DeviceConfig("cuda", True)
    assert not parsed(cuda_decode_attention=False).device.cuda_decode_attention
    with pytest.raises(ConfigError, match="device='tpu'"):
        parsed(device="tpu")
    with pytest.raises(ConfigError, match="block_size=16 must be a multiple of 32"):
        parsed(block_size=16)
