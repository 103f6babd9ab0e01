"""Short stories: a hero, a wish, a trouble, a way out, and an end.

Owns plots and sentences. `tell` makes one story from a random generator and a cast; every choice is drawn from
that generator, so that a seed is a story. All sentences were written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from examples.box_model import words


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    name: str
    kind: str  # "fox", "baker"
    pronoun: str  # "he" or "she"
    thing: str

    @property
    def slots(self) -> dict[str, str]:
        his, him = ("his", "him") if self.pronoun == "he" else ("her", "her")
        return {
            "name": self.name,
            "kind": self.kind,
            "thing": self.thing,
            "he": self.pronoun,
            "He": self.pronoun.capitalize(),
            "his": his,
            "His": his.capitalize(),
            "him": him,
        }


def draw_cast(rng: Random) -> Cast:
    """A hero with a name and a kind, and a thing that matters."""
    is_girl = rng.random() < 0.5
    kind = rng.choice(words.ANIMALS if rng.random() < 0.6 else words.JOBS)
    if kind in ("king", "prince", "cow", "hen"):
        is_girl = kind in ("cow", "hen")
    if kind in ("queen", "princess", "bull", "rooster", "boar"):
        is_girl = kind in ("queen", "princess")
    name = rng.choice(words.GIRLS if is_girl else words.BOYS)
    return Cast(name, kind, "she" if is_girl else "he", rng.choice(words.THINGS))


OPENINGS = [
    "Once upon a time there was {a_temper} {kind} named {name}.",
    "Long ago, in {a_quality} {place}, there lived {a_kind} called {name}.",
    "{name} was {a_temper} {kind} who lived near {a_quality} {place}.",
    "In a {size} {place} by the {place2} lived {name}, {a_temper} {kind}.",
    "There once was {a_kind} named {name}, who lived alone in {a_quality} {place}.",
    "Far away, behind the {place2}, {a_temper} {kind} named {name} had a {size} house.",
    "Everybody in the {place} knew {name}, the {temper} {kind}.",
    "Nobody was as {temper} as {name} the {kind}.",
]
TREASURES = [
    "{name} had {a_quality} {thing}, and {he} loved it more than anything.",
    "{His} dearest treasure was {a_color} {thing} that {his} grandmother had given {him}.",
    "Every evening {he} took out {his} {quality} {thing} and looked at it.",
    "{He} owned little, but {he} had {a_quality} {thing}.",
]
HABITS = [
    "Every morning {he} walked to the {place2} and sang a song.",
    "{He} liked {food} and long walks in the {season}.",
    "In the {season} {he} sold {food} at the market.",
    "{He} loved to sit by the window and count the clouds.",
    "At night {he} listened to the wind and could not sleep.",
    "Most of all {he} liked to talk with {friend}, the {temper2} {kind2} next door.",
]
FRIENDS = [
    "{His} best friend was {friend}, {a_temper2} {kind2}.",
    "On the way {he} met {friend}, {a_temper2} {kind2}.",
    "Then {a_temper2} {kind2} named {friend} came along.",
    "Behind {a_size} tree sat {friend}, {a_temper2} {kind2}.",
]
PLANS = [
    '"We must not give up," said {friend}. "Let us think."',
    '"I have an idea," said {friend}. "Follow me!"',
    '"Do not be afraid," said {friend}. "I will help you."',
    "They sat down, shared some {food}, and made a plan.",
    "They talked about it all night, until the stars grew pale.",
    '"Two heads are better than one," said {friend}.',
]
JOYS = [
    "{name} was so happy that {he} danced in the {place2}.",
    "{name} laughed, and {friend} laughed too.",
    "That evening they ate {food} and told each other stories.",
    "The whole {place} heard of it, and everyone was glad.",
    "{name} thanked {friend} with a basket of {food}.",
    "They lit {a_size} fire and sang until midnight.",
]
LESSONS = [
    "From that day on, {name} and {friend} were friends for life.",
    "And {name} never forgot what a friend is worth.",
    "Since then {he} has never been {bad} again.",
    "And if you walk by the {place}, you can still hear them laugh.",
    "{name} learned that it is better to ask than to worry.",
    "So the {temper} {kind} slept well at last.",
    "And that is the end of the story.",
    "{name} smiled, because the day had been long and good.",
]

# A plot is a list of beats; one sentence is taken of each.
PLOTS: dict[str, list[list[str]]] = {
    "lost": [
        TREASURES,
        [
            "One {weather} day the {thing} was gone.",
            "But one {weather} morning {he} could not find the {thing}.",
            "Then, on a {weather} evening, the {thing} disappeared.",
        ],
        [
            "{He} looked under the bed, behind the door and in the {place2}, but it was not there.",
            "{name} searched the whole {place} and found only {a_quality} {thing2}.",
            "{He} cried a little, and then {he} began to search.",
        ],
        FRIENDS,
        PLANS,
        [
            "At last they found the {thing} in {a_quality} {thing2}, where {a_animal} had made its nest.",
            "In the {place2} they saw something shine: it was the {thing}!",
            "{friend} dug a hole by the {place2}, and there lay the {thing}.",
            "It turned out that {a_animal} had taken it, because it was so {quality}.",
        ],
    ],
    "storm": [
        HABITS,
        [
            "One night a terrible storm came over the {place}.",
            "Then came the worst storm that anyone could remember.",
            "In the {season} the river rose higher every day.",
        ],
        [
            "The wind broke the roof, and the rain came in.",
            "The water carried away the fence, the gate and the {thing}.",
            "Trees fell, and the road to the {place2} was closed.",
        ],
        [
            "{friend}, {a_temper2} {kind2}, was alone in the {place2} and called for help.",
            "From far away {he} heard {friend} the {kind2} call for help.",
        ],
        [
            "{name} took {a_quality} {thing} and ran out into the dark.",
            "{name} was afraid, but {he} tied a rope to the {thing} and went.",
            "Without a word {he} took {his} {thing} and a lamp and went out.",
        ],
        [
            "With the {thing} {he} reached {friend} just in time.",
            "Step by step {he} crossed the water and pulled {friend} out.",
            "{He} found {friend} in {a_size} boat and brought {him2} home.",
        ],
        [
            "In the morning the sky was clear, and they mended the roof together.",
            "When the sun rose, the storm was over.",
        ],
    ],
    "wish": [
        HABITS,
        [
            "But there was one thing {he} wished for: {a_quality} {thing}.",
            "{His} only wish was to have {a_color} {thing}.",
            "One day {he} saw {a_quality} {thing} in a shop window and wanted it very much.",
        ],
        [
            "It cost {number} coins, and {name} had only three.",
            "But {he} had no money at all.",
            '"It costs {number} coins," said the owner of the shop.',
        ],
        [
            "So {he} worked for {friend}, {a_temper2} {kind2}, and carried {food} to the market.",
            "So {he} helped {friend} the {kind2} to paint the {place2}.",
            "So {he} picked {food} for {friend}, {a_temper2} {kind2}, for {number} days.",
        ],
        [
            "On the last day {he} met a hungry {animal} and gave it half of {his} coins.",
            "Then {he} saw that {friend} had no {thing2}, and bought {him2} one instead.",
            "When {he} came to the shop with the coins, the {thing} was sold.",
        ],
        [
            "The next morning {a_quality} {thing} lay before {his} door.",
            "But {friend} had bought the {thing} and gave it to {him} as a gift.",
            "And what did {friend} have behind {his2} back? The {thing}!",
        ],
    ],
    "fear": [
        HABITS,
        [
            "But {name} was afraid of the dark.",
            "There was only one thing {he} feared: the {place2} at night.",
            "Everyone could swim, but {name} was afraid of the water.",
        ],
        [
            "The others laughed at {him}, and that made {him} sad.",
            "{He} told nobody about it.",
            "{He} was ashamed and stayed at home.",
        ],
        FRIENDS,
        [
            '{friend} gave {him} {a_quality} {thing}. "It is magic," {he2} said.',
            '"Take this {thing}," said {friend}. "It will keep you safe."',
        ],
        [
            "With the {thing} in {his} hand {he} went, one step and then another.",
            "{name} held the {thing} tight and closed {his} eyes.",
            "That night {he} took the {thing} and walked to the {place2}.",
        ],
        [
            "Nothing happened. There was only {a_size} {animal}, and it was afraid too.",
            "In the dark {he} saw the stars, and they were beautiful.",
            '"It was never magic," said {friend}. "It was you."',
        ],
    ],
    "contest": [
        [
            "Every {season} there was a great race in the {place}.",
            "One day the {ruler} called everyone to a contest in the {place2}.",
        ],
        [
            "The prize was {a_quality} {thing}.",
            "Whoever won would get {a_color} {thing} and a cake.",
        ],
        [
            "{friend}, {a_temper2} {kind2}, was sure to win.",
            '"I shall win," said {friend} the {kind2}, "because I am the best."',
        ],
        [
            "{name} was slow, but {he} practiced every day.",
            "{name} was the smallest of all, but {he} was not afraid.",
        ],
        [
            "When the bell rang, they all ran.",
            "The drum sounded, and off they went.",
        ],
        [
            "In the middle of the road {friend} fell over {a_quality} {thing2}.",
            "By the {place2} {friend} got stuck in the mud.",
        ],
        [
            "{name} could have won, but {he} stopped and helped {friend} up.",
            "{name} turned back and gave {friend} a hand.",
        ],
        [
            "They reached the end together, and the {ruler} cut the prize in two.",
            "They came in last, but the people clapped for them the longest.",
            '"The {thing} belongs to both of you," said the {ruler}.',
        ],
    ],
    "door": [
        HABITS,
        [
            "One day, behind the {place2}, {he} found {a_size} door.",
            "Under {a_quality} {thing2} {he} found a key.",
            "In the cellar there was {a_color} door that nobody had ever opened.",
        ],
        [
            "On it was written: only for the one who is {temper}.",
            "It was locked, and through the hole came a {color} light.",
            "Behind it {he} heard soft music.",
        ],
        FRIENDS,
        [
            "Together they pushed, and the door opened slowly.",
            "{friend} turned the key, and the lock went click.",
            '"Shall we?" asked {friend}. "We shall," said {name}.',
        ],
        [
            "Inside was a garden where {food} grew on the trees.",
            "Inside was a room full of clocks, and each showed another hour.",
            "Inside they found an old {animal} that had slept for {number} years.",
        ],
        [
            "In the middle stood {a_quality} {thing}, and it began to sing.",
            "There lay {a_color} {thing} with {his} name on it.",
            '"Take the {thing}," said a voice, "and be {temper2}."',
        ],
    ],
    "mend": [
        TREASURES,
        [
            "One {weather} day it fell and broke.",
            "Then {a_temper} {animal} jumped on it, and it broke in two.",
        ],
        [
            '"Who can mend {a_thing}?" {he} asked everyone in the {place}.',
            "{He} carried the pieces from house to house.",
        ],
        [
            '"I cannot," said the {job}. "Ask in the {place2}."',
            '"Nobody can mend that," said the {job}.',
        ],
        FRIENDS,
        [
            '"I have never mended {a_thing}," said {friend}, "but I can try."',
            '"Give me {number} days and some {food}," said {friend}.',
        ],
        [
            "It took glue, thread, and a lot of patience.",
            "They worked by the light of {a_size} lamp until it was done.",
            "They used a piece of {a_color} {thing2}, and it fitted.",
        ],
        [
            "Now the {thing} had a crack, and through it came a {color} light.",
            "The {thing} was not as before, but it was {quality}, and {name} loved it even more.",
            "In the end the {thing} was better than new.",
        ],
    ],
    "letter": [
        [
            "One {weather} morning a letter came.",
            "On {day} the wind blew a letter through {his} window.",
        ],
        [
            '"Dear {name}," it said, "please bring me {a_quality} {thing}."',
            '"Come to the {place2} on {day}," it said, "and bring {a_thing}."',
        ],
        [
            "There was no name under it.",
            "It was written in {color} ink, and it smelled of {food}.",
        ],
        [
            "{name} was {temper}, so {he} packed a bag with {food} and went.",
            "{name} put {a_thing} in {his} bag and set out at once.",
        ],
        [
            "{He} crossed the {place}, climbed a hill and slept under the stars.",
            "For {number} days {he} walked, past the {place} and through the {place2}.",
        ],
        [
            "At the end of the road stood {friend}, {a_temper2} {kind2}.",
            "In {a_size} hut sat {friend}, {a_temper2} {kind2}, and smiled.",
        ],
        [
            '"I was so lonely," said {friend}. "I did not know how else to ask."',
            '"You came!" said {friend}. "I have waited for so long."',
            '"It is my birthday," said {friend}, "and now I have a guest."',
        ],
    ],
}


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return (
        "an " if word[0] in "aeiou" and not word.startswith("u") or word in ("ugly", "umbrella") else "a "
    ) + word


def tell(rng: Random, cast: Cast) -> str:
    """A story of six to twelve sentences in which the hero's name, kind and thing occur."""
    plot = PLOTS[rng.choice(sorted(PLOTS))]
    beats = [OPENINGS, *plot, JOYS, LESSONS]
    slots = cast.slots | _draw_slots(rng, cast)
    return " ".join(rng.choice(beat).format_map(slots) for beat in beats)


