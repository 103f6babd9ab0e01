"""Every case by name."""

from tests.gpu.cases import attention, elementwise, linear, sampling

ALL_CASES = {**attention.CASES, **elementwise.CASES, **linear.CASES, **sampling.CASES}
