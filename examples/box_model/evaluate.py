"""Measure the model in the box on held-out prompts, through a running server and the OpenAI client.

    minivllm serve &
    python -m examples.box_model.evaluate --base-url http://127.0.0.1:8000/v1

Owns the questions' number, how they are put, and the table (Markdown). What is right is `skills.is_right`'s to say.
Greedy decoding; the same seed asks the same questions.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from openai import OpenAI

from examples.box_model import skills
from examples.box_model.data import documents, text_of
from examples.box_model.skills import Exchange

MAX_TOKENS = 320
WORD = re.compile(r"[A-Za-z]+")


@dataclass
class Reply:
    text: str
    calls: list[tuple[str, Any]]
    finish_reason: str


class Examiner:
    """Puts exchanges to one server."""

    def __init__(self, client: OpenAI, model: str) -> None:
        self.client = client
        self.model = model
        self.greedy = {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS}

    def ask(self, exchange: Exchange) -> Reply:
        """By the chat route, tools and their answers in its own roles."""
        offered = {"tools": exchange.tools} if exchange.tools else {}
        choice = self.client.chat.completions.create(
            messages=with_ids(exchange.messages), **self.greedy, **offered
        ).choices[0]
        functions = [call.function for call in choice.message.tool_calls or ()]
        calls = [(function.name, _parsed(function.arguments)) for function in functions]
        return Reply(choice.message.content or "", calls, choice.finish_reason)


def with_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The API names each call, and its answer by that name; a template does not show it."""
    named, last = [], ""
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            last = f"call_{index}"
            message = {**message, "tool_calls": [{**call, "id": last} for call in message["tool_calls"]]}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": last}
        named.append(message)
    return named


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return None


def known_words(num_documents: int = 20000) -> set[str]:
    """The words of the training text: anything else in a story is a broken word."""
    found: set[str] = set()
    for document in islice(documents(0), num_documents):
        found.update(WORD.findall(text_of(document)))
    return found


def judge(exchange: Exchange, reply: Reply, vocabulary: set[str]) -> bool:
    """Right, and ended by itself; a story must also be made of known words."""
    if reply.finish_reason not in ("stop", "tool_calls"):
        return False
    if exchange.skill == "stories" and not set(WORD.findall(reply.text)) <= vocabulary:
        return False
    return skills.is_right(exchange, reply.text, reply.calls)


def questions(count: int, seed: int) -> list[Exchange]:
    """`count` held-out exchanges of each maker."""
    rng = Random(f"evaluate {seed}")
    return [maker(rng, True) for maker in skills.MIX for _ in range(count)]


def table(results: dict[str, list[bool]]) -> str:
    lines = ["| skill | right | of | accuracy |", "| --- | ---: | ---: | ---: |"]
    for skill, marks in results.items():
        lines.append(f"| {skill} | {sum(marks)} | {len(marks)} | {sum(marks) / len(marks):.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--model", default=None, help="name of the model; the first that the server lists if left out"
    )
    parser.add_argument("--count", type=int, default=100, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--show-wrong", type=int, default=0, metavar="N", help="print N wrong answers of each skill"
    )
    parser.add_argument(
        "--transcript", type=Path, default=None, help="file to write every answer to, as JSON lines"
    )
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none")
    examiner = Examiner(client, args.model or client.models.list().data[0].id)
    vocabulary = known_words()
    asked = questions(args.count, args.seed)
    with ThreadPoolExecutor(args.concurrency) as pool:
        replies = list(pool.map(examiner.ask, asked))
    results: dict[str, list[bool]] = defaultdict(list)
    shown: Counter[str] = Counter()
    for exchange, reply in zip(asked, replies):
        right = judge(exchange, reply, vocabulary)
        results[exchange.skill].append(right)
        if not right and shown[exchange.skill] < args.show_wrong:
            shown[exchange.skill] += 1
            print(f"{exchange.skill}: {exchange.messages}\n  wanted {exchange.answer}\n  got {reply}\n")
    if args.transcript:
        lines = (
            {
                "skill": e.skill,
                "messages": e.messages,
                "wanted": e.answer,
                "got": r.text,
                "finish": r.finish_reason,
            }
            for e, r in zip(asked, replies)
        )
        args.transcript.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(table(results))


if __name__ == "__main__":
    main()
