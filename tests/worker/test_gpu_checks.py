"""The engine's checks of `python -m tests.gpu`, on the device that is none: that they run, and can fail."""

from __future__ import annotations

import pytest
import torch

from minivllm.attention import registry
from minivllm.ops.linear_fp8 import DenseFp8Linear, fp8_linear
from minivllm.ops.linear_int8 import DenseInt8Linear, int8_linear
from minivllm.ops.op import Impl
from minivllm.worker.device_sampling import DeviceSampling
from minivllm.worker.penalty_counts import PenaltyCounts
from tests.gpu import engine
from tests.worker.fake_device import FakeDevice

DEVICE = engine.Device("cpu", lambda batch_invariant: FakeDevice(), dtype="float32")


@pytest.fixture(autouse=True)
def its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", ["tests.worker.fake_device:FakeDeviceBackend"])
    monkeypatch.setattr(fp8_linear, "implementations", [Impl(DenseFp8Linear)])  # a CPU serves none
    monkeypatch.setattr(FakeDevice, "has_fp8", True, raising=False)


@pytest.mark.parametrize("name", [name for name in engine.CHECKS if name != "engine_memory_accounting"])
def test_it_finds_nothing_where_there_is_nothing(name: str):
    finding = engine.CHECKS[name](DEVICE)
    assert finding.difference <= finding.tolerance


def test_a_token_of_another_request_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DeviceSampling, "complete", lambda self, batch: None)
    assert engine.schedule_independence(DEVICE).difference > 0


def test_counts_that_stand_still_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PenaltyCounts, "_catch_up", lambda self, slots, batch, last_ids: None)
    assert engine.sampling_as_on_the_host(DEVICE).difference > 0


@pytest.mark.parametrize("name", ["quantization_fp8", "quantization_int8"])
def test_scales_that_are_wrong_are_found(name: str, monkeypatch: pytest.MonkeyPatch):
    reference = {"quantization_fp8": DenseFp8Linear, "quantization_int8": DenseInt8Linear}[name]
    quantise = reference.quantise

    def off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scales = quantise(x)
        return numbers, 1.5 * scales

    monkeypatch.setattr(reference, "quantise", staticmethod(off))
    monkeypatch.setattr(int8_linear, "implementations", [Impl(DenseInt8Linear)])
    finding = engine.eight_bits(DEVICE, name)
    assert finding.difference > finding.tolerance
