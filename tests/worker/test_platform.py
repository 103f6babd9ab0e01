"""How much memory the CPU platform says there is, from made-up control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from minivllm.exceptions import ConfigError
from minivllm.platforms.cpu import CpuPlatform
from minivllm.platforms.platform import detect

MIB = 1 << 20


def write(group: Path, **files: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(f"{text}\n")


def test_version_2_takes_the_least_limit_on_the_way_up(tmp_path: Path):
    write(
        tmp_path / "a",
        memory__max=300 * MIB,
        memory__current=250 * MIB,
        memory__stat=f"inactive_file {100 * MIB}",
    )
    write(tmp_path / "a" / "b", memory__max="max", memory__current=10 * MIB)
    platform = CpuPlatform(cgroup_root=tmp_path, membership="0::/a/b\n")
    assert platform.memory_limit_bytes() == 300 * MIB
    assert platform.memory_available_bytes() == 150 * MIB  # the page cache's inactive part can be reclaimed


def test_version_1_is_read_where_its_controller_is_mounted(tmp_path: Path):
    unlimited = 9223372036854771712
    write(tmp_path / "memory", memory__limit_in_bytes=unlimited)
    write(
        tmp_path / "memory" / "x",
        memory__limit_in_bytes=200 * MIB,
        memory__usage_in_bytes=50 * MIB,
        memory__stat=f"cache 5\ntotal_inactive_file {20 * MIB}",
    )
    platform = CpuPlatform(cgroup_root=tmp_path, membership="5:cpu:/y\n4:memory:/x\n0::/\n")
    assert platform.memory_limit_bytes() == 200 * MIB
    assert platform.memory_available_bytes() == 170 * MIB


def test_a_group_seen_from_inside_its_own_namespace_is_the_root(tmp_path: Path):
    write(tmp_path, memory__max=123 * MIB)
    platform = CpuPlatform(cgroup_root=tmp_path, membership="0::/not/visible/here\n")
    assert platform.memory_limit_bytes() == 123 * MIB


def test_without_control_groups_it_is_the_machines_memory(tmp_path: Path):
    platform = CpuPlatform(cgroup_root=tmp_path / "none", membership="")
    assert platform.memory_limit_bytes() == psutil.virtual_memory().total
    assert 0 < platform.memory_available_bytes() <= platform.memory_limit_bytes()


def test_this_machine_has_a_platform():
    platform = detect()
    assert platform.graphs is None
    assert torch.float32 in platform.supported_dtypes
    assert platform.numerics_id.startswith("cpu-")
    assert 0 < platform.memory_available_bytes() <= platform.memory_limit_bytes()


@pytest.mark.parametrize("block_size", [0, -32, 16, 48])
def test_a_block_that_no_kernel_takes_is_refused_with_the_reason(block_size: int):
    with pytest.raises(ConfigError, match=rf"--block-size {block_size} is not a multiple of 32.*128"):
        detect().check_block_size(block_size)
