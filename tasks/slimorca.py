"""SlimOrca: about 518,000 answers of GPT-4 to the questions of Flan (Lian et al. 2023). The last
answer of a conversation is the target."""

from prepare import fields

TRAIN = ("Open-Orca/SlimOrca", [None], "train")
LAST_ONLY = True


def turns(row):
    messages = fields.turns(row.get("conversations"))
    if [m["role"] for m in messages].count("assistant") == 1:
        # the template "columns" lays out conversations with more answers like this by itself
        for m, speaker in zip(messages, row["conversations"], strict=True):
            m["columns"] = [["FROM", speaker["from"]], ["VALUE", m["content"]]]
        messages[-1]["columns"] = [["GPT", messages[-1]["content"]]]
    return messages
