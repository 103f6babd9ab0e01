"""The product of queries, keys and values, then head norms, rotation and cache write: one kernel beside two.

    python benchmarks/qkv.py [--rows 1 16 64 2048] [--weights bf16 int8 int4] [--cache bfloat16 int8] [--times 15]

Sizes are those of the Qwen3-0.6B shape in bfloat16. Weights are read cold, 80 MB of them in turn. Up to 64 rows are
one token each of as many requests, so that a key has 64 lines of its own and a value 8; more rows are one prompt's.
Both ways in turns, the bits compared first: µs a layer, best (median). Each takes its output's memory anew, as a
recorded step does not. Both write to the cache themselves; in the engine a step of 2 to 64 tokens over a cache in
bfloat16 leaves that to attention.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from minivllm.ops import kv_write, native, rotary, rotary_kv_write
from minivllm.ops.kv_layout import KvLayout
from minivllm.ops.linear import PackedLinear
from minivllm.ops.linear_int4 import PackedInt4Linear
from minivllm.ops.linear_int8 import PackedInt8Linear

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 1024, 16, 8, 128, 128
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
REQUESTS, CONTEXT = 64, 512
WEIGHTS = {"bf16": PackedLinear, "int8": PackedInt8Linear, "int4": PackedInt4Linear}
BF16 = torch.bfloat16
COLD_BYTES = 80 << 20


class Layers:
    """So many layers' weights that no cache holds them, and a few layers' caches."""

    def __init__(self, weights: str, cache: str, rows: int) -> None:
        cls = WEIGHTS[weights]
        self.layers = [cls(WIDTH, HIDDEN, BF16)]
        self.layers += [cls(WIDTH, HIDDEN, BF16) for _ in range(COLD_BYTES // self.layers[0].nbytes)]
        weight = torch.randn(WIDTH, HIDDEN).mul_(HIDDEN**-0.5).to(BF16)
        for layer in self.layers:
            layer.load_rows(0, weight)
        self.layout = KvLayout(cache, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        shape = self.layout.shape(REQUESTS * CONTEXT // BLOCK_SIZE)
        self.caches = [native.huge_pages(REQUESTS * CONTEXT // BLOCK_SIZE * self.layout.block_bytes) for _ in range(4)]
        self.caches = [cache.view(shape).zero_() for cache in self.caches]
        self.x = torch.randn(rows, HIDDEN).to(BF16)
        angles = torch.rand(4096, HEAD_DIM // 2)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        ones = torch.ones(HEAD_DIM, dtype=BF16)
        self.norms = rotary.HeadNorms(ones, ones, 1e-6)
        self.step = 0

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and slots of the next step, elsewhere than those of the last ones."""
        self.step += 1
        each = torch.arange(len(self.x))
        if len(each) > REQUESTS:
            return each, (self.step * len(each) + each) % (REQUESTS * CONTEXT)
        positions = (self.step * 80 + self.step // 32 + each * 3) % CONTEXT
        return positions, each * CONTEXT + positions

    def one_after_the_other(self, index: int, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        heads = self.layers[index](self.x).view(len(self.x), -1, HEAD_DIM)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cache = self.caches[index % len(self.caches)]
        rotary_kv_write.cpu(positions, q, k, v, self.cos_sin, self.norms, cache, slots, layout=self.layout)
        return q

    def together(self, index: int, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        place = kv_write.KvPlace(self.caches[index % len(self.caches)], slots, self.layout)
        turn = rotary.Turn(positions, self.cos_sin, self.norms)
        return self.layers[index].turn_and_write(self.x, None, turn, place)

    def seconds(self, way: Callable[..., torch.Tensor]) -> float:
        """Of a layer."""
        places = [self.places() for _ in self.layers]
        begin = time.perf_counter()
        for index, place in enumerate(places):
            way(index, *place)
        return (time.perf_counter() - begin) / len(places)

    def are_same(self) -> bool:
        places = self.places()
        results = []
        for way in (self.one_after_the_other, self.together):
            self.caches[0].zero_()
            results.append((way(0, *places).clone(), self.caches[0].clone()))
        return all(torch.equal(*pair) for pair in zip(*results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 2048])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--cache", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args()
    print("| weights | cache | rows | one after the other | together | ratio |\n|---|---|---|---|---|---|")
    for weights in args.weights:
        for cache in args.cache:
            for rows in args.rows:
                layers = Layers(weights, cache, rows)
                assert layers.are_same(), "the two ways differ"
                ways = (layers.one_after_the_other, layers.together)
                took = list(zip(*[[1e6 * layers.seconds(way) for way in ways] for _ in range(args.times)]))
                best, median = [min(each) for each in took], [statistics.median(each) for each in took]
                times = " | ".join(f"{b:.1f} ({m:.1f})" for b, m in zip(best, median))
                ratios = f"{best[1] / best[0]:.2f} ({median[1] / median[0]:.2f})"
                print(f"| {weights} | {cache} | {rows} | {times} | {ratios} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # two pools of threads would fight for the processors
    native.lib.stay_awake(True)
    with torch.inference_mode():
        main()
