"""How often a draft model guesses the next token of another: what speculative decoding would gain.

    python -m examples.box_model.agreement

Owns the count and the table (Markdown). The model in the box answers the held-out questions of `evaluate.py`,
greedily; the draft then reads question and answer, and the rank it gives to each token of the answer says whether
it would have said the same.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from examples.box_model.chat import TURN_START, segments
from examples.box_model.evaluate import MAX_TOKENS, questions
from examples.box_model.skills import Exchange
from minivllm import LLM, SamplingParams, TokensPrompt, box_draft_model_path, box_model_path
from minivllm.outputs import RequestOutput


def prompt_of(exchange: Exchange) -> str:
    """The template's own text, up to where the answer begins."""
    return "".join(text for text, _ in segments(exchange.messages, exchange.tools)) + f"{TURN_START}assistant\n"


def answers(model: Path, prompts: list[str]) -> list[RequestOutput]:
    """The model's own greedy answers."""
    with LLM(model) as llm:
        return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))


def guesses(draft: Path, answered: list[RequestOutput]) -> list[list[bool]]:
    """For each answer, whether the draft's likeliest token was the one that was said, token by token."""
    whole = [
        TokensPrompt(prompt_token_ids=one.prompt_token_ids + one.outputs[0].token_ids) for one in answered
    ]
    with LLM(draft) as llm:
        scored = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = []
    for one, score in zip(answered, scored):
        said = one.outputs[0].token_ids
        rows = score.prompt_logprobs[-len(said) :] if said else []
        found.append([row[token].rank == 1 for row, token in zip(rows, said)])
    return found


def steps(right: list[bool], num_speculative_tokens: int) -> int:
    """Runs of the large model that an answer takes when the draft guesses so many tokens ahead.

    Each run confirms the guesses up to the first wrong one and says the token after them itself.
    """
    position = count = 0
    while position < len(right):
        accepted = 0
        for is_right in right[position : position + num_speculative_tokens]:
            if not is_right:
                break
            accepted += 1
        position += accepted + 1
        count += 1
    return count


def table(by_skill: dict[str, list[list[bool]]], num_speculative_tokens: int) -> str:
    lines = [
        f"| skill | tokens | agreement | tokens a run, {num_speculative_tokens} guessed |",
        "| --- | ---: | ---: | ---: |",
    ]
    everything = [answer for found in by_skill.values() for answer in found]
    for skill, found in [*by_skill.items(), ("all", everything)]:
        tokens = sum(map(len, found))
        runs = sum(steps(answer, num_speculative_tokens) for answer in found)
        agreed = sum(map(sum, found))
        lines.append(f"| {skill} | {tokens} | {agreed / tokens:.1%} | {tokens / runs:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=None, help="the model that answers; the one in the box if left out"
    )
    parser.add_argument(
        "--draft", type=Path, default=None, help="the model that guesses; the one that ships if left out"
    )
    parser.add_argument("--count", type=int, default=25, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    args = parser.parse_args()
    asked = questions(args.count, args.seed)
    prompts = [prompt_of(exchange) for exchange in asked]
    answered = answers(args.model or box_model_path(), prompts)
    by_skill: dict[str, list[list[bool]]] = defaultdict(list)
    for exchange, right in zip(asked, guesses(args.draft or box_draft_model_path(), answered)):
        by_skill[exchange.skill].append(right)
    print(table(by_skill, args.num_speculative_tokens))


if __name__ == "__main__":
    main()
