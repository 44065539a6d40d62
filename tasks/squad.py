"""SQuAD: questions about paragraphs of Wikipedia, whose answers are stretches of them (Rajpurkar et
al. 2016, arXiv:1606.05250). score: the answer is one of those that people gave, but for case,
punctuation and articles. strict: to the letter."""

import re
import string

HUB = ("rajpurkar/squad", None, "validation", "train")
STOP = ("\n",)
MAX_NEW_TOKENS = 32


def record(row):
    texts = [*row["answers"]["text"]]
    if not texts:
        raise ValueError("it has no answer")
    return dict(context=row["context"], question=row["question"].strip(), answers=texts)


def prompt(record):
    return f"{record['context']}\n\nQuestion: {record['question']}\nAnswer:"


def messages(record):
    return [dict(role="user", content=f"{record['context']}\n\n{record['question']}")]


def answer(record):
    return record["answers"][0]


def columns(record):
    question = [["CONTEXT", record["context"]], ["QUESTION", record["question"]]]
    return question, [record["answers"][0]]


def normal(text):
    """A text as SQuAD's own script compares it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score(prompt, response, finished, record):
    return float(normal(response) in map(normal, record["answers"]))


def strict(prompt, response, finished, record):
    return float(response.strip() in record["answers"])
