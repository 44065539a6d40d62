"""Arithmetic: sums, differences, products and quotients of whole numbers. A program writes the
questions, 400 to measure and others to show or to train on. strict: the answer is the number alone.
score: the last number of the answer counts."""

import random

from tasks.gsm8k import last_number, plain

STOP = ("\n",)
MAX_NEW_TOKENS = 32
SIGNS = "+-*/"


def rows(shots):
    """400 questions, or 4,000 others. No question is in both."""
    rng = random.Random(0)
    seen, out = set(), []
    for i in range(4400):
        sign = SIGNS[i % 4]
        while (key := question(rng, sign)) in seen:
            pass
        seen.add(key)
        text, answer = key
        out.append(dict(question=text, answer=answer))
    return out[400:] if shots else out[:400]


def question(rng, sign):
    """(text, answer) of numbers with up to three digits, without remainders or signs."""
    digits = rng.choice([10, 100, 1000])
    a, b = rng.randrange(digits), rng.randrange(1, digits)
    if sign in "*/":
        b = rng.randrange(1, 100)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign == "/":
        a *= b
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]
    return f"What is {a} {sign} {b}?", str(value)


def record(row):
    return dict(question=row["question"], answer=str(row["answer"]))


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def messages(record):
    return [dict(role="user", content=record["question"])]


def answer(record):
    return record["answer"]


def score(prompt, response, finished, record):
    return float(last_number(response) == record["answer"])


def strict(prompt, response, finished, record):
    return float(plain(response.strip()) == record["answer"])
