"""WinoGrande: which of two names fills the blank of a sentence (Sakaguchi et al. 2019,
arXiv:1907.10641). The text behind the blank is scored after each of the two beginnings."""

PARTS = {
    size: ("allenai/winogrande", f"winogrande_{size}", "validation", "train")
    for size in ("xs", "s", "m", "l", "xl", "debiased")
}
HUB = PARTS["xl"]


def record(row):
    if "context_options" in row:  # llm-foundry's files
        starts, end, gold = row["context_options"], row["continuation"], int(row["gold"])
        before = shared(*starts)
        sentence, names = f"{before}_ {end}", [start[len(before) :] for start in starts]
    else:
        sentence, names = row["sentence"], [row["option1"], row["option2"]]
        before, _, end = sentence.partition("_")
        starts, gold = [before + name for name in names], int(row["answer"]) - 1
    return dict(sentence=sentence, names=names, starts=starts, end=end.strip(), gold=gold)


def shared(a, b):
    """The words with which both texts begin."""
    pairs = enumerate(zip(a, b, strict=False))
    n = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    return a[: a.rfind(" ", 0, n + 1) + 1]


def prompt(record):
    first, second = record["names"]
    return f"{record['sentence']}\nWhat is the blank, {first} or {second}?\nAnswer:"


def choices(record):
    return record["names"]


def gold(record):
    return {record["gold"]}


def options(record):
    return [(start, f" {record['end']}") for start in record["starts"]]


def columns(record):
    first, second = names = record["names"]
    return [["SENTENCE", record["sentence"]], ["OPTION1", first], ["OPTION2", second]], names
