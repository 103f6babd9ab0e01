"""Options of vLLM's `bench serve` that are not ours: naming one is an error that says what to do instead."""

from __future__ import annotations

_TEXTS = "leave it out: the server counts tokens itself"
_OTHER_DATA = "use --dataset-name random, prefix_repetition or sharegpt"
_ADAPTERS = "leave it out: no adapters are served yet"

INSTEAD = {
    "tokenizer": _TEXTS, "tokenizer-mode": _TEXTS, "skip-tokenizer-init": _TEXTS, "trust-remote-code": _TEXTS,
    "lora-modules": _ADAPTERS, "lora-assignment": _ADAPTERS,
    "use-beam-search": "leave it out: a search of beams does not stream, so there would be no times of tokens",
    "probe-request-rate": "measure latency with a second run at that --request-rate",
    "plot-dataset-stats": "leave it out; the result has the totals",
    "disable-shuffle": "leave it out; --seed decides the order",
    "no-oversample": "leave it out; a data set that is too small is an error",
    "no-stream": "leave it out; every request is streamed, or there would be no times of tokens",
    "custom-output-len": _OTHER_DATA, "custom-skip-chat-template": _OTHER_DATA, "hf-subset": _OTHER_DATA,
    "hf-split": _OTHER_DATA, "hf-name": _OTHER_DATA, "hf-output-len": _OTHER_DATA, "sonnet-input-len": _OTHER_DATA,
    "sonnet-output-len": _OTHER_DATA, "sonnet-prefix-len": _OTHER_DATA, "spec-bench-output-len": _OTHER_DATA,
    "spec-bench-category": _OTHER_DATA, "random-batch-size": _OTHER_DATA, "no-reranker": _OTHER_DATA,
    "backend-config": "leave it out", "label": "use --metadata label=NAME", "served-model-name": "use --model",
}  # fmt: skip


def refuse_option(option: str, value: str | None) -> str | None:
    """What to say about an option of vLLM's that is not here; None about one that nobody has."""
    name = option.removeprefix("--").replace("_", "-").split(".")[0]
    instead = INSTEAD.get(name) or (_OTHER_DATA if name.startswith("random-mm-") else None)
    return None if instead is None else f"{option} is an option of vLLM that minivllm does not have; {instead}"