def _draw_slots(rng: Random, cast: Cast) -> dict[str, str]:
    friend_is_girl = rng.random() < 0.5
    friend = rng.choice([n for n in (words.GIRLS if friend_is_girl else words.BOYS) if n != cast.name])
    drawn = {
        "friend": friend,
        "he2": "she" if friend_is_girl else "he",
        "his2": "her" if friend_is_girl else "his",
        "him2": "her" if friend_is_girl else "him",
        "temper": rng.choice(words.TEMPERS),
        "temper2": rng.choice(words.TEMPERS),
        "bad": rng.choice(["sad", "lonely", "afraid", "bored", "angry"]),
        "kind2": rng.choice([k for k in words.ANIMALS if k != cast.kind]),
        "animal": rng.choice(words.ANIMALS),
        "job": rng.choice(words.JOBS),
        "ruler": rng.choice(["king", "queen", "mayor", "prince"]),
        "thing2": rng.choice([t for t in words.THINGS if t != cast.thing]),
        "food": rng.choice(words.FOODS),
        "color": rng.choice(words.COLORS),
        "size": rng.choice(words.SIZES),
        "quality": rng.choice(words.QUALITIES),
        "season": rng.choice(words.SEASONS),
        "weather": rng.choice(words.WEATHERS),
        "day": rng.choice(words.DAYS),
        "number": rng.choice("four five six seven eight nine ten twelve twenty thirty".split()),
    }
    drawn["place"], drawn["place2"] = rng.sample(words.PLACES, 2)
    for key in ("temper", "temper2", "quality", "color", "size", "animal"):
        drawn[f"a_{key}"] = article(drawn[key])
    return drawn | {"a_kind": article(cast.kind), "a_thing": article(cast.thing)}
