"""A made-up language for demonstrations. A program knows what every answer is worth.

    python -m prepare.toy task=reviews out=data/reviews
    python -m prepare.toy task=preferences model=out/reviews/sft/last out=data/reviews

It has 36 words: `the NOUN is ADJ (and ADJ){0,2} .`. The function `gold` gives the worth of every
answer. task=reviews writes pretrain.jsonl (texts), sft.jsonl (prompt, completion), prompts.jsonl,
and tokenizer/, one token a word. With these the whole path from pretraining to PPO takes minutes
(reward=prepare/toy.py:gold). task=preferences adds preferences.jsonl: four answers of a model to
each of 1,000 prompts, ranked by gold plus noise of variance 1, as people would disagree.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config, files, vocab, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError
from prepare.vocab import byte_level_json


@dataclass
class Config:
    task: Literal["reviews", "preferences"] = "reviews"
    out: PathText = "data/reviews"  # folder
    model: PathText = ""  # preferences: the model whose answers are ranked
    rows: NonNegativeInt = 0  # 0: 10,000 reviews, or 1,000 rankings
    test: PositiveInt = 300  # reviews: prompts alone
    seed: Seed = 0


def write_jsonl(path, records):
    files.write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


VERBS = "review describe rate judge".split()
NOUNS = "lamp chair phone car coat clock boat piano".split()
GOOD = "bright lovely solid clever quick neat".split()
BAD = "ugly broken noisy slow dull weak".split()
NEUTRAL = "large small old round".split()
SENTENCE = re.compile(rf"the ({'|'.join(NOUNS)}) is (\w+)(?: and (\w+))?(?: and (\w+))? \.")


def sentence(rng, noun, weights):
    """One to three adjectives, each good, bad or neutral by `weights`."""
    kinds = rng.choices([GOOD, BAD, NEUTRAL], weights, k=rng.randint(1, 3))
    return f" the {noun} is {' and '.join(map(rng.choice, kinds))} ."


def gold(prompt, response, finished=True):
    """What an answer is worth, a float from -3 to 4.

    -2 unless the answer is finished and one sentence of the language. Otherwise 1 for the prompt's
    noun, plus 1 for each different good adjective, minus 1 for each different bad one.
    """
    match = SENTENCE.fullmatch(response.strip())
    adjectives = {a for a in match.groups()[1:] if a} if match else set()
    if not finished or not match or not adjectives <= {*GOOD, *BAD, *NEUTRAL}:
        return -2.0
    return float(
        (match[1] in prompt.split()) + len(adjectives & {*GOOD}) - len(adjectives & {*BAD})
    )


def write_tokenizer(dir):
    """Writes a Hugging Face tokenizer of the reviews' 36 words.

    It is a byte-level BPE without merges. Each word, with the space before it, is an added token.
    """
    words = [
        "<u>",
        *(f" {w}" for w in ["<a>", "the", "is", "and", ".", *VERBS, *NOUNS, *GOOD, *BAD, *NEUTRAL]),
    ]
    tokens = enumerate(["<pad>", "<eos>", *words])
    added = [vocab.added_token(i, token, special=i < 2) for i, token in tokens]
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=64,
    )
    spec = byte_level_json({"<pad>": 0, "<eos>": 1}, [], added)
    files.write_json(dir / "tokenizer.json", spec)
    files.write_json(dir / "tokenizer_config.json", settings)


def reviews(rows, prompts, seed=0):
    """{file name: records}: texts to pretrain on, prompts with answers, and prompts alone.

    The answers name the right noun in 80% of the cases. Their adjectives are 40% good, 40% bad and
    20% neutral.
    """
    rng = random.Random(seed)

    def ask():
        noun = rng.choice(NOUNS)
        return noun, f"<u> {rng.choice(VERBS)} {noun} <a>"

    sft = []
    for _ in range(rows):
        noun, prompt = ask()
        named = noun if rng.random() < 0.8 else rng.choice([n for n in NOUNS if n != noun])
        sft.append({"prompt": prompt, "completion": sentence(rng, named, (40, 40, 20))})
    return {
        "pretrain.jsonl": [
            {"text": sentence(rng, rng.choice(NOUNS), (6, 6, 4))} for _ in range(2 * rows)
        ],
        "sft.jsonl": sft,
        "prompts.jsonl": [{"prompt": ask()[1]} for _ in range(prompts)],
    }


def preferences(model, rows, answers=4, seed=0):
    """Sampled answers of a model to `rows` prompts, ranked by gold + N(0, 1), best first."""
    from nano import generate

    rng = random.Random(seed + 1)
    opened = weights.open(model)
    tok = opened.tok
    prompts = [f"<u> {rng.choice(VERBS)} {rng.choice(NOUNS)} <a>" for _ in range(rows)]
    samples = generate.generate(
        opened.model,
        [tok.encode(prompt) for prompt in prompts],
        16,
        stop_ids=tok.stop_ids,
        seed=seed,
        group=answers,
        batch_size=256,
    )
    worth = []
    for i, (ids, finished) in enumerate(zip(samples.tokens, samples.finished, strict=True)):
        text = tok.decode(ids)
        worth.append((gold(prompts[i // answers], text, finished) + rng.gauss(0, 1), text))
    groups = [sorted(worth[i : i + answers], reverse=True) for i in range(0, len(worth), answers)]
    return [
        {"prompt": prompt, "completions": [text for _, text in group]}
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def main(cfg):
    out = Path(cfg.out)
    if cfg.task == "preferences":
        if not cfg.model:
            raise UserError(
                "task=preferences needs model=, the directory of the model whose answers are ranked"
            )
        files = {"preferences.jsonl": preferences(cfg.model, cfg.rows or 1000, seed=cfg.seed)}
    else:
        files = reviews(cfg.rows or 10_000, cfg.test, cfg.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if cfg.task == "reviews":
            (out / "tokenizer").mkdir(exist_ok=True)
            write_tokenizer(out / "tokenizer")
    except FileExistsError as e:
        raise UserError(f"{e.filename} is a file: give a folder as out=") from None
    for name, records in files.items():
        write_jsonl(out / name, records)
        print(
            f"{out / name}: {len(records):,} records, "
            f"such as {json.dumps(records[0], ensure_ascii=False)}"
        )


if __name__ == "__main__":
    config.run(main, Config)
