"""What the loads cost at the least on a machine of a given roofline. Arithmetic only.

A decode step reads every weight once and each sequence's keys and values, and multiplies; the two overlap at best, the
cache's reading does not (attention waits for the projections before it). So

    step = max(GEMM, weights / bandwidth) + keys and values / bandwidth

Prefill is GEMM: 2 operations a weight of the layers and token, 4 · heads · head_dim operations for each pair of a token
and one before it; the vocabulary's matrix only for the tokens that are sampled. Exponentials are not counted.

Two floors, by what a GEMM is taken to cost: at the rate of the best kernel here for that number of rows, ours or
oneDNN's (what the aims are shares of), and at the peak of tile products, which is a bound that nothing can pass.

Three formats: bf16; int8, linear layers and cache of one byte an element; int4, where layers have half a byte and a
multiplier for each 128 (ops/linear_int4.py) and all else is as in int8, products too. Attention multiplies in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from roofline import Roofline, measure
from works import WORKS


@dataclass(frozen=True)
class ModelShape:
    """What a model's config.json says about work. Sizes in elements, bytes where named."""

    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int

    @staticmethod
    def read(model: Path) -> ModelShape:
        c = json.loads((model / "config.json").read_text())
        return ModelShape(
            c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
            c["hidden_size"], c["intermediate_size"], c["vocab_size"],
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Elements, of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.num_layers * (attention + 3 * self.hidden * self.inner)

    @property
    def vocab_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """That a decode step reads."""
        return self.layer_weights + self.vocab_weights

    @property
    def kv_elements(self) -> int:
        """Of one token."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim

    def attention_flop(self, num_tokens: int, num_before: int = 0) -> float:
        """Of `num_tokens` behind `num_before` that are cached."""
        pairs = num_tokens * num_before + num_tokens * (num_tokens + 1) / 2
        return 4 * self.num_layers * self.heads * self.head_dim * pairs

    def linear_flop(self, num_tokens: int) -> float:
        """Of a prompt: the layers, and one row of the vocabulary."""
        return 2 * self.layer_weights * num_tokens + 2 * self.vocab_weights


@dataclass(frozen=True)
class Format:
    """How elements are stored: bytes of one, scales of whole features not counted."""

    text: str
    layer_bytes: float
    vocab_bytes: float
    kv_bytes: float
    int8_products: bool  # of linear layers


FORMATS = {
    "bf16": Format("bf16", 2, 2, 2, int8_products=False),
    "int8": Format("int8 weights and cache", 1, 1, 1, int8_products=True),
    "int4": Format("int4 weights, int8 vocabulary and cache", 1 / 2 + 1 / 128, 1, 1, int8_products=True),
}


@dataclass(frozen=True)
class Floor:
    """Of one model, one roofline, one format and one choice of what a GEMM costs."""

    shape: ModelShape
    roof: Roofline
    format: Format = FORMATS["bf16"]
    at_peak: bool = False

    def _products(self, flop: float, rows: int, *, int8: bool) -> float:
        rate: Callable[..., float] = self.roof.product_seconds if self.at_peak else self.roof.gemm_seconds
        return rate(flop, rows, int8=int8)

    def _read_weights(self) -> float:
        layers, vocab = self.shape.layer_weights, self.shape.vocab_weights
        return self.roof.read_seconds(layers * self.format.layer_bytes + vocab * self.format.vocab_bytes)

    def prefill(self, num: int, num_in: int, before: int = 0, *, rows: int) -> float:
        """`num` prompts, `rows` of tokens at a time."""
        linear = self._products(num * self.shape.linear_flop(num_in), rows, int8=self.format.int8_products)
        attention = self._products(num * self.shape.attention_flop(num_in, before), rows, int8=False)
        steps = max(1, num * num_in / rows)
        return max(linear, steps * self._read_weights()) + attention

    def step(self, rows: int, kv_tokens: float) -> float:
        """A decode step of `rows` sequences that reads so many tokens' keys and values (each shared block once)."""
        gemm = self._products(2 * self.shape.weights * rows, rows, int8=self.format.int8_products) if rows > 1 else 0.0
        cache = self.roof.read_seconds(kv_tokens * self.shape.kv_elements * self.format.kv_bytes)
        return max(gemm, self._read_weights()) + cache

    def decode(self, num: int, begin: float, steps: int, shared: int = 0) -> float:
        """From `begin` tokens each; shared ones are read once a step."""
        return steps * self.step(num, num * (begin + steps / 2) + shared)

    def seconds(self, name: str) -> float | None:
        """The least a load can take; None for those that have no such floor."""
        widest = max(self.roof.bf16_tflops)
        if name == "W1":
            return WORKS[name].requests * (self.prefill(1, 128, rows=128) + self.decode(1, 128, 127))
        if name == "W2":
            return self.prefill(64, 256, rows=widest) + self.decode(64, 256, 127)
        if name == "W3":
            return self.prefill(1, 4096, rows=widest) + self.decode(1, 4096, 15)
        if name == "W4":
            prompts = self.prefill(1, 1024, rows=1024) + self.prefill(32, 64, 1024, rows=widest)
            return prompts + self.decode(32, 64, 63, shared=1024)
        if name == "W5":
            return self.prefill(64, 128, rows=widest) + 4 * self.decode(16, 128, 127)
        return None

    def first_token(self, name: str) -> float:
        """Of W1 and W3."""
        work = WORKS[name]
        return self.prefill(1, work.num_in, rows=min(work.num_in, max(self.roof.bf16_tflops)))


def best(roofs: list[Roofline]) -> Roofline:
    """Of each number the best that any of them found: a limit is what was reached once."""

    def most(name: str) -> object:
        values = [getattr(roof, name) for roof in roofs]
        if isinstance(values[0], dict):
            return {m: max(value[m] for value in values if m in value) for m in values[0]}
        return max(values)

    return Roofline(**{field.name: most(field.name) for field in fields(Roofline)})


def of_cell(name: str, model: Path, roof: Roofline, format: Format, seconds: float | None = None) -> list[str]:
    """seconds: what a run of ours took, to be told as a share."""
    shape = ModelShape.read(model)
    lines = []
    for at_peak in (False, True):
        floor = Floor(shape, roof, format, at_peak)
        least = floor.seconds(name)
        if least is None:
            return []
        how = "tile products at their peak" if at_peak else "GEMMs at the best kernel's rate"
        rate = WORKS[name].requests * WORKS[name].num_out / least
        line = f"floor, {format.text}, {how}: {least:.2f} s, {rate:.1f} tok/s"
        if name in ("W1", "W3"):
            step = floor.step(1, WORKS[name].num_in + WORKS[name].num_out / 2)
            line += f"; first token {1e3 * floor.first_token(name):.1f} ms, then {1e3 * step:.1f} ms"
        if seconds is not None:
            line += f"; ours is at {least / seconds:.0%} of it"
        lines.append(line)
    return ["\n\n".join(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="model directories; only config.json is read")
    args = parser.parse_args()
    roof = measure(0.2)
    for model in args.models:
        shape = ModelShape.read(model)
        print(
            f"{model.name}: {shape.layer_weights / 1e9:.3f} G weights in layers, {shape.vocab_weights / 1e9:.3f} G "
            f"in the vocabulary, {2 * shape.weights / 1e9:.2f} GB, keys and values {2 * shape.kv_elements} B a token"
        )
        for name in WORKS:
            for format in FORMATS.values():
                for line in of_cell(name, model, roof, format):
                    print(f"  {name}: " + line.replace("\n\n", f"\n  {name}: "))


if __name__ == "__main__":
    main()
