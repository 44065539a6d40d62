"""Data of our own making for demonstrations and tests: small tasks whose answers can be checked.

    python -m prepare.toy task=instructions rows=3000 out=data/toy
    python -m prepare.toy task=reviews out=data/reviews
    python -m prepare.toy task=preferences model=out/reviews/sft/last out=data/reviews
    python -m prepare.toy task=bullets out=data/bullets
    python -m prepare.toy task=sums out=data/sums

`instructions` writes train.jsonl and test.jsonl: Alpaca records (instruction, input, output) of a
dozen one-line tasks. A small chat model does not answer these to the letter but learns them
quickly. No input is in both files. `exact_match` scores the answers.

`reviews` is a language of 36 words, `the NOUN is ADJ (and ADJ){0,2} .`. The function `gold` gives
the worth of every answer. It writes pretrain.jsonl (texts), sft.jsonl (prompt, completion),
prompts.jsonl, and tokenizer/, one token a word. With these the whole path from pretraining to PPO
takes minutes (reward=prepare/toy.py:gold). `preferences` adds preferences.jsonl: four answers of a
model to each of 1,000 prompts, ranked by gold plus noise of variance 1, as people would disagree.

`bullets` asks a real chat model for three bullet points in train.jsonl and, on other subjects, in
test.jsonl. `three_bullets` is the reward (reward=prepare/toy.py:three_bullets).

`sums` asks for sums of a number up to 20 and a digit in train.jsonl and, of others, in test.jsonl.
The records are prompts alone, conversations that end with the user, beside the right number as
`answer`. `right_number` is the reward (reward=prepare/toy.py:right_number).
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config, files, vocab, weights
from nano.config import NonNegativeInt, PathText, Seed, UserError
from prepare.vocab import byte_level_json


@dataclass
class Config:
    task: Literal["instructions", "reviews", "preferences", "bullets", "sums"] = "instructions"
    out: PathText = "data/toy"  # folder
    model: PathText = ""  # preferences: the model whose answers are ranked
    # 0: 3,000 instructions, 10,000 reviews, 1,000 rankings, 300 bullets, 120 sums
    rows: NonNegativeInt = 0
    test: NonNegativeInt = 0  # held out, or prompts of reviews; 0: 300, of sums 48
    seed: Seed = 0


def write_jsonl(path, records):
    files.write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


# --------------------------------------------------------------------------------------------------
# instructions

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


TASKS = [
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


def instructions(rows, seed=0):
    """A list of `rows` Alpaca records, the tasks in turn. No input occurs twice."""
    rng, seen, records = random.Random(seed), set(), []
    for i in range(rows):
        task = TASKS[i % len(TASKS)]
        for _ in range(1000):
            instruction, text, answer = task(rng)
            if text not in seen:
                break
        else:
            raise UserError(
                f"rows={rows} is more than the tasks have different inputs for: take fewer"
            )
        seen.add(text)
        records.append(
            {"instruction": instruction, "input": text, "output": answer, "task": task.__name__}
        )
    rng.shuffle(records)
    return records


def exact_match(outputs, records):
    """The share of `outputs` (texts) that equal their record's output, spaces at the ends aside."""
    pairs = zip(outputs, records, strict=True)
    return sum(output.strip() == record["output"] for output, record in pairs) / len(records)


# --------------------------------------------------------------------------------------------------
# reviews

VERBS = "review describe rate judge".split()
NOUNS = "lamp chair phone car coat clock boat piano".split()
GOOD = "bright lovely solid clever quick neat".split()
BAD = "ugly broken noisy slow dull weak".split()
NEUTRAL = "large small old round".split()
SENTENCE = re.compile(rf"the ({'|'.join(NOUNS)}) is (\w+)(?: and (\w+))?(?: and (\w+))? \.")


def sentence(rng, noun, weights):
    """One to three adjectives, each good, bad or neutral by `weights`."""
    kinds = rng.choices([GOOD, BAD, NEUTRAL], weights, k=rng.randint(1, 3))
    return f" the {noun} is {' and '.join(map(rng.choice, kinds))} ."


