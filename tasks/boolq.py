"""BoolQ: yes or no to a question about a passage (Clark et al. 2019, arXiv:1905.10044)."""

HUB = ("aps/super_glue", "boolq", "validation", "train")


def record(row):
    if "query" in row:  # llm-foundry's files
        text = row["query"].removesuffix("Answer:").strip()
        passage, _, question = text.removeprefix("Passage: ").rpartition("\nQuestion: ")
        right = row["choices"][int(row["gold"])]
        return dict(passage=passage, question=question.removesuffix("?"), gold=int(right == "yes"))
    answer = row["label"] if "label" in row else row["answer"]
    return dict(passage=row["passage"], question=row["question"], gold=int(answer))


def prompt(record):
    return f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"


def choices(record):
    return ["no", "yes"]


def gold(record):
    return {record["gold"]}
