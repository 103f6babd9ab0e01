"""The largest step there can be, run on made-up tokens, so that its memory can be measured. Writes to no cache."""

from __future__ import annotations

import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext, StepInputs
from minivllm.models.decoder import DecoderForCausalLM


def run(model: DecoderForCausalLM, backend: AttentionBackend, num_tokens: int, num_seqs: int) -> torch.Tensor:
    """Logits of `num_seqs` requests that prefill `num_tokens` between them, [num_seqs, vocab_size] float32.

    Sampling holds the logits, a changed copy and the noise's intermediates: two more of their size are made.
    """
    device, num_seqs = backend.spec.device, min(num_seqs, num_tokens)
    lens = torch.full((num_seqs,), num_tokens // num_seqs, dtype=torch.int32)
    lens[: num_tokens % num_seqs] += 1
    longest = int(lens.max())
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    starts[1:] = lens.cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lens.tolist()])
    step = StepInputs(
        query_start_loc=starts.to(device),
        seq_lens=lens.to(device),
        block_table=torch.zeros(
            num_seqs, -(-longest // backend.spec.block_size), dtype=torch.int32, device=device
        ),
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        max_query_len=longest,
        max_seq_len=longest,
    )
    num_layers = len(model.sliding_windows)
    cache = backend.new_kv_cache(1)
    metadata = backend.build_metadata(step)
    ctx = ForwardContext([metadata] * num_layers, [cache] * num_layers)
    hidden = model.forward(
        torch.zeros(num_tokens, dtype=torch.int64, device=device), positions.to(device), ctx
    )
    logits = model.compute_logits(hidden[starts[1:].long().to(device) - 1])
    return logits + torch.zeros_like(logits)
