"""Bullets: questions to answer in exactly three bullet points. The score rises on the way there,
which a policy can learn from. The subjects that are measured are never trained on."""

import random

from tasks.toy import ANIMALS, FOODS, PLACES, TOOLS

STOP = ("\nQuestion:",)
MAX_NEW_TOKENS = 96
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


def rows(shots):
    """300 prompts, or 300 about other subjects."""
    rng = random.Random(0)
    subjects = [*ANIMALS, *FOODS, *TOOLS, *PLACES]
    rng.shuffle(subjects)
    half = len(subjects) // 2
    parts = []
    for some in (subjects[:half], subjects[half:]):
        asked = [question.format(subject) for question in QUESTIONS for subject in some]
        ending = " Answer in exactly three bullet points."
        parts.append([dict(question=text + ending) for text in rng.sample(asked, 300)])
    return parts[0] if shots else parts[1]


def record(row):
    return dict(question=row["question"])


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def messages(record):
    return [dict(role="user", content=record["question"])]


def score(prompt, response, finished, record):
    """1.0 for a finished answer of three bullet points and nothing else, otherwise at most 0.45.

    A near miss gets the share of its lines that are bullet points, times how close their number is
    to three, times 0.45.
    """
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    points = sum(line.startswith(("- ", "* ", "\u2022 ")) for line in lines)
    if finished and points == len(lines) == 3:
        return 1.0
    return 0.45 * max(0.0, 1 - abs(points - 3) / 3) * points / max(len(lines), 1)


def strict(prompt, response, finished, record):
    return float(score(prompt, response, finished, record) == 1)
