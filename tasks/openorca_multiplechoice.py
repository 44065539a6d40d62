"""OpenOrca, multiple choice: 10,000 of its questions with options (Mukherjee et al. 2023,
arXiv:2306.02707)."""

from prepare.fields import message, task, text

TRAIN = ("beaugogh/openorca-multiplechoice-10k", [None], "train")


def turns(row):
    prompt = text(row, "system_prompt")
    messages = task([["QUESTION", text(row, "question")]], "RESPONSE", text(row, "response"))
    if prompt:
        messages.insert(0, message("system", prompt, columns=[["INSTRUCTION", prompt]]))
    return messages
