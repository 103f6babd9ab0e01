"""transformers' own continuous batching on the same shape and card, in the same run."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.models import Row


def run(name: str, shape: dict, *, batch: int, prompt_len: int, num_tokens: int) -> Row:
    """Decoded tokens a second of a batch that arrives at once, prefill included."""
    what = f"{name} transformers generate_batch, {batch} × ({prompt_len} in, {num_tokens} out)"
    try:
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **{key: value for key, value in shape.items() if key not in ("architectures", "torch_dtype")}
        )
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(torch.float32)
        inputs = [[(7 * i + j) % 1000 + 3 for j in range(prompt_len)] for i in range(batch)]
        generation = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0,
            use_cuda_graph=True,
        )  # fmt: skip
        model.generate_batch(inputs=inputs[:2], generation_config=generation)
        begin = time.perf_counter()
        outputs = model.generate_batch(inputs=inputs, generation_config=generation)
        seconds = time.perf_counter() - begin
        made = sum(len(output.generated_tokens) for output in outputs.values())
        return Row(what, f"{made / seconds:,.0f}", "-", f"{seconds:.2f} s")
    except Exception as error:  # a peer that does not run ends nothing of ours
        return Row(what, "-", "-", f"not run: {type(error).__name__}: {str(error)[:120]}")
    finally:
        torch.cuda.empty_cache()
