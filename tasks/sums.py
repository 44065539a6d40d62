"""Sums: a number up to 20 and a digit, behind three examples. The score of a wrong number falls
with its distance from the right one, which a policy can learn from."""

import random
import re

STOP = ("\n",)
MAX_NEW_TOKENS = 8
EXAMPLES = (("34 + 5", "39"), ("12 + 6", "18"), ("8 + 7", "15"))


def rows(shots):
    """48 sums, or 120 others."""
    pairs = [(a, b) for a in range(2, 21) for b in range(1, 10)]
    pairs = [(a, b) for a, b in pairs if f"{a} + {b}" not in dict(EXAMPLES)]
    drawn = random.Random(0).sample(pairs, 168)
    out = [dict(question=f"{a} + {b}", answer=str(a + b)) for a, b in drawn]
    return out[:120] if shots else out[120:]


def record(row):
    return dict(question=row["question"], answer=row["answer"])


def prompt(record):
    examples = "".join(f"Question: What is {q}?\nAnswer: {a}\n\n" for q, a in EXAMPLES)
    return f"{examples}Question: What is {record['question']}?\nAnswer:"


def messages(record):
    turns = []
    for question, answer in EXAMPLES:
        turns.append(dict(role="user", content=f"What is {question}?"))
        turns.append(dict(role="assistant", content=answer, weight=0))
    return [*turns, dict(role="user", content=f"What is {record['question']}?")]


def answer(record):
    return record["answer"]


def score(prompt, response, finished, record):
    """1.0 for a finished response whose last number is the right one, otherwise at most 0.5.

    A near miss gets 0.5 less 0.05 for each one that its number is off.
    """
    numbers = re.findall(r"-?\d+", response.replace(",", ""))
    if not finished or not numbers:
        return 0.0
    off = abs(int(numbers[-1]) - int(record["answer"]))
    return max(0.0, 0.5 - 0.05 * off) if off else 1.0


def strict(prompt, response, finished, record):
    return float(score(prompt, response, finished, record) == 1)
