"""Batches without a server, in whichever engine the Python that runs this has. compare.py starts it.

    python benchmarks/offline.py --engine minivllm|vllm|transformers|openvino --model DIR --work W2 [--repeat 3]
    python benchmarks/offline.py --engine … --model DIR --listen     # loads once, then does what stdin asks for

A line of JSON for each run: seconds, and output tokens a second. What the loads are: works.py. With --listen a line
{"ready": seconds of loading} comes first, and each line of stdin, {"work": "W2", "requests": 16}, is one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import TextIO

from works import WORKS, Work

Run = Callable[[list[list[int]], int], None]  # all prompts, so many tokens each


def llm(engine: str, model: str, extra: dict) -> Run:
    """minivllm or vLLM: the same class by the same names."""
    module = importlib.import_module(engine)
    if engine == "minivllm":
        extra = {"kv_cache_memory_bytes": str(3 << 30), "touch_kv_cache": True} | extra
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
    scheduler.cache_size, scheduler.enable_prefix_caching = 3, True  # GB
    precision = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", precision)

    def run(prompts: list[list[int]], num_out: int) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=num_out, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(tensors))
        assert all(len(result.m_generation_ids[0]) == num_out for result in results)

    return run


ENGINES = {"minivllm": llm, "vllm": llm, "transformers": transformers, "openvino": openvino}


def one_run(run: Run, name: str, requests: int | None, vocab_size: int, pick: random.Random) -> dict:
    work = WORKS[name] if requests is None else WORKS[name].part(requests)
    prompts = work.prompts(vocab_size, pick)
    begin = time.perf_counter()
    run(prompts, work.num_out)
    seconds = time.perf_counter() - begin
    return {"work": name, "seconds": seconds, "tokens_s": work.requests * work.num_out / seconds}


def only_ours() -> TextIO:
    """What was stdout; what engines print goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", choices=WORKS, nargs="+", default=[])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--listen", action="store_true")
    parser.add_argument("--extra", type=json.loads, default={}, help="more arguments of LLM, as JSON")
    args = parser.parse_args()
    answers = only_ours()
    with open(f"{args.model}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    began = time.perf_counter()
    run = ENGINES[args.engine](args.engine, args.model, args.extra)
    loaded = time.perf_counter() - began
    pick = random.Random(time.time_ns())
    run(Work(2, 2, 32, 8).prompts(vocab_size, pick), 8)
    if args.listen:
        print(json.dumps({"ready": loaded}), file=answers)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(one_run(run, asked["work"], asked["requests"], vocab_size, pick)), file=answers)
    for name in args.work:
        for _ in range(args.repeat):
            print(json.dumps(one_run(run, name, None, vocab_size, pick)), file=answers)


if __name__ == "__main__":
    main()
