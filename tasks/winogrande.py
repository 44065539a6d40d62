"""WinoGrande: which of two names fills the blank of a sentence (Sakaguchi et al. 2019,
arXiv:1907.10641). The text behind the blank is scored after each of the two beginnings."""

HUB = ("allenai/winogrande", "winogrande_xl", "validation", "train")


def record(row):
    if "context_options" in row:  # llm-foundry's files
        return dict(starts=row["context_options"], end=row["continuation"], gold=int(row["gold"]))
    start, _, end = row["sentence"].partition("_")
    starts = [start + row["option1"], start + row["option2"]]
    return dict(starts=starts, end=end.strip(), gold=int(row["answer"]) - 1)


def shared(record):
    """The text that both beginnings share."""
    a, b = record["starts"]
    n = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )
    return a[: a.rfind(" ", 0, n + 1) + 1]


def prompt(record):
    first, second = choices(record)
    return f"{shared(record)}_ {record['end']}\nWhat is the blank, {first} or {second}?\nAnswer:"


def choices(record):
    return [start[len(shared(record)) :] for start in record["starts"]]


def gold(record):
    return {record["gold"]}


def options(record):
    return [(start, f" {record['end']}") for start in record["starts"]]