def gold(prompt, response, finished=True):
    """What an answer is worth, a float from -3 to 4.

    -2 unless the answer is finished and one sentence of the language. Otherwise 1 for the prompt's
    noun, plus 1 for each different good adjective, minus 1 for each different bad one.
    """
    match = SENTENCE.fullmatch(response.strip())
    adjectives = {a for a in match.groups()[1:] if a} if match else set()
    if not finished or not match or not adjectives <= {*GOOD, *BAD, *NEUTRAL}:
        return -2.0
    return float(
        (match[1] in prompt.split()) + len(adjectives & {*GOOD}) - len(adjectives & {*BAD})
    )


def write_tokenizer(dir):
    """Writes a Hugging Face tokenizer of the reviews' 36 words.

    It is a byte-level BPE without merges. Each word, with the space before it, is an added token.
    """
    words = [
        "<u>",
        *(f" {w}" for w in ["<a>", "the", "is", "and", ".", *VERBS, *NOUNS, *GOOD, *BAD, *NEUTRAL]),
    ]
    tokens = enumerate(["<pad>", "<eos>", *words])
    added = [vocab.added_token(i, token, special=i < 2) for i, token in tokens]
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=64,
    )
    spec = byte_level_json({"<pad>": 0, "<eos>": 1}, [], added)
    files.write_json(dir / "tokenizer.json", spec)
    files.write_json(dir / "tokenizer_config.json", settings)


def reviews(rows, prompts, seed=0):
    """{file name: records}: texts to pretrain on, prompts with answers, and prompts alone.

    The answers name the right noun in 80% of the cases. Their adjectives are 40% good, 40% bad and
    20% neutral.
    """
    rng = random.Random(seed)

    def ask():
        noun = rng.choice(NOUNS)
        return noun, f"<u> {rng.choice(VERBS)} {noun} <a>"

    sft = []
    for _ in range(rows):
        noun, prompt = ask()
        named = noun if rng.random() < 0.8 else rng.choice([n for n in NOUNS if n != noun])
        sft.append({"prompt": prompt, "completion": sentence(rng, named, (40, 40, 20))})
    return {
        "pretrain.jsonl": [
            {"text": sentence(rng, rng.choice(NOUNS), (6, 6, 4))} for _ in range(2 * rows)
        ],
        "sft.jsonl": sft,
        "prompts.jsonl": [{"prompt": ask()[1]} for _ in range(prompts)],
    }


