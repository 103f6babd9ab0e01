"""The tile products that benchmarks/roofline.py takes for the most this processor can do: counted, not checked."""

import pytest

from minivllm.utils import native


@pytest.mark.parametrize(("dtype", "flop"), [("bfloat16", 2 * 16 * 16 * 32), ("int8", 2 * 16 * 16 * 64)])
def test_operations_are_those_of_all_threads(dtype, flop, isa, num_threads):
    done = native.lib.peak_products(dtype, 3)
    assert done == (num_threads * 3 * 32 * flop if isa == "amx" else 0)


def test_another_type_is_refused_by_name():
    with pytest.raises(ValueError, match="float32"):
        native.lib.peak_products("float32", 1)
