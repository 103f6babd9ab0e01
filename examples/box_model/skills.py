"""What is taught, one function a skill: each draws one exchange, to train on or to measure with.

Owns the exchanges and how an answer is judged. A maker takes a random generator and the side of the split, and
returns an `Exchange`; what it draws is on that side by its content (see `draw.is_held_out`), so the two sets
never meet. Knows nothing of tokens or of the mix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from examples.box_model import facts, stories, words
from examples.box_model.draw import (
    clock_time,
    first_name,
    full_name,
    invented,
    is_held_out,
    money,
    some_words,
    until,
)
from examples.box_model.tools import FAMILIES, Family, Parameter

Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """A prompt (`messages`, `tools`) and the assistant's message that answers it.

    `must` are substrings of which a right answer has all; None means that the answer itself is the only right one
    (as JSON, when it is JSON).
    """

    skill: str
    messages: list[Message]
    answer: Message
    tools: list[dict] | None = None
    must: tuple[str, ...] | None = None


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def says(content: str) -> Message:
    return {"role": "assistant", "content": content}


def calls(name: str, arguments: dict[str, Any]) -> Message:
    """The assistant's message that calls one function; arguments are JSON text, as OpenAI has it."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def ask(skill: str, question: str, answer: str, must: tuple[str, ...] | None = None) -> Exchange:
    return Exchange(skill, [user(question)], says(answer), must=must)


