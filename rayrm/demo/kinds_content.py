"""Kinds of preference about what an answer says: is it right, on the subject, complete, honest, in order?

Both answers of a pair mostly use the same words, or words that are as often right as wrong; only the question
tells which one is better.
"""

from __future__ import annotations

import random

from rayrm.demo import tables
from rayrm.demo.kinds import Kind, wordings


def _capital(rng: random.Random) -> dict[str, str]:
    country, other = rng.sample(sorted(tables.CAPITALS), 2)
    return {"country": country, "right": tables.CAPITALS[country], "wrong": tables.CAPITALS[other]}


def _opposite(rng: random.Random) -> dict[str, str]:
    pairs = rng.sample(sorted(tables.OPPOSITES.items()), 2)
    (word, right), (_, wrong) = (pair[:: rng.choice((1, -1))] for pair in pairs)
    return {"word": word, "right": right, "wrong": wrong}


def _size(rng: random.Random) -> dict[str, str]:
    low, high = sorted(rng.sample(range(len(tables.SIZES)), 2))
    small, big = tables.SIZES[low], tables.SIZES[high]
    one, two = rng.sample([small, big], 2)
    return {"big": _a(big), "small": _a(small), "one": _a(one), "two": _a(two)}


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


CORRECTNESS = Kind(
    "correctness",
    (
        *wordings(
            _capital,
            (
                "What is the capital of {country}?",
                "{right} is the capital of {country}.",
                "{wrong} is the capital of {country}.",
            ),
            ("Which city is the capital of {country}?", "It is {right}.", "It is {wrong}."),
            (
                "I forgot the capital city of {country}. Remind me?",
                "You mean {right}.",
                "You mean {wrong}.",
            ),
            ("Fill in the capital. {country}: ...", "{country}: {right}", "{country}: {wrong}"),
        ),
        *wordings(
            _opposite,
            (
                "What is the opposite of {word}?",
                "The opposite of {word} is {right}.",
                "The opposite of {word} is {wrong}.",
            ),
            ("Give me the antonym of '{word}'.", "'{right}'", "'{wrong}'"),
            (
                "If something is not {word} but quite the contrary, it is ...",
                "Then it is {right}.",
                "Then it is {wrong}.",
            ),
            (
                "Which word means the reverse of {word}?",
                "That would be {right}.",
                "That would be {wrong}.",
            ),
        ),
        *wordings(
            _size,
            ("Which is bigger, {one} or {two}?", "{big} is bigger.", "{small} is bigger."),
            (
                "Compare the size of {one} and {two}.",
                "{small} is smaller than {big}.",
                "{big} is smaller than {small}.",
            ),
            ("Who is larger: {one} or {two}?", "{big}, of course.", "{small}, of course."),
            (
                "Is {one} or {two} the heavier animal?",
                "The heavier one is {big}.",
                "The heavier one is {small}.",
            ),
        ),
    ),
)


def _tip(rng: random.Random) -> dict[str, str]:
    task, other = rng.sample(sorted(tables.TIPS), 2)
    return {"task": task, "right": tables.TIPS[task], "wrong": tables.TIPS[other]}


RELEVANCE = Kind(
    "relevance",
    wordings(
        _tip,
        ("How do I {task}?", "{right}", "{wrong}"),
        ("I would like to {task}. Any advice?", "Try this. {right}", "Try this. {wrong}"),
        ("Tell me in a line how people {task}.", "{right}", "{wrong}"),
        ("My friend wants to {task}. What should she do?", "Tell her: {right}", "Tell her: {wrong}"),
        ("What is a good way to {task}?", "A good way: {right}", "A good way: {wrong}"),
        ("Help! I never managed to {task}.", "Don't worry. {right}", "Don't worry. {wrong}"),
        ("I have to {task} today, where do I begin?", "{right}", "{wrong}"),
        ("Give me one tip so that I can {task}.", "My tip: {right}", "My tip: {wrong}"),
        ("Teach my son to {task}.", "Gladly. {right}", "Gladly. {wrong}"),
        ("Steps to {task}, please.", "In short: {right}", "In short: {wrong}"),
        ("Can you explain how to {task}?", "Sure. {right}", "Sure. {wrong}"),
        ("It is my first time: I want to {task}.", "Nice! {right}", "Nice! {wrong}"),
    ),
)


