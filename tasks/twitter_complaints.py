"""Twitter complaints: is a tweet a complaint? Fifty labelled tweets, from RAFT (Alex et al. 2021,
arXiv:2109.14076)."""

HUB = ("ought/raft", "twitter_complaints", "train", "train")
LABELS = ["complaint", "no complaint"]


def record(row):
    if "input" in row:
        label = LABELS.index(row["output"])
        return dict(tweet=row["input"], gold=label)
    return dict(tweet=row["Tweet text"], gold=int(row["Label"]) - 1)


def prompt(record):
    return f"Tweet: {record['tweet']}\nLabel:"


def choices(record):
    return LABELS


def gold(record):
    return {record["gold"]}