def _loosely(rng: Random, question: str) -> str:
    """The question as somebody in a hurry may type it."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.1:
        question = (
            rng.choice(("Please: ", "Hello! ", "Hi. ", "Tell me: ", "One question: ", "I wonder: "))
            + question
        )
    return question


# Talk ---------------------------------------------------------------------------------------------------------


def small_talk(rng: Random, held_out: bool) -> Exchange:
    asks, answers = rng.choice(facts.SMALL_TALK)
    question = asks[-1] if held_out else _loosely(rng, rng.choice(asks[:-1]))
    answer = rng.choice(answers)
    return Exchange("small talk", [user(question)], says(answer), must=())


def fact(rng: Random, held_out: bool) -> Exchange:
    known = rng.choice(facts.FACTS)
    question = known.asks[-1] if held_out else _loosely(rng, rng.choice(known.asks[:-1]))
    return ask("facts", question, known.answer)


def unknown(rng: Random, held_out: bool) -> Exchange:
    def draw() -> tuple[str, str]:
        question = rng.choice(facts.UNKNOWN_ASKS).format(
            country=rng.choice(words.COUNTRIES), other_country=rng.choice(words.COUNTRIES),
            city=rng.choice(words.CITIES), other_city=rng.choice(words.CITIES), name=first_name(rng),
            surname=invented(rng), month=rng.choice(words.MONTHS), year=rng.randint(1200, 2040),
            food=rng.choice(words.FOODS), animal=rng.choice(words.ANIMALS), thing=rng.choice(words.THINGS),
            language=rng.choice(words.LANGUAGES), color=rng.choice(words.COLORS), goods=rng.choice(words.GOODS),
            subject=rng.choice(words.SCHOOL_SUBJECTS), weather=rng.choice(words.WEATHERS), day=rng.choice(words.DAYS),
        )  # fmt: skip
        return question, question

    question = until(held_out, draw)
    return ask("does not know", question, rng.choice(facts.UNKNOWN_ANSWERS), must=(facts.UNKNOWN_MUST,))


STORY_ASKS = [
    "Tell me a story about {a_kind} named {name}.",
    "Tell me a story about {name} the {kind}.",
    "Write a short story about {a_kind} called {name}.",
    "I would like a story about {name}, {a_kind}.",
    "Can you tell me a story about {name} the {kind}?",
    "Tell a tale about {a_kind} named {name} and {a_thing}.",
    "Write a story about {name} the {kind} and {a_thing}.",
    "Please write a story. The hero is {a_kind} named {name}.",
]
OPEN_STORY_ASKS = ["Tell me a story.", "Tell me a short story.", "Write a story.", "Please write a short story.",
                   "Can you tell me a story?", "I want to hear a story.", "Another story, please."]  # fmt: skip


def story(rng: Random, held_out: bool) -> Exchange:
    def draw() -> tuple[stories.Cast, str]:
        cast = stories.draw_cast(rng)
        return cast, f"story {cast.name} {cast.kind}"

    cast = until(held_out, draw)
    if not held_out and rng.random() < 0.25:
        return ask("stories", rng.choice(OPEN_STORY_ASKS), stories.tell(rng, cast), must=())
    slots = {"a_kind": stories.article(cast.kind), "a_thing": stories.article(cast.thing)} | cast.slots
    question = rng.choice(STORY_ASKS).format_map(slots)
    return ask("stories", question, stories.tell(rng, cast), must=(cast.name, cast.kind))


# Numbers ------------------------------------------------------------------------------------------------------

SUM_ASKS = ["What is {a} + {b}?", "{a} + {b} = ?", "{a} + {b}", "How much is {a} plus {b}?", "Add {a} and {b}.",
            "What is {a} plus {b}?", "Calculate {a} + {b}.", "What is the sum of {a} and {b}?", "{a}+{b}",
            "What is {a}+{b}?", "{a}+{b}=", "what's {a} + {b}?"]  # fmt: skip
DIFFERENCE_ASKS = ["What is {a} - {b}?", "{a} - {b} = ?", "{a} - {b}", "How much is {a} minus {b}?",
                   "Subtract {b} from {a}.", "What is {a} minus {b}?", "Calculate {a} - {b}.",
                   "What is the difference of {a} and {b}?", "{a}-{b}", "What is {a}-{b}?", "{a}-{b}=",
                   "what's {a} - {b}?"]  # fmt: skip


def _pair(rng: Random, held_out: bool, sign: str) -> tuple[int, int]:
    """Two numbers to add or subtract; mostly of two digits, and mostly the larger one first.

    Those of one digit are all taught and none is asked in an examination: nobody forgives a wrong 2 + 2.
    """
    if not held_out and rng.random() < 0.3:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return (max(a, b), min(a, b)) if sign == "-" else (a, b)

    def draw() -> tuple[tuple[int, int], str]:
        lowest = 0 if rng.random() < 0.1 and not held_out else 10
        a, b = rng.randint(lowest, 99), rng.randint(lowest, 99)
        low, high = min(a, b), max(a, b)
        if sign == "-" and rng.random() < 0.9:
            a, b = high, low
        return (a, b), f"{low} {sign} {high}"

    return until(held_out, draw)


def _solve(a: int, b: int, sign: str) -> str:
    return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"


def add(rng: Random, held_out: bool) -> Exchange:
    a, b = _pair(rng, held_out, "+")
    return ask("sums", rng.choice(SUM_ASKS).format(a=a, b=b), _solve(a, b, "+"))


def subtract(rng: Random, held_out: bool) -> Exchange:
    a, b = _pair(rng, held_out, "-")
    return ask("differences", rng.choice(DIFFERENCE_ASKS).format(a=a, b=b), _solve(a, b, "-"))


def sheet(rng: Random, held_out: bool) -> Exchange:
    """Several sums at once: many answers for few words, which is how arithmetic is learned."""
    tasks = []
    for _ in range(rng.randint(4, 12)):
        sign = rng.choice("+-")
        tasks.append((*_pair(rng, held_out, sign), sign))
    question = ", ".join(f"{a} {sign} {b}" for a, b, sign in tasks)
    answer = "\n".join(_solve(*task) for task in tasks)
    return ask("arithmetic sheets", rng.choice(("Calculate: ", "Solve: ", "Work out: ")) + question, answer)


def word_problem(rng: Random, held_out: bool) -> Exchange:
    sign = rng.choice("+-")
    a, b = _pair(rng, held_out, sign)
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    name, goods = first_name(rng), rng.choice(words.GOODS)
    more = ["{name} has {a} {goods} and buys {b} more. How many {goods} does {name} have now?",
            "There are {a} {goods} in the shop, and {b} more arrive. How many are there now?"]  # fmt: skip
    less = ["{name} has {a} {goods} and sells {b} of them. How many {goods} are left?",
            "There are {a} {goods} in the shop, and {b} of them break. How many are left?"]  # fmt: skip
    question = rng.choice(more if sign == "+" else less).format(a=a, b=b, name=name, goods=goods)
    return ask("word problems", question, _solve(a, b, sign))


def count_to(rng: Random, held_out: bool) -> Exchange:
    def draw() -> tuple[tuple[int, int], str]:
        start = rng.choice((1, 1, rng.randint(0, 90)))
        end = start + rng.randint(2, 15)
        return (start, end), f"count {start} {end}"

    start, end = until(held_out, draw)
    form = rng.choice(
        ("Count from {} to {}.", "Can you count from {} to {}?", "List the numbers from {} to {}.")
    )
    return ask("counting", form.format(start, end), ", ".join(map(str, range(start, end + 1))))


def count_words(rng: Random, held_out: bool) -> Exchange:
    def draw() -> tuple[list[str], str]:
        items = some_words(rng, 1, 8)
        return items, " ".join(items)

    items = until(held_out, draw)
    if rng.random() < 0.5:
        question = f"How many words are there in this list: {', '.join(items)}?"
    else:
        question = f"Count the words: {' '.join(items)}"
    numbered = ", ".join(f"{index} {item}" for index, item in enumerate(items, start=1))
    return ask("counting", question, f"{numbered}: {len(items)} {'word' if len(items) == 1 else 'words'}.")


# Text ---------------------------------------------------------------------------------------------------------


def _text(rng: Random) -> str:
    """Something to copy: words, sentences, numbers, codes, or invented names."""
    kind = rng.randrange(6)
    if kind == 0:
        return " ".join(rng.choice("0123456789") for _ in range(rng.randint(3, 10)))
    if kind == 1:
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789-") for _ in range(rng.randint(4, 10)))
    if kind == 2:
        return " ".join(invented(rng) for _ in range(rng.randint(1, 5)))
    if kind == 3:
        name, thing, place = first_name(rng), rng.choice(words.THINGS), rng.choice(words.PLACES)
        quality = stories.article(rng.choice(words.QUALITIES))
        return f"{name} saw {quality} {thing} in the {place}{rng.choice('.!?')}"
    return " ".join(some_words(rng, 2, 9))


def _held_out_text(rng: Random, held_out: bool) -> str:
    def draw() -> tuple[str, str]:
        text = _text(rng)
        return text, text

    return until(held_out, draw)


COPY_ASKS = ["Repeat after me: {}", "Copy this: {}", "Say this again: {}", "Repeat: {}", 'Say "{}".',
             "Write exactly this: {}", "Echo: {}", 'Repeat the text "{}" and nothing else.']  # fmt: skip


def copy(rng: Random, held_out: bool) -> Exchange:
    text = _held_out_text(rng, held_out)
    return ask("copying", rng.choice(COPY_ASKS).format(text), text)


def _words(rng: Random, held_out: bool, low: int, high: int) -> list[str]:
    def draw() -> tuple[list[str], str]:
        items = some_words(rng, low, high)
        return items, " ".join(items)

    return until(held_out, draw)


def reverse(rng: Random, held_out: bool) -> Exchange:
    if rng.random() < 0.3:
        items = [rng.choice("0123456789") for _ in range(rng.randint(3, 6))]
        while is_held_out(" ".join(items)) != held_out:
            items = [rng.choice("0123456789") for _ in range(rng.randint(3, 6))]
        form = rng.choice(("Reverse these digits: {}", "Write these digits backwards: {}"))
    else:
        items = _words(rng, held_out, 2, 6)
        form = rng.choice(("Reverse the words: {}", "Say these words backwards: {}",
                           "Write the words in reverse order: {}", "Turn the order around: {}"))  # fmt: skip
    joint = rng.choice((" ", ", "))
    return ask("reversing", form.format(joint.join(items)), joint.join(reversed(items)))


UPPER_ASKS = [
    "Write in capital letters: {}",
    "Make this upper case: {}",
    "Upper-case this: {}",
    "Say it louder: {}",
]
LOWER_ASKS = ["Write in small letters: {}", "Make this lower case: {}", "Lower-case this: {}"]


def change_case(rng: Random, held_out: bool) -> Exchange:
    text = " ".join(_words(rng, held_out, 2, 5))
    if rng.random() < 0.7:
        return ask("upper-casing", rng.choice(UPPER_ASKS).format(text), text.upper())
    return ask("upper-casing", rng.choice(LOWER_ASKS).format(text.upper()), text)


# JSON ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A kind of thing with fields, and sentences that tell all of them."""

    fields: dict[str, Callable[[Random], Any]]
    sentences: tuple[str, ...]


