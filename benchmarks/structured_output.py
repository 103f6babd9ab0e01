"""What structured output costs a step: masks made, masks applied, tokens followed; and what compiling costs.

    python benchmarks/structured_output.py [--steps 200] [--vocab-size 151936]

No model: logits are random, each request chooses among what its mask allows. The vocabulary is made of the words of
Python's standard library. "bare" is what the sampler takes without a mask, beside which the rest is to be seen.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from minivllm.messages.engine import EngineCoreRequest
from minivllm.ops import bitmask
from minivllm.ops.op import OpSpec
from minivllm.sample.sampler import Sampler
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.manager import GrammarManager, MatcherState
from minivllm.structured_output.vocabulary import Vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "age", "tags", "address"],
}
ASKED = {
    "JSON schema": {"json": PERSON},
    "any JSON object": {"json_object": True},
    "regex": {"regex": "[a-z0-9.]{3,200}@[a-z]+[.](com|org)"},
}


def make_vocabulary(vocab_size: int) -> Vocabulary:
    """All bytes, words with and without a space before them, and an end."""
    tokens = dict.fromkeys(bytes([i]) for i in range(256))
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        for word in re.findall(rb" ?[A-Za-z]+| ?[^A-Za-z\s]{1,4}|\s{1,16}", path.read_bytes()):
            tokens.setdefault(word[:16])
        if len(tokens) >= vocab_size:
            break
    padded = [*tokens][: vocab_size - 1]
    end = vocab_size - 1
    return Vocabulary([*padded, *[b""] * (end - len(padded)), b"<|end|>"], {"<|end|>": end}, [end])


def start(manager: GrammarManager, asked: dict) -> MatcherState:
    grammar = to_grammar(StructuredOutputsParams(**asked), {})
    state = manager.start(EngineCoreRequest("r", [1], SamplingParams(), 0, grammar=grammar))
    while not state.is_ready:
        time.sleep(0.0001)
    return state


class Times:
    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {"masks": [], "apply": [], "follow": [], "bare": [], "with": []}

    def add(self, name: str, began: float) -> float:
        now = time.perf_counter()
        self.of[name].append((now - began) * 1e6)
        return time.perf_counter()

    def row(self) -> str:
        return " | ".join(
            f"{np.median(values):7.0f} {np.mean(values):7.0f} {np.quantile(values, 0.99):7.0f}"
            for values in self.of.values()
        )


def run(manager: GrammarManager, asked: dict, num_requests: int, num_steps: int, vocab_size: int) -> Times:
    states = [start(manager, asked) for _ in range(num_requests)]
    sampler = Sampler(vocab_size)
    rows = np.arange(num_requests)
    for row in rows.tolist():
        sampler.add_request(row, SamplingParams(temperature=1.0), row, [])
    table = np.zeros((num_requests, 4), np.int32)
    times, given = Times(), torch.randn(num_requests, vocab_size)
    apply = bitmask.apply_bitmask.select(OpSpec("cpu", torch.float32))
    for step in range(num_steps):
        batch = SampleBatch(rows, np.full(num_requests, 10 + step), np.full(num_requests, 4), table)
        began = time.perf_counter()
        masks = manager.bitmask(states)
        times.add("masks", began)
        mask = GrammarMask(rows, np.frombuffer(masks, np.uint32).reshape(num_requests, -1))
        logits = given.clone()
        began = time.perf_counter()
        apply(logits, *mask.tensors())
        times.add("apply", began)
        logits = given.clone()
        began = time.perf_counter()
        sampler(logits, batch)
        times.add("bare", began)
        logits = given.clone()
        began = time.perf_counter()
        sampled = sampler(logits, batch, mask).token_ids.tolist()
        times.add("with", began)
        began = time.perf_counter()
        for state, token in zip(states, sampled):
            state.accept(token)
        times.add("follow", began)
        states = [start(manager, asked) if state.is_complete or state.error else state for state in states]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    args = parser.parse_args()
    vocabulary = make_vocabulary(args.vocab_size)
    began = time.perf_counter()
    tokenizer = vocabulary.for_llguidance()
    print(f"vocabulary of {args.vocab_size} tokens for llguidance: {time.perf_counter() - began:.2f} s, once")
    manager = GrammarManager(lambda: tokenizer)
    for name, asked in ASKED.items():
        took_ms = []
        for _ in range(2):
            began = time.perf_counter()
            start(manager, asked)
            took_ms.append((time.perf_counter() - began) * 1e3)
        print(f"{name}: compiled in {took_ms[0]:.1f} ms, from the cache in {took_ms[1]:.2f} ms")
    print("microseconds a step, p50 mean p99 of each: masks made | applied | followed | sampler bare | with masks")
    for name, asked in ASKED.items():
        for num_requests in (1, 64):
            times = run(manager, asked, num_requests, args.steps, args.vocab_size)
            print(f"{name:16} {num_requests:3} | {times.row()}")
    manager.shutdown()


if __name__ == "__main__":
    main()
