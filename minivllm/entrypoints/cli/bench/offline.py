"""What the two benchmarks that run the engine themselves share."""

from __future__ import annotations

from argparse import Namespace

from minivllm.engine.arg_utils import EngineArgs
from minivllm.entrypoints.llm import LLM
from minivllm.exceptions import ConfigError
from minivllm.sampling_params import SamplingParams


def quiet_llm(args: Namespace) -> LLM:
    """The engine under test."""
    return LLM.from_engine_args(EngineArgs.from_cli_args(args))


def params_for(output_len: int, *, n: int = 1, detokenize: bool = True) -> SamplingParams:
    """Exactly `output_len` tokens, sampled: what vLLM's benchmarks ask for."""
    return SamplingParams(
        n=n, temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=output_len, detokenize=detokenize
    )


def check_lengths(llm: LLM, input_len: int, output_len: int) -> None:
    """Raise ConfigError when the engine would have to cut an answer short: the numbers would lie."""
    limit = llm.llm_engine.ready.max_model_len
    if input_len + output_len > limit:
        raise ConfigError(
            f"prompts of {input_len} and outputs of {output_len} tokens do not fit into max_model_len={limit}; "
            "shorten them or raise --max-model-len"
        )
