"""Generate from a script: python examples/offline_inference.py [model directory or hub id]"""

from __future__ import annotations

import sys

from minivllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else ".venv/model")
    prompts = ["Once upon a time", "The capital of France is"]
    for output in llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    answer = llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=32, temperature=0))
    print(f"chat -> {answer[0].outputs[0].text!r}")


if __name__ == "__main__":  # the engine core is a process of its own, started by spawning
    main()
