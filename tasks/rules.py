"""Rules: instructions whose fulfilment a program checks, in the manner of IFEval (Zhou et al. 2023,
arXiv:2311.07911). A question about a subject comes with one or two rules for the answer.

strict: the answer keeps all of its rules. score: so it does without its first line, its last line
or the asterisks of Markdown, as models like to put words around what was asked for.
"""

import json
import random
import re

MAX_NEW_TOKENS = 256
STOP = ("\nQuestion:",)
SUBJECTS = """the sea, a lighthouse, bees, bread, the moon, chess, trains, a small garden, winter,
coffee, the violin, maps, bridges, a lost key, birds in a city, paper, volcanoes, clocks, salt,
swimming, a market, the night sky, glass, friendship, a long walk, tea, castles, rain, cats,
bicycles""".replace("\n", " ").split(", ")
QUESTIONS = [
    "Tell me about {}.",
    "Write a short text about {}.",
    "Why do people like {}?",
    "Describe {} to a child.",
    "What is special about {}?",
]
WORDS = "river paper window simple always bright number quiet".split()


def words_of(text):
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def lines_of(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences_of(text):
    return [part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()]


def has(text, word):
    """How often a word stands in a text, in any case."""
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.I))


def is_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# name: (the sentence with its argument, what arguments there are, whether a text keeps it)
FORM = dict(
    bullets=(
        "Answer in exactly {} bullet points that begin with a hyphen, and write nothing else.",
        [2, 3, 4, 5],
        lambda text, n: sum(x.startswith("- ") for x in lines_of(text)) == n == len(lines_of(text)),
    ),
    sentences=(
        "Use exactly {} sentences.",
        [1, 2, 3],
        lambda text, n: len(sentences_of(text)) == n,
    ),
    paragraphs=(
        "Write {} paragraphs with an empty line between them.",
        [2, 3],
        lambda text, n: len([p for p in re.split(r"\n\s*\n", text.strip()) if p.strip()]) == n,
    ),
    title=(
        "Begin with a title in double square brackets, such as [[{}]].",
        ["my title", "one thing"],
        lambda text, _: bool(re.match(r"\[\[[^\[\]\n]+\]\]", text.strip())),
    ),
    json=(
        "Answer with one JSON object that has the key {}, and with nothing around it.",
        ["text", "answer"],
        lambda text, key: is_object(text) and key in json.loads(text),
    ),
    quotes=(
        "Put your whole answer between {} quotation marks.",
        ["double"],
        lambda text, _: len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"',
    ),
)
WORDING = dict(
    lower=(
        "Use lowercase letters only{}.",
        [""],
        lambda text, _: text == text.lower() and bool(words_of(text)),
    ),
    upper=(
        "Use capital letters only{}.",
        [""],
        lambda text, _: text == text.upper() and bool(words_of(text)),
    ),
    commas=(
        "Do not use any commas{}.",
        [""],
        lambda text, _: "," not in text and bool(words_of(text)),
    ),
    keyword=("Use the word {} at least twice.", WORDS, lambda text, word: has(text, word) >= 2),
    without=(
        "Do not use the word {}.",
        ["the", "and", "is", "very"],
        lambda text, word: not has(text, word) and bool(words_of(text)),
    ),
    most=("Use at most {} words.", [10, 20, 40], lambda text, n: 0 < len(words_of(text)) <= n),
    least=("Use at least {} words.", [30, 60, 90], lambda text, n: len(words_of(text)) >= n),
)
RULES = FORM | WORDING
# the text of a JSON object cannot keep these, nor can two kinds of letters
CLASH = {("json", "upper"), ("json", "commas")}


def rows(shots):
    """300 records, or about 1,000 others for training. None is in both."""
    rng = random.Random(1)
    asked = [(q, s, n) for q in QUESTIONS for s in SUBJECTS for n in range(12)]
    rng.shuffle(asked)
    out = []
    for question, subject, _ in asked:
        names = [rng.choice([*FORM]), rng.choice([*WORDING])]
        names = names if rng.random() < 0.5 and tuple(names) not in CLASH else [rng.choice(names)]
        rules = [[name, rng.choice(RULES[name][1])] for name in names]
        row = dict(question=question.format(subject), rules=rules)
        if row not in out:
            out.append(row)
    return out[300:] if shots else out[:300]


def record(row):
    for name, _ in row["rules"]:
        if name not in RULES:
            raise ValueError(f"there is no rule {name!r}")
    return dict(question=row["question"], rules=row["rules"])


def request(record):
    rules = " ".join(RULES[name][0].format(value) for name, value in record["rules"])
    return f"{record['question']} {rules}"


def prompt(record):
    return f"Question: {request(record)}\nAnswer:"


def messages(record):
    return [dict(role="user", content=request(record))]


def keeps(text, record):
    return bool(text.strip()) and all(RULES[name][2](text, v) for name, v in record["rules"])


def strict(prompt, response, finished, record):
    return float(keeps(response.strip(), record))


def score(prompt, response, finished, record):
    lines = response.strip().split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(part).strip() for part in parts]
    texts += [text.replace("*", "") for text in texts]
    return float(any(keeps(text, record) for text in texts))