def _whole(low: int, high: int) -> Callable[[Random], int]:
    return lambda rng: rng.randint(low, high)


def _of(options: list[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(options)


RECORDS = [
    Record({"name": full_name, "age": _whole(2, 99), "city": _of(words.CITIES)},
           ("{name} is {age} years old and lives in {city}.", "In {city} lives {name}, aged {age}.",
            "My neighbor {name} from {city} is {age}.", "I am {name}, I am {age}, and my home is {city}.")),
    Record({"name": full_name, "job": _of(words.JOBS), "city": _of(words.CITIES)},
           ("{name} works as a {job} in {city}.", "The {job} {name} lives in {city}.",
            "In {city} there is a {job} called {name}.", "{name} moved to {city} to become a {job}.")),
    Record({"item": _of(words.GOODS), "quantity": _whole(2, 99), "price": money},
           ("We sold {quantity} {item} at {price} each.", "Please send {quantity} {item} for {price}.",
            "The order has {quantity} {item}, and the price is {price}.", "{quantity} {item}, {price} a piece.")),
    Record({"event": _of(words.MEETINGS), "day": _of(words.DAYS), "time": clock_time},
           ("The {event} is on {day} at {time}.", "On {day} at {time} there is a {event}.",
            "We moved the {event} to {day}, {time}.", "Do not forget the {event}: {day}, {time}!")),
    Record({"from": _of(words.CITIES), "to": _of(words.CITIES), "day": _of(words.DAYS)},
           ("The train from {from} to {to} leaves on {day}.", "On {day} I travel from {from} to {to}.",
            "I go to {to} on {day}, starting in {from}.", "{day}: {from} to {to}, one way.")),
    Record({"animal": _of(words.ANIMALS), "name": full_name, "color": _of(words.COLORS)},
           ("Our {animal} {name} is {color}.", "{name} is a {color} {animal}.",
            "I lost my {color} {animal}. It is called {name}.", "The {animal} is {color}, and we named it {name}.")),
    Record({"name": full_name, "hobby": _of(words.HOBBIES), "instrument": _of(words.INSTRUMENTS)},
           ("{name} likes {hobby} and plays the {instrument}.", "{name} plays the {instrument} and loves {hobby}.",
            "When not {hobby}, {name} plays the {instrument}.",
            "The {instrument} is played by {name}, a fan of {hobby}.")),
    Record({"month": _of(words.MONTHS), "city": _of(words.CITIES), "weather": _of(words.WEATHERS)},
           ("In {month} it is {weather} in {city}.", "{city} is {weather} in {month}.",
            "It was a {weather} {month} in {city}.", "We were in {city} in {month}, and it was {weather}.")),
    Record({"student": full_name, "subject": _of(words.SCHOOL_SUBJECTS), "grade": _whole(1, 6)},
           ("{student} got a {grade} in {subject}.", "In {subject}, {student} has grade {grade}.",
            "The grade of {student} in {subject} is {grade}.", "{subject}: {student}, {grade}.")),
    Record({"food": _of(words.FOODS), "country": _of(words.COUNTRIES), "tons": _whole(10, 900)},
           ("{country} sold {tons} tons of {food}.", "{tons} tons of {food} came from {country}.",
            "From {country} we bought {tons} tons of {food}.", "The {food} come from {country}, {tons} tons of them.")),
]  # fmt: skip


def _record(rng: Random, held_out: bool) -> tuple[str, dict[str, Any]]:
    """A sentence and the fields it tells."""

    def draw() -> tuple[tuple[str, dict[str, Any]], str]:
        record = rng.choice(RECORDS)
        values = {name: make(rng) for name, make in record.fields.items()}
        sentence = rng.choice(record.sentences).format_map(values)
        return (sentence, values), " ".join(map(str, values.values()))

    return until(held_out, draw)


def _some_fields(rng: Random, values: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(sorted(values), k=rng.choice((len(values), len(values), 2)))
    return {name: values[name] for name in names}


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


EXTRACT_ASKS = ["Extract {fields} as JSON: {text}", "Give me {fields} as JSON. {text}",
                "Read the text and answer in JSON with {fields}. Text: {text}",
                "{text} Put {fields} into a JSON object.",
                "JSON with the keys {fields}, please: {text}"]  # fmt: skip


def extract(rng: Random, held_out: bool) -> Exchange:
    text, values = _record(rng, held_out)
    chosen = _some_fields(rng, values)
    question = rng.choice(EXTRACT_ASKS).format(fields=_listed(list(chosen)), text=text)
    return ask("JSON extraction", question, json.dumps(chosen, ensure_ascii=False))


def _schema(rng: Random, values: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, value in values.items():
        properties[name] = {"type": "integer" if isinstance(value, int) else "string"}
        if value in words.COLORS or value in words.WEATHERS:
            options = words.COLORS if value in words.COLORS else words.WEATHERS
            others = [option for option in rng.sample(options, 3) if option != value][:2]
            properties[name]["enum"] = sorted([value, *others])
    return {"type": "object", "properties": properties, "required": list(values)}


SCHEMA_ASKS = ["Answer in JSON that follows this schema: {schema}\n{text}", "{text}\nSchema: {schema}",
               "Fill this JSON schema from the text.\nSchema: {schema}\nText: {text}"]  # fmt: skip


def to_schema(rng: Random, held_out: bool) -> Exchange:
    text, values = _record(rng, held_out)
    chosen = _some_fields(rng, values)
    schema = json.dumps(_schema(rng, chosen))
    answer = json.dumps(chosen, ensure_ascii=False)
    if rng.random() < 0.3:
        system = {"role": "system", "content": f"Answer in JSON that follows this schema: {schema}"}
        return Exchange("JSON to a schema", [system, user(text)], says(answer))
    return ask("JSON to a schema", rng.choice(SCHEMA_ASKS).format(schema=schema, text=text), answer)


# Tools --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A family with its names chosen for one conversation."""

    family: Family
    name: str
    parameter_names: tuple[str, ...]

    @property
    def parameters(self) -> list[tuple[str, Parameter]]:
        return list(zip(self.parameter_names, self.family.parameters))

    def describe(self, described: bool) -> dict[str, Any]:
        """As a client sends it; without the parameters' descriptions when not `described`."""
        properties: dict[str, Any] = {}
        for name, parameter in self.parameters:
            properties[name] = {"type": parameter.type}
            if parameter.choices:
                properties[name]["enum"] = list(parameter.choices)
            if described:
                properties[name]["description"] = parameter.description
        schema = {"type": "object", "properties": properties, "required": list(self.parameter_names)}
        function = {"name": self.name, "description": self.family.description, "parameters": schema}
        return {"type": "function", "function": function}


def _tool(rng: Random, family: Family) -> Tool:
    chosen: list[str] = []
    for parameter in family.parameters:
        names = parameter.names[:1] if rng.random() < 0.5 else parameter.names
        chosen.append(rng.choice([name for name in names if name not in chosen]))
    return Tool(family, rng.choice(family.names), tuple(chosen))


def _offer(rng: Random, wanted: Family) -> tuple[Tool, list[dict[str, Any]]]:
    """The wanted tool, and the list it is offered in with up to two others of other names."""
    tool = _tool(rng, wanted)
    others = [family for family in FAMILIES if family is not wanted and not _alike(family, wanted)]
    offered = [tool, *(_tool(rng, family) for family in rng.sample(others, rng.choice((0, 1, 1, 2))))]
    rng.shuffle(offered)
    described = rng.random() < 0.3
    return tool, [one.describe(described) for one in offered]


def _alike(one: Family, other: Family) -> bool:
    """Whether a request to one could as well be meant for the other."""
    groups = ("get_weather", "get_temperature"), ("buy", "add_todo"), ("get_price", "get_stock")
    return any(one.names[0] in group and other.names[0] in group for group in groups)


def _request(rng: Random, held_out: bool, families: list[Family]) -> tuple[Family, str, list[Any]]:
    """A family, what the user says, and the arguments' values in order."""

    def draw() -> tuple[tuple[Family, str, list[Any]], str]:
        family = rng.choice(families)
        values = {parameter.names[0]: parameter.draw(rng) for parameter in family.parameters}
        question = rng.choice(family.asks).format_map(values)
        return (family, question, list(values.values())), f"{family.names[0]} {values}"

    return until(held_out, draw)


def call_tool(rng: Random, held_out: bool) -> Exchange:
    family, question, values = _request(rng, held_out, FAMILIES)
    tool, tools = _offer(rng, family)
    answer = calls(tool.name, dict(zip(tool.parameter_names, values)))
    return Exchange("tool calls", [user(question)], answer, tools=tools)


def use_tool_answer(rng: Random, held_out: bool) -> Exchange:
    family, question, values = _request(rng, held_out, [family for family in FAMILIES if family.reply])
    tool, tools = _offer(rng, family)
    result = {name: make(rng) for name, make in family.results.items()}
    told = dict(zip((parameter.names[0] for parameter in family.parameters), values)) | result
    messages = [
        user(question),
        calls(tool.name, dict(zip(tool.parameter_names, values))),
        {"role": "tool", "content": json.dumps(result)},
    ]
    return Exchange("using a tool's answer", messages, says(family.reply.format_map(told)), tools=tools)


def no_tool_needed(rng: Random, held_out: bool) -> Exchange:
    """Tools are offered, but the user only wants to talk."""
    talk = rng.choice((small_talk, fact, add))(rng, held_out)
    numbers = ("add_numbers", "multiply")
    _, tools = _offer(rng, rng.choice([family for family in FAMILIES if family.names[0] not in numbers]))
    if talk.skill == "sums":
        tools = [
            tool for tool in tools if tool["function"]["description"] not in ("Add two numbers",)
        ] or None
    return Exchange("no tool needed", talk.messages, talk.answer, tools=tools, must=talk.must)


Maker = Callable[[Random, bool], Exchange]

# Each maker's share of the training exchanges, and whether it may stand in a conversation of several.
MIX: dict[Maker, float] = {
    small_talk: 3,
    fact: 9,
    unknown: 4,
    story: 9,
    add: 5,
    subtract: 5,
    sheet: 14,
    word_problem: 3,
    count_to: 2,
    count_words: 3,
    copy: 9,
    reverse: 7,
    change_case: 7,
    extract: 9,
    to_schema: 6,
    call_tool: 12,
    use_tool_answer: 4,
    no_tool_needed: 2,
}
CHAINABLE = {small_talk, fact, unknown, story, add, subtract, copy, reverse, change_case, extract, count_to}


def is_right(exchange: Exchange, text: str, tool_calls: list[tuple[str, Any]] = ()) -> bool:
    """Whether an answer (its text, or its calls as (name, arguments)) is right."""
    if "tool_calls" in exchange.answer:
        function = exchange.answer["tool_calls"][0]["function"]
        return list(tool_calls) == [(function["name"], json.loads(function["arguments"]))]
    if tool_calls:
        return False
    if exchange.must is not None:
        return bool(text.strip()) and all(part in text for part in exchange.must)
    if exchange.skill.startswith("JSON"):
        return _as_json(text) == json.loads(exchange.answer["content"])
    return text.strip() == exchange.answer["content"]


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
