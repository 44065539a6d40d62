"""PIQA: which of two ways reaches an everyday goal (Bisk et al. 2020, arXiv:1911.11641)."""

HUB = ("baber/piqa", None, "validation", "train")


def record(row):
    if "query" in row:  # llm-foundry's files
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return dict(goal=goal, choices=row["choices"], gold=int(row["gold"]))
    return dict(goal=row["goal"], choices=[row["sol1"], row["sol2"]], gold=int(row["label"]))


def prompt(record):
    return f"Question: {record['goal']}\nAnswer:"


def choices(record):
    return record["choices"]


def gold(record):
    return {record["gold"]}
