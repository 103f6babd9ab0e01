"""What the loads cost at the least on a machine of a given roofline. Arithmetic only.

A decode step reads every weight once and each sequence's keys and values, and multiplies; the two overlap at best, the
cache's reading does not (attention waits for the projections before it). So

    step = max(GEMM, weights / bandwidth) + keys and values / bandwidth

Prefill is GEMM: 2 operations a weight of the layers and token, 4 · heads · head_dim operations for each pair of a token
and one before it; the vocabulary's matrix only for the tokens that are sampled. Exponentials are not counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from roofline import Roofline, measure


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
    def weight_bytes(self) -> int:
        """Of bf16 weights that a decode step reads."""
        return 2 * (self.layer_weights + self.vocab_weights)

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bf16."""
        return 2 * 2 * self.num_layers * self.kv_heads * self.head_dim

    def prefill_flop(self, num_tokens: int, num_before: int = 0) -> float:
        """Of `num_tokens` behind `num_before` that are cached: layers and attention, and one row of the vocabulary."""
        pairs = num_tokens * num_before + num_tokens * (num_tokens + 1) / 2
        attention = 4 * self.num_layers * self.heads * self.head_dim * pairs
        return 2 * self.layer_weights * num_tokens + attention + 2 * self.vocab_weights

    def decode_seconds(self, rows: int, kv_tokens: float, roof: Roofline) -> float:
        """One step of `rows` sequences that reads so many tokens' keys and values (each shared block once)."""
        gemm = roof.gemm_seconds(2 * (self.layer_weights + self.vocab_weights) * rows, rows) if rows > 1 else 0.0
        return max(gemm, roof.read_seconds(self.weight_bytes)) + roof.read_seconds(kv_tokens * self.kv_bytes)


def seconds(name: str, shape: ModelShape, roof: Roofline) -> float | None:
    """The least a load can take; None for those that have no such floor."""
    widest = max(roof.bf16_tflops)

    def prefill(num: int, num_in: int, before: int = 0, rows: int = widest) -> float:
        return num * roof.gemm_seconds(shape.prefill_flop(num_in, before), rows)

    def decode(num: int, begin: float, steps: int, shared: int = 0) -> float:
        """From `begin` tokens each; shared ones are read once a step."""
        middle = begin + steps / 2
        return steps * shape.decode_seconds(num, num * middle + shared, roof)

    if name == "W1":
        return prefill(1, 128, rows=128) + decode(1, 128, 127)
    if name == "W2":
        return prefill(64, 256) + decode(64, 256, 127)
    if name == "W3":
        return prefill(1, 4096) + decode(1, 4096, 15)
    if name == "W4":
        return prefill(1, 1024) + prefill(32, 64, 1024) + decode(32, 64, 63, shared=1024)
    if name == "W5":
        return prefill(64, 128, rows=128) + 4 * decode(16, 128, 127)
    return None


OUT_TOKENS = {"W1": 128, "W2": 64 * 128, "W3": 16, "W4": 32 * 64, "W5": 64 * 128}


def of_cell(name: str, model: Path, roof: Roofline) -> list[str]:
    shape = ModelShape.read(model)
    floor = seconds(name, shape, roof)
    if floor is None:
        return []
    line = f"floor, bf16: {floor:.2f} s, {OUT_TOKENS[name] / floor:.1f} tok/s"
    if name == "W1":
        step = shape.decode_seconds(1, 192, roof)
        first = roof.gemm_seconds(shape.prefill_flop(128), 128)
        first = max(first, roof.read_seconds(shape.weight_bytes))
        line += f"; first token {1e3 * first:.1f} ms, then {1e3 * step:.1f} ms"
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="model directories; only config.json is read")
    args = parser.parse_args()
    roof = measure(0.2)
    for model in args.models:
        shape = ModelShape.read(model)
        print(
            f"{model.name}: {shape.layer_weights / 1e9:.3f} G weights in layers, {shape.vocab_weights / 1e9:.3f} G "
            f"in the vocabulary, {shape.weight_bytes / 1e9:.2f} GB, keys and values {shape.kv_bytes} B a token"
        )
        for name in OUT_TOKENS:
            print(f"  {name}: {'; '.join(of_cell(name, model, roof))}")


if __name__ == "__main__":
    main()
