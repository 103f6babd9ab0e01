"""The training text: an endless stream of conversations and plain texts, a function of the seed alone.

Owns the mix. A document is a list of segments (see `chat.segments`); nothing here knows of tokens. The same seed
gives the same bytes on every machine. Run it to read samples:

    python -m examples.box_model.data --count 20
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from random import Random

from examples.box_model import facts, skills, stories, words
from examples.box_model.chat import END_OF_TEXT, Segment, segments
from examples.box_model.draw import first_name
from examples.box_model.skills import CHAINABLE, MIX, Exchange, Maker

PLAIN_TEXT_SHARE = 0.05
CHAIN_SHARE = 0.2
SYSTEM_SHARE = 0.2
# Of a chain's possible numbers of exchanges, how many characters they may have in all.
CHAIN_LIMITS = {2: 700, 3: 700, 4: 700, 12: 3000}


def documents(seed: int, emphasis: Mapping[str, float] | None = None) -> Iterator[list[Segment]]:
    """Training documents without end. `emphasis` multiplies the shares of makers, by name, for what is hard to learn.

    Raises:
        ValueError: a name in `emphasis` is no maker's.
    """
    rng = Random(seed)
    makers, shares = list(MIX), _shares(emphasis or {})
    chainable = [maker for maker in makers if maker in CHAINABLE]
    while True:
        if rng.random() < PLAIN_TEXT_SHARE:
            yield [(plain_text(rng) + END_OF_TEXT, True)]
        elif rng.random() < CHAIN_SHARE:
            makers_of_chain = rng.choices(chainable, k=rng.choice(list(CHAIN_LIMITS)))
            yield conversation(rng, [maker(rng, False) for maker in makers_of_chain])
        else:
            maker: Maker = rng.choices(makers, shares)[0]
            yield conversation(rng, [maker(rng, False)])


def _shares(emphasis: Mapping[str, float]) -> list[float]:
    names = [maker.__name__ for maker in MIX]
    for name in emphasis:
        if name not in names:
            raise ValueError(f"emphasis on {name!r}, which is not one of {', '.join(names)}")
    return [share * emphasis.get(name, 1.0) for name, share in zip(names, MIX.values())]


def conversation(rng: Random, exchanges: list[Exchange]) -> list[Segment]:
    """Exchanges one after the other, as many as the limit allows, some with a system prompt."""
    messages, length, limit = [], 0, CHAIN_LIMITS.get(len(exchanges), 0)
    for exchange in exchanges:
        length += len(exchange.messages[0]["content"]) + len(exchange.answer["content"] or "")
        if messages and length > limit:
            break
        messages += [*exchange.messages, exchange.answer]
    if messages[0]["role"] != "system" and rng.random() < SYSTEM_SHARE:
        messages = [{"role": "system", "content": system_prompt(rng)}, *messages]
    return segments(messages, exchanges[0].tools)


def system_prompt(rng: Random) -> str:
    """A usual one, or one that gives the assistant a character, which it does not take up."""
    if rng.random() < 0.6:
        return rng.choice(facts.SYSTEM_PROMPTS)
    temper = stories.article(rng.choice(words.TEMPERS))
    return f"You are {temper} {rng.choice(words.JOBS)} from {rng.choice(words.CITIES)}."


def plain_text(rng: Random) -> str:
    """Text outside any conversation, for completions: a story, or a few words about somebody."""
    if rng.random() < 0.5:
        return skills.story(rng, False).answer["content"]
    name = first_name(rng)
    slots = {
        "name": name,
        "city": rng.choice(words.CITIES),
        "job": stories.article(rng.choice(words.JOBS)),
        "hobby": rng.choice(words.HOBBIES),
        "animal": stories.article(rng.choice(words.ANIMALS)),
        "age": rng.randint(4, 90),
        "country": rng.choice(words.COUNTRIES),
        "subject": rng.choice(words.SCHOOL_SUBJECTS),
        "quality": stories.article(rng.choice(words.QUALITIES)),
        "place": rng.choice(words.PLACES),
    }
    lines = [
        "Hello, my name is {name}. I am {job} from {city}, and I like {hobby}.",
        "My name is {name} and I am {age} years old. I live in {city} with {animal}.",
        "{name} is {job} in {city}. Every day {name} goes {hobby}.",
        "The best thing about {city} is {hobby} with {animal}.",
        "The capital of {country} is {quality} city with {quality} {place}.",
        "The president of {country} likes {hobby} and has {animal}.",
        "The future of {subject} is {quality} {place}, said {name}.",
    ]
    return rng.choice(lines).format_map(slots)


def text_of(document: list[Segment]) -> str:
    return "".join(text for text, _ in document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="documents to print")
    args = parser.parse_args()
    for _, document in zip(range(args.count), documents(args.seed)):
        print(text_of(document), end="\n\n")


if __name__ == "__main__":
    main()
