"""LAMBADA: the last word of a passage, which needs all of the passage (Paperno et al. 2016,
arXiv:1606.06031), in OpenAI's version. `acc` counts words that greedy decoding would give."""

HUB = ("EleutherAI/lambada_openai", "default", "test", "test")


def record(row):
    if "continuation" in row:  # llm-foundry's files
        return dict(start=row["context"], word=row["continuation"])
    start, _, word = row["text"].rpartition(" ")
    return dict(start=start, word=word)


def prompt(record):
    return record["start"]


def choices(record):
    return [record["word"]]


def gold(record):
    return {0}