def preferences(model, rows, answers=4, seed=0):
    """Sampled answers of a model to `rows` prompts, ranked by gold + N(0, 1), best first."""
    from nano import generate

    rng = random.Random(seed + 1)
    opened = weights.open(model)
    tok = opened.tok
    prompts = [f"<u> {rng.choice(VERBS)} {rng.choice(NOUNS)} <a>" for _ in range(rows)]
    samples = generate.generate(
        opened.model,
        [tok.encode(prompt) for prompt in prompts],
        16,
        stop_ids=tok.stop_ids,
        seed=seed,
        group=answers,
        batch_size=256,
    )
    worth = []
    for i, (ids, finished) in enumerate(zip(samples.tokens, samples.finished, strict=True)):
        text = tok.decode(ids)
        worth.append((gold(prompts[i // answers], text, finished) + rng.gauss(0, 1), text))
    groups = [sorted(worth[i : i + answers], reverse=True) for i in range(0, len(worth), answers)]
    return [
        {"prompt": prompt, "completions": [text for _, text in group]}
        for prompt, group in zip(prompts, groups, strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# bullets

QUESTIONS = [
    "Tell me about the {}.",
    "What is the {} known for?",
    "Why do people like the {}?",
    "What is difficult about the {}?",
    "Describe the {} to a child.",
    "Name some facts about the {}.",
    "What would a poet say about the {}?",
    "How did the {} change?",
    "What is good and what is bad about the {}?",
    "What should everybody know about the {}?",
]


def three_bullets(prompt, response, finished=True):
    """1.0 for a finished answer of three bullet points and nothing else, otherwise at most 0.45.

    A near miss gets the share of its lines that are bullet points, times how close their number is
    to three, times 0.45.
    """
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    points = sum(line.startswith(("- ", "* ", "\u2022 ")) for line in lines)
    if finished and points == len(lines) == 3:
        return 1.0
    return 0.45 * max(0.0, 1 - abs(points - 3) / 3) * points / max(len(lines), 1)


def bullets(rows, test, seed=0):
    """(records to train on, records to test): lists of `rows` and `test` message records.

    No subject is in both. UserError for more records than there are prompts.
    """
    rng = random.Random(seed)
    subjects = [*ANIMALS, *FOODS, *TOOLS, *PLACES]
    rng.shuffle(subjects)
    border = round(len(subjects) * rows / (rows + test))
    splits = []
    for some, count in ((subjects[:border], rows), (subjects[border:], test)):
        prompts = [question.format(subject) for question in QUESTIONS for subject in some]
        if len(prompts) < count:
            raise UserError(
                f"rows={rows} and test={test} are more than there are prompts: take fewer"
            )
        ending = " Answer in exactly three bullet points."
        splits.append([{"prompt": prompt + ending} for prompt in rng.sample(prompts, count)])
    return splits


# --------------------------------------------------------------------------------------------------
# sums


def right_number(prompt, response, finished, record):
    """1.0 for a finished response whose last number is the record's answer, otherwise at most 0.5.

    A near miss gets 0.5 less 0.05 for each one that its number is off.
    """
    numbers = re.findall(r"-?\d+", response.replace(",", ""))
    if not finished or not numbers:
        return 0.0
    off = abs(int(numbers[-1]) - int(record["answer"]))
    return max(0.0, 0.5 - 0.05 * off) if off else 1.0


SHOTS = (("34 + 5", "39"), ("12 + 6", "18"), ("8 + 7", "15"))


def sums(rows, test, seed=0):
    """(records to train on, records to test): `rows` and `test` of them, and no sum in both.

    UserError for more records than there are sums.
    """
    start = []
    for question, answer in SHOTS:
        start.append(dict(role="user", content=f"What is {question}?"))
        start.append(dict(role="assistant", content=answer))
    pairs = [(a, b) for a in range(2, 21) for b in range(1, 10)]
    pairs = [(a, b) for a, b in pairs if f"{a} + {b}" not in dict(SHOTS)]
    if rows + test > len(pairs):
        raise UserError(
            f"rows={rows} and test={test} are more than the {len(pairs)} sums: take fewer"
        )
    records = []
    for a, b in random.Random(seed).sample(pairs, rows + test):
        question = dict(role="user", content=f"What is {a} + {b}?")
        records.append(dict(prompt=[*start, question], answer=str(a + b)))
    return records[:rows], records[rows:]


def main(cfg):
    defaults = dict(instructions=3000, reviews=10_000, preferences=1000, bullets=300, sums=120)
    out = Path(cfg.out)
    rows = cfg.rows or defaults[cfg.task]
    test = cfg.test or (48 if cfg.task == "sums" else 300)
    if cfg.task == "instructions":
        records = instructions(rows + test, cfg.seed)
        files = {"train.jsonl": records[:rows], "test.jsonl": records[rows:]}
    elif cfg.task == "preferences":
        if not cfg.model:
            raise UserError(
                "task=preferences needs model=, the directory of the model whose answers are ranked"
            )
        files = {"preferences.jsonl": preferences(cfg.model, rows, seed=cfg.seed)}
    elif cfg.task in ("bullets", "sums"):
        write = bullets if cfg.task == "bullets" else sums
        train, test = write(rows, test, cfg.seed)
        files = {"train.jsonl": train, "test.jsonl": test}
    else:
        files = reviews(rows, test, cfg.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if cfg.task == "reviews":
            (out / "tokenizer").mkdir(exist_ok=True)
            write_tokenizer(out / "tokenizer")
    except FileExistsError as e:
        raise UserError(f"{e.filename} is a file: give a folder as out=") from None
    for name, records in files.items():
        write_jsonl(out / name, records)
        print(
            f"{out / name}: {len(records):,} records, "
            f"such as {json.dumps(records[0], ensure_ascii=False)}"
        )


if __name__ == "__main__":
    config.run(main, Config)
