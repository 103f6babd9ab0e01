"""One batch, without a server, in whichever engine the Python that runs this has. compare.py starts it.

    python benchmarks/offline.py --engine minivllm|vllm|transformers|openvino --model DIR --work W2 [--repeat 3]

One line of JSON: seconds of each run and output tokens a second of the median. W1 one of 128 in, 128 out; W2 64 ×
(256/128); W3 one of 4096 in, 16 out; W4 32 × (1024 shared + 64 own in / 64 out), the cache cold for the shared part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    num: int
    num_in: int
    num_out: int
    num_shared: int = 0


WORKS = {"W1": Work(1, 128, 128), "W2": Work(64, 256, 128), "W3": Work(1, 4096, 16), "W4": Work(32, 64, 64, 1024)}
Run = Callable[[list[list[int]], int], None]  # all prompts, so many tokens each


def prompts_of(work: Work, vocab_size: int, pick: random.Random) -> list[list[int]]:
    def some(count: int) -> list[int]:
        return [pick.randrange(300, vocab_size - 300) for _ in range(count)]

    shared = some(work.num_shared)
    return [shared + some(work.num_in) for _ in range(work.num)]


def llm(engine: str, model: str, extra: dict) -> Run:
    """minivllm or vLLM: the same class by the same names."""
    module = importlib.import_module(engine)
    if engine == "minivllm":
        extra = {"kv_cache_memory_bytes": 8 << 30, "touch_kv_cache": True} | extra
    with open(f"{model}/config.json") as file:
        longest = min(8192, json.load(file)["max_position_embeddings"])
    engine = module.LLM(model=model, dtype="bfloat16", max_model_len=longest, **extra)

    def run(prompts: list[list[int]], num_out: int) -> None:
        params = module.SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == num_out for output in outputs)

    return run


def transformers(engine: str, model: str, extra: dict) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run(prompts: list[list[int]], num_out: int) -> None:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        network.generate(
            ids, attention_mask=mask, max_new_tokens=num_out, min_new_tokens=num_out, do_sample=False, pad_token_id=0
        )

    return run


def openvino(engine: str, model: str, extra: dict) -> Run:
    """OpenVINO GenAI's continuous batching. model: a directory that `optimum-cli export openvino` made."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 8, True  # GB
    precision = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", precision)

    def run(prompts: list[list[int]], num_out: int) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=num_out, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(tensors))
        assert all(len(result.m_generation_ids[0]) == num_out for result in results)

    return run


ENGINES = {"minivllm": llm, "vllm": llm, "transformers": transformers, "openvino": openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", choices=WORKS, nargs="+", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--extra", type=json.loads, default={}, help="more arguments of LLM, as JSON")
    args = parser.parse_args()
    with open(f"{args.model}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    began = time.perf_counter()
    run = ENGINES[args.engine](args.engine, args.model, args.extra)
    loaded = time.perf_counter() - began
    pick = random.Random(time.time_ns())
    run(prompts_of(Work(2, 32, 8), vocab_size, pick), 8)
    for name in args.work:
        work, times = WORKS[name], []
        for _ in range(args.repeat):
            prompts = prompts_of(work, vocab_size, pick)
            begin = time.perf_counter()
            run(prompts, work.num_out)
            times.append(time.perf_counter() - begin)
        tokens_s = work.num * work.num_out / statistics.median(times)
        print(json.dumps({"work": name, "seconds": times, "tokens_s": tokens_s, "load_s": loaded}), flush=True)


if __name__ == "__main__":
    main()
