"""Generate from a script: python examples/offline_inference.py [model directory or hub id]"""

from __future__ import annotations

import sys

from minivllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(*sys.argv[1:2])  # without a model: the one in the box
    prompts = ["Once upon a time", "A cat and a dog"]
    for output in llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    answer = llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=32, temperature=0))
    print(f"chat -> {answer[0].outputs[0].text!r}")


if __name__ == "__main__":  # the engine core is a process of its own, started by spawning
    main()
