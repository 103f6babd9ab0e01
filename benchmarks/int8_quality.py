"""What int8 and int4 cost in quality: perplexity and logprobs of held-out text, beside the model as it was trained.

    python benchmarks/int8_quality.py [--model DIR --text FILE] [--tokens 20000] [--quantization int8 int4]

The model in the box is measured on what it is taught to say in documents of its own generator under another seed. Every
position is teacher-forced.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.box_model.data import documents
from minivllm import LLM, SamplingParams
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.utils.box_model import box_model_path

HELD_OUT_SEED = 987_654_321
PARAMS = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)


# Token ids, and for each whether it counts.
Text = tuple[list[int], list[bool]]


def own_texts(tokenizer: Tokenizer) -> Iterator[Text]:
    for document in documents(HELD_OUT_SEED):
        ids, counts = [], []
        for text, is_taught in document:
            part = tokenizer.encode(text, add_special_tokens=False)
            ids += part
            counts += [is_taught] * len(part)
        yield ids, counts


def texts_of(path: Path, tokenizer: Tokenizer) -> Iterator[Text]:
    for paragraph in path.read_text().split("\n\n"):
        ids = tokenizer.encode(paragraph)
        yield ids, [True] * len(ids)


def as_many_as(num_tokens: int, texts: Iterator[Text]) -> list[Text]:
    chosen, total = [], 0
    for ids, counts in texts:
        if total >= num_tokens:
            break
        if len(ids) > 1:
            chosen.append((ids[:1024], counts[:1024]))
            total += sum(counts[:1024])
    return chosen


def score(model: str, quantization: str | None, texts: list[Text]) -> list[tuple[float, int]]:
    """Of each token that counts: its logprob, and the token the model thought likeliest in its place."""
    llm = LLM(model, quantization=quantization, max_logprobs=5)
    rows = []
    prompts = [{"prompt_token_ids": ids} for ids, _ in texts]
    for (ids, counts), output in zip(texts, llm.generate(prompts, PARAMS)):
        for token, is_counted, logprobs in zip(ids[1:], counts[1:], output.prompt_logprobs[1:]):
            if is_counted:
                rows.append((logprobs[token].logprob, max(logprobs, key=lambda t: logprobs[t].logprob)))
    return rows


def perplexity(rows: list[tuple[float, int]]) -> float:
    return math.exp(-sum(logprob for logprob, _ in rows) / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(box_model_path()))
    parser.add_argument("--text", help="a text file instead of the box model's own documents")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--quantization", nargs="+", default=["int8", "int4"])
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.model)
    texts = as_many_as(args.tokens, texts_of(Path(args.text), tokenizer) if args.text else own_texts(tokenizer))
    exact = score(args.model, None, texts)
    print(f"as trained: perplexity {perplexity(exact):.4f} over {len(exact)} tokens")
    for quantization in args.quantization:
        rows = score(args.model, quantization, texts)
        differences = [abs(a[0] - b[0]) for a, b in zip(exact, rows)]
        agreement = sum(a[1] == b[1] for a, b in zip(exact, rows)) / len(exact)
        print(
            f"{quantization}: perplexity {perplexity(rows):.4f}; logprob of the token: mean difference "
            f"{sum(differences) / len(differences):.4f}, largest {max(differences):.3f}; the likeliest token is the "
            f"same at {agreement:.2%} of positions"
        )


if __name__ == "__main__":
    main()