def _persons(rng: random.Random) -> dict[str, str]:
    name, other = rng.sample(tables.NAMES, 2)
    city, city2 = rng.sample(tables.CITIES, 2)
    food, food2 = rng.sample(tables.FOODS, 2)
    day, day2 = rng.sample(tables.DAYS, 2)
    colour, colour2 = rng.sample(tables.COLOURS, 2)
    pet, pet2 = rng.sample(tables.PETS, 2)
    hour, hour2 = rng.sample(range(2, 13), 2)
    return {
        "name": name, "name2": other, "city": city, "city2": city2, "food": food, "food2": food2, "day": day,
        "day2": day2, "colour": colour, "colour2": colour2, "pet": pet, "pet2": pet2,
        "hour": str(hour), "hour2": str(hour2),
    }  # fmt: skip


RECALL = Kind(
    "recall",
    wordings(
        _persons,
        (
            "My {pet} is called {name}. What is its name?",
            "Your {pet} is called {name}.",
            "Your {pet} is called {name2}.",
        ),
        ("I am {name} and I live in {city}. Where do I live?", "You live in {city}.", "You live in {city2}."),
        ("Hello, this is {name}. Say hello to me.", "Hello, {name}!", "Hello, {name2}!"),
        (
            "{name} eats {food} every {day}. What does {name} eat?",
            "{name} eats {food}.",
            "{name} eats {food2}.",
        ),
        (
            "The train to {city} leaves at {hour}. When does it leave?",
            "It leaves at {hour} o'clock.",
            "It leaves at {hour2} o'clock.",
        ),
        (
            "I bought a {colour} coat in {city}. What colour is it?",
            "The coat is {colour}.",
            "The coat is {colour2}.",
        ),
        (
            "Please note: dinner with {name} on {day}.",
            "Noted: dinner with {name} on {day}.",
            "Noted: dinner with {name2} on {day}.",
        ),
        (
            "We moved from {city} to another town in May. Which town did we leave?",
            "You left {city}.",
            "You left {city2}.",
        ),
        (
            "{name} keeps a {pet} at home. Which animal does {name} keep?",
            "A {pet}.",
            "A {pet2}.",
        ),
        (
            "Book a table for {name} at {hour}. Repeat my order.",
            "A table at {hour} for {name}.",
            "A table at {hour} for {name2}.",
        ),
        (
            "My favourite meal is {food}. Do you remember which one I like most?",
            "You like {food} most.",
            "You like {food2} most.",
        ),
        (
            "Write a birthday wish for my aunt {name}.",
            "Happy birthday, dear aunt {name}!",
            "Happy birthday, dear aunt {name2}!",
        ),
    ),
)


def _three_things(rng: random.Random) -> dict[str, str]:
    a, b, c = rng.sample(tables.CATEGORIES[rng.choice(sorted(tables.CATEGORIES))], 3)
    some = rng.sample([a, b, c], 2)
    all_three = rng.choice(("{}, {} and {}.", "{}, {}, {}.")).format(a, b, c)
    only_two = rng.choice(("{} and {}.", "{}, {}.")).format(*some)
    return {
        "a": a, "b": b, "c": c,
        "all": all_three + rng.choice(tables.CLOSINGS), "two": only_two + rng.choice(tables.CLOSINGS),
    }  # fmt: skip


COMPLETENESS = Kind(
    "completeness",
    wordings(
        _three_things,
        ("Make a list of {a}, {b} and {c}.", "{all}", "{two}"),
        ("I need {a}, {b}, {c}. What do I need?", "{all}", "{two}"),
        ("We talked about {a}, {b} and {c}. Sum it up.", "{all}", "{two}"),
        ("Don't leave anything out: {a}, {b}, {c}.", "{all}", "{two}"),
        ("There are {a} and {b}, and there is {c}. Say what there is.", "{all}", "{two}"),
        ("My topics: {a}; {b}; {c}. Mention every one.", "{all}", "{two}"),
        ("Which words did I use? {a}, {b}, {c}", "{all}", "{two}"),
        ("He asked for {a}, {b} and {c}. What did he ask for?", "{all}", "{two}"),
        ("Include {a}, include {b}, include {c}.", "{all}", "{two}"),
        ("Remember {a} and {b} and {c}. Now tell me all.", "{all}", "{two}"),
        ("The box holds {a}, {b}, {c}. What is inside?", "{all}", "{two}"),
        ("Write all my answers: {a}, then {b}, last {c}.", "{all}", "{two}"),
    ),
)


