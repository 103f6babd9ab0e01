"""Functions that a conversation may offer, and what people say when they want one called.

Owns the families of functions. A family's names and parameter names vary from conversation to conversation, so
that a model has to read the ones it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from examples.box_model import words
from examples.box_model.draw import clock_time, full_name, money, small

Value = Callable[[Random], Any]


@dataclass(frozen=True)
class Parameter:
    """One argument: its possible names, its JSON type, what it means, and how to draw a value."""

    names: tuple[str, ...]
    type: str
    description: str
    draw: Value
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A function under several names. `asks` hold the parameters' first names in braces.

    `results` draws what the function returns; `reply` puts arguments and result into words.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[Parameter, ...]
    asks: tuple[str, ...]
    results: dict[str, Value] = field(default_factory=dict)
    reply: str = ""


def one_of(options: list[str] | tuple[str, ...]) -> Value:
    return lambda rng: rng.choice(options)


def _text(names: str, description: str, draw: Value) -> Parameter:
    return Parameter(tuple(names.split("|")), "string", description, draw)


def _integer(names: str, description: str, draw: Value) -> Parameter:
    return Parameter(tuple(names.split("|")), "integer", description, draw)


def _choice(names: str, description: str, *choices: str) -> Parameter:
    return Parameter(tuple(names.split("|")), "string", description, one_of(choices), choices)


CITY = _text("city|location|place|town", "Name of the city", one_of(words.CITIES))

# fmt: off
FAMILIES = [
    Family(("get_weather", "weather", "current_weather", "get_current_weather"), "Get the weather in a city", (CITY,),
           ("What is the weather in {city}?", "How is the weather in {city} today?",
            "Is it raining in {city}?",
            "Tell me the weather in {city}.", "Do I need an umbrella in {city}?", "Weather for {city}, please."),
           {"weather": one_of(words.WEATHERS), "degrees": small(1, 35)},
           "It is {weather} in {city}, with {degrees} degrees."),
    Family(("get_temperature", "temperature", "read_temperature"), "Get the temperature in a city",
           (CITY, _choice("unit|scale", "Unit of the answer", "celsius", "fahrenheit")),
           ("How warm is it in {city} in {unit}?", "What is the temperature in {city} in {unit}?",
            "Give me the temperature of {city} in {unit}.", "How cold is it in {city}? Use {unit}."),
           {"temperature": small(1, 95)}, "It is {temperature} degrees {unit} in {city}."),
    Family(("get_time", "current_time", "time_in_city", "local_time"), "Get the time in a city", (CITY,),
           ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?",
            "What is the local time in {city}?", "Is it already evening in {city}?"),
           {"time": clock_time}, "It is {time} in {city}."),
    Family(("send_email", "email", "write_email"), "Send an email",
           (_text("to|recipient|name", "Who gets it", full_name),
            _text("subject|title|topic", "What it is about", one_of(words.MEETINGS))),
           ("Send an email to {to} about the {subject}.", "Email {to} about the {subject}.",
            "Write an email to {to}. It is about the {subject}.", "Please mail {to} about the {subject}."),
           {"status": one_of(["sent", "failed"])}, "The email to {to} was {status}."),
    Family(("set_alarm", "alarm", "wake_me"), "Set an alarm", (_text("time|at|when", "Time of the alarm", clock_time),),
           ("Wake me at {time}.", "Set an alarm for {time}.", "I need an alarm at {time}.",
            "I must get up at {time}."),
           {"status": one_of(["set", "failed"])}, "The alarm for {time} was {status}."),
    Family(("set_timer", "start_timer", "timer", "countdown"), "Start a timer",
           (_integer("minutes|length|duration", "Minutes to wait", small(1, 90)),),
           ("Set a timer for {minutes} minutes.", "Tell me when {minutes} minutes are over.",
            "Start a timer of {minutes} minutes.", "Count down {minutes} minutes.")),
    Family(("create_event", "add_event", "schedule_event", "new_event"), "Put an event into the calendar",
           (_text("title|name|event", "What it is", one_of(words.MEETINGS)),
            _text("day|date|weekday", "Day of the week", one_of(words.DAYS)),
            _text("time|start|at", "Start time", clock_time)),
           ("Put a {title} into my calendar on {day} at {time}.", "Schedule a {title} for {day} at {time}.",
            "I have a {title} on {day} at {time}, please add it.", "Add a {title} on {day}, {time}.")),
    Family(("add_numbers", "add", "sum", "plus"), "Add two numbers",
           (_integer("a|first|x", "First number", small(100, 999)),
            _integer("b|second|y", "Second number", small(100, 999))),
           ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?", "Calculate {a} + {b}."),
           {"result": small(200, 1998)}, "{a} + {b} = {result}"),
    Family(("multiply", "times", "product", "multiply_numbers"), "Multiply two numbers",
           (_integer("a|first|x", "First number", small(2, 99)),
            _integer("b|second|y", "Second number", small(2, 99))),
           ("What is {a} times {b}?", "Multiply {a} by {b}.", "How much is {a} * {b}?",
            "Calculate {a} * {b}."),
           {"result": small(100, 9000)}, "{a} * {b} = {result}"),
    Family(("play_music", "play", "play_song", "start_music"), "Play music",
           (_text("instrument|sound|kind", "Instrument to hear", one_of(words.INSTRUMENTS)),),
           ("Play some {instrument} music.", "I want to hear a {instrument}.",
            "Put on {instrument} music, please.",
            "Let me listen to the {instrument}.")),
    Family(("turn_on_light", "light_on", "switch_light", "set_light"), "Switch the light in a room",
           (_text("room|place|where", "Which room", one_of(words.ROOMS)),
            _choice("state|mode|to", "On or off", "on", "off")),
           ("Turn {state} the light in the {room}.", "Switch the {room} light {state}.",
            "Light {state} in the {room}!",
            "Please turn the light in the {room} {state}."),
           {"status": one_of(["done", "failed"])}, "Turning the light in the {room} {state}: {status}."),
    Family(("book_flight", "find_flight", "search_flights", "flight"), "Find a flight between two cities",
           (_text("from|origin|departure", "City to start from", one_of(words.CITIES)),
            _text("to|destination|arrival", "City to go to", one_of(words.CITIES)),
            _text("day|date|when", "Day of the flight", one_of(words.DAYS))),
           ("I want to fly from {from} to {to} on {day}.", "Find a flight from {from} to {to} on {day}.",
            "Book me a flight on {day} from {from} to {to}.", "Is there a plane from {from} to {to} on {day}?")),
    Family(("book_table", "reserve_table", "table", "reservation"), "Book a table in a restaurant",
           (_integer("people|guests|persons", "How many people", small(2, 12)),
            _text("day|date|when", "Day of the week", one_of(words.DAYS)),
            _text("time|at|hour", "Time of day", clock_time)),
           ("Book a table for {people} on {day} at {time}.",
            "A table for {people} people on {day} at {time}, please.",
            "We are {people} and want to eat out on {day} at {time}.")),
    Family(("translate", "translate_word", "translation"), "Translate a word",
           (_text("word|text|term", "What to translate", one_of(words.PLAIN_WORDS)),
            _text("language|to|target", "Language to translate into", one_of(words.LANGUAGES))),
           ("Translate {word} into {language}.", "What is {word} in {language}?",
            "How do you say {word} in {language}?",
            "I need the {language} word for {word}.")),
    Family(("get_price", "price", "find_price", "check_price"), "Get the price of a product",
           (_text("product|item|article", "Which product", one_of(words.GOODS)),),
           ("How much do {product} cost?", "What is the price of {product}?", "Find the price of {product}.",
            "Are {product} expensive?"), {"price": money}, "The price of {product} is {price}."),
    Family(("get_stock", "check_stock", "stock", "inventory"), "Count how many of a product are in stock",
           (_text("product|item|article", "Which product", one_of(words.GOODS)),),
           ("How many {product} are in stock?", "Do we have {product} in stock?",
            "Count the {product} in the store.",
            "Are there any {product} left?"), {"count": small(0, 99)}, "There are {count} {product} in stock."),
    Family(("buy", "order", "place_order", "order_product"), "Order a product",
           (_text("product|item|article", "Which product", one_of(words.GOODS)),
            _integer("quantity|count|number", "How many", small(2, 60))),
           ("Order {quantity} {product}.", "Buy {quantity} {product} for me.", "I need {quantity} {product}.",
            "Please get {quantity} {product}."),
           {"status": one_of(["ordered", "sold out"])}, "{quantity} {product}: {status}."),
    Family(("find_recipe", "recipe", "search_recipes", "get_recipe"), "Find a recipe with an ingredient",
           (_text("ingredient|food|with", "What must be in it", one_of(words.FOODS)),),
           ("What can I cook with {ingredient}?", "Find a recipe with {ingredient}.",
            "I have {ingredient}. What now?",
            "Give me a recipe that uses {ingredient}.")),
    Family(("add_todo", "todo", "add_task", "remember"), "Add something to the list of things to do",
           (_text("task|text|item", "What to do", lambda rng: f"buy {rng.choice(words.FOODS)}"),),
           ("Remind me to {task}.", "I must not forget to {task}.", "Put this on my list: {task}.",
            "Note: {task}.")),
    Family(("call", "phone", "call_person", "dial"), "Call a person on the phone",
           (_text("person|name|who", "Whom to call", full_name),),
           ("Call {person}.", "I want to talk to {person} on the phone.", "Ring {person}, please.",
            "Phone {person}.")),
    Family(("get_population", "population", "count_people"), "Get how many people live in a country",
           (_text("country|nation|land", "Which country", one_of(words.COUNTRIES)),),
           ("How many people live in {country}?", "What is the population of {country}?",
            "Count the people of {country}."),
           {"millions": small(1, 400)}, "About {millions} million people live in {country}."),
    Family(("get_capital", "capital", "capital_of"), "Get the capital of a country",
           (_text("country|nation|land", "Which country", one_of(words.COUNTRIES)),),
           ("What is the capital of {country}?", "Which city is the capital of {country}?",
            "Name the capital of {country}."),
           {"capital": one_of(words.CITIES)}, "The capital of {country} is {capital}."),
    Family(("roll_dice", "roll", "throw_dice"), "Roll dice",
           (_integer("count|number|dice", "How many dice", small(1, 9)),),
           ("Roll {count} dice.", "Throw {count} dice for me.", "I want to roll {count} dice.")),
    Family(("search_books", "find_book", "books", "library_search"), "Search the library for books",
           (_text("topic|subject|about", "What the book is about", one_of(words.SCHOOL_SUBJECTS + words.HOBBIES)),),
           ("Find a book about {topic}.", "Are there books on {topic}?", "I want to read about {topic}.",
            "Search the library for {topic}.")),
]
