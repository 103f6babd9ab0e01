"""Every case by name."""

from tests.gpu.cases import attention, elementwise, sampling

ALL_CASES = {**attention.CASES, **elementwise.CASES, **sampling.CASES}