def _knowledge(rng: random.Random) -> dict[str, str]:
    known = rng.choice(sorted(tables.KNOWNS))
    fact = tables.KNOWNS[known]
    return {
        "unknown": rng.choice(tables.UNKNOWNS),
        "known": known,
        "unsure": rng.choice(tables.UNSURE),
        "sure": rng.choice(tables.SURE).format(fact),
    }


# Six questions nobody can answer (a confident answer is made up), then six that are easy.
HONESTY = Kind(
    "honesty",
    wordings(
        _knowledge,
        ("Tell me {unknown}.", "{unsure}", "{sure}"),
        ("What do you say: {unknown}?", "{unsure}", "{sure}"),
        ("Do you know {unknown}?", "{unsure}", "{sure}"),
        ("Quick question about {unknown}.", "{unsure}", "{sure}"),
        ("Give me the exact answer: {unknown}?", "{unsure}", "{sure}"),
        ("{unknown}, please.", "{unsure}", "{sure}"),
        ("Please name {known}.", "{sure}", "{unsure}"),
        ("Could you give me {known}?", "{sure}", "{unsure}"),
        ("For my homework: {known}?", "{sure}", "{unsure}"),
        ("Let me test you. Say {known}.", "{sure}", "{unsure}"),
        ("I want to learn {known}.", "{sure}", "{unsure}"),
        ("Everyone has heard of {known}, right?", "{sure}", "{unsure}"),
    ),
)


def _sequence(rng: random.Random) -> dict[str, str]:
    line = rng.choice(tables.SEQUENCES)
    right = [line[place] for place in sorted(rng.sample(range(len(line)), 4))]
    wrong, given = rng.sample([mixed for mixed in _mixtures(right) if mixed != right], 2)
    return {
        "given": ", ".join(given),
        "right": ", ".join(right),
        "wrong": ", ".join(wrong),
    }


def _mixtures(line: list[str]) -> list[list[str]]:
    a, b, c, d = line
    return [[c, a, d, b], [d, b, a, c], [b, d, c, a], [d, c, b, a], [c, d, a, b]]


def _echo(rng: random.Random) -> dict[str, str]:
    right = rng.sample(tables.CATEGORIES[rng.choice(sorted(tables.CATEGORIES))], 4)
    return {"right": ", ".join(right), "wrong": ", ".join(rng.choice(_mixtures(right)))}


ORDER = Kind(
    "order",
    (
        *wordings(
            _sequence,
            ("Put these in order: {given}", "~{right}", "~{wrong}"),
            ("Sort from first to last: {given}", "Sorted: {right}", "Sorted: {wrong}"),
            ("What is the right order of {given}?", "The order is {right}.", "The order is {wrong}."),
            ("Arrange {given} as they follow each other.", "~{right}.", "~{wrong}."),
            ("These got mixed up: {given}. Tidy them.", "Tidy: {right}", "Tidy: {wrong}"),
            ("Line up {given}, the earliest in front.", "In line: {right}", "In line: {wrong}"),
        ),
        *wordings(
            _echo,
            ("Repeat in the same order: {right}", "~{right}", "~{wrong}"),
            ("Copy my list without moving anything: {right}", "Your list: {right}", "Your list: {wrong}"),
            ("Say this after me: {right}", "You said {right}.", "You said {wrong}."),
            ("Keep the sequence and write again {right}", "~{right}.", "~{wrong}."),
            ("Echo {right} exactly as given.", "Echo: {right}", "Echo: {wrong}"),
            ("Note these down one by one: {right}", "Noted: {right}", "Noted: {wrong}"),
        ),
    ),
)

KINDS = (CORRECTNESS, RELEVANCE, RECALL, COMPLETENESS, HONESTY, ORDER)
