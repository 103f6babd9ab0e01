"""The Triton kernels through the compiler, for cards that are not here: what the interpreter accepts it may refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of attention what a bfloat16 model of head size 128 uses; of the rest all.
CASES = ["attention_mixed_h", "attention_decode_h", "attention_mixed_i", "attention_mixed_all", "~attention"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_kernel_compiles_and_fits_the_card(arch):
    command = [sys.executable, "-m", "tests.gpu.compiler", "--arch", arch, "--only", *CASES]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_attend_kernel" in done.stdout and "_peak_kernel" in done.stdout
