"""Toy: a dozen kinds of one-line tasks with words, whose answers a program writes. A small chat
model does not answer them to the letter but learns them quickly. No input is both shown and
measured."""

import random

STOP = ("\n",)
MAX_NEW_TOKENS = 48
COLORS = "red blue green black white yellow brown pink orange purple gray".split()
ANIMALS = "dog cat horse cow pig duck hen goat lion bear wolf fox mouse".split()
ANIMALS += "rabbit frog snake eagle shark".split()
FOODS = "bread rice soup cheese apple pear lemon carrot onion cake".split()
FOODS += "honey butter salad pasta bean corn".split()
TOOLS = (
    "hammer saw drill rope ladder shovel brush knife needle wrench chisel axe rake pliers".split()
)
PLACES = "river forest city garden beach island village bridge tower".split()
PLACES += "castle market school station park".split()
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ivy".split()
NAMES += "Jack Kate Leo Mary Noah Olive Paul Rose Sam".split()
WORDS = [*COLORS, *ANIMALS, *FOODS, *TOOLS, *PLACES]


def reverse(rng):
    words = rng.sample(WORDS, rng.randint(3, 4))
    return "Write the words in reverse order.", " ".join(words), " ".join(words[::-1])


def alphabet(rng):
    words = rng.sample(WORDS, 3)
    return "Sort the words from A to Z.", ", ".join(words), ", ".join(sorted(words))


def longest(rng):
    words = sorted(rng.sample(WORDS, 3), key=len)
    while len(words[-1]) < len(words[-2]) + 2:
        words = sorted(rng.sample(WORDS, 3), key=len)
    return "Which word is the longest?", ", ".join(rng.sample(words, 3)), words[-1]


def fields(rng):
    count, color, animal = rng.randint(2, 99), rng.choice(COLORS), rng.choice(ANIMALS[:13])
    plural = animal.replace("mouse", "mice").replace("wolf", "wolves").replace("fox", "foxes")
    text = f"{count} {color} {plural if plural != animal else animal + 's'}"
    return "Write it as fields.", text, f"count: {count}; color: {color}; animal: {animal}"


def how_many(rng):
    words = rng.sample(WORDS, rng.randint(2, 6))
    return "How many things are listed? Answer with a number.", ", ".join(words), str(len(words))


def story(rng):
    one, two = rng.sample(["apple", "pear", "lemon", "carrot", "onion", "bean"], 2)
    a, b = rng.sample(range(2, 60), 2)
    name = rng.choice(NAMES)
    food, answer = rng.choice([(one, a), (two, b)])
    return (
        f"How many {food}s are there? Answer with a number.",
        f"{name} has {a} {one}s and {b} {two}s.",
        str(answer),
    )


def capitals(rng):
    words = rng.sample(WORDS, 3)
    return "Begin every word with a capital letter.", " ".join(words), " ".join(words).title()


def brackets(rng):
    words = rng.sample(WORDS, rng.randint(2, 3))
    return "Put every word in square brackets.", " ".join(words), " ".join(f"[{w}]" for w in words)


def second(rng):
    words = rng.sample(WORDS, rng.randint(3, 5))
    return "Which is the second word?", " ".join(words), words[1]


def swap(rng):
    a, b = rng.sample(WORDS, 2)
    return "Swap the two things.", f"the {a} and the {b}", f"the {b} and the {a}"


def no_color(rng):
    name, color, thing, place = (rng.choice(x) for x in (NAMES, COLORS, ANIMALS + TOOLS, PLACES))
    rest = f"{thing} near the {place}."
    return "Leave out the color.", f"{name} saw the {color} {rest}", f"{name} saw the {rest}"


def kinds(rng):
    known = [
        (w, kind)
        for kind, words in (("animal", ANIMALS), ("food", FOODS), ("tool", TOOLS))
        for w in words
    ]
    chosen = rng.sample(known, 3)
    return (
        "Is each an animal, a food or a tool?",
        ", ".join(w for w, _ in chosen),
        ", ".join(k for _, k in chosen),
    )


KINDS = [
    reverse,
    alphabet,
    longest,
    fields,
    how_many,
    story,
    capitals,
    brackets,
    second,
    swap,
    no_color,
    kinds,
]


def rows(shots):
    """300 Alpaca records to measure, or 3,000 others, the kinds in turn. No input occurs twice."""
    rng, seen, out = random.Random(0), set(), []
    for i in range(3300):
        kind = KINDS[i % len(KINDS)]
        while (row := kind(rng))[1] in seen:
            pass
        instruction, text, answer = row
        seen.add(text)
        out.append(dict(instruction=instruction, input=text, output=answer, kind=kind.__name__))
    rng.shuffle(out)
    return out[:3000] if shots else out[3000:]


def record(row):
    return {key: row[key] for key in ("instruction", "input", "output", "kind")}


def prompt(record):
    return f"{record['instruction']}\nInput: {record['input']}\nAnswer:"


def messages(record):
    return [dict(role="user", content=record["instruction"], input=record["input"])]


def answer(record):
    return record["output"]


def score(prompt, response, finished, record):
    return float(response.strip() == record["output"])


def groups(record):
    return [record["kind"]]
