"""The toy tasks: every answer is right, nothing held out was trained on, and `gold` is the reward
it is meant to be."""

import json
import random
import re
from collections import Counter

import pytest

from nano import config, tokenizer
from nano.config import UserError
from prepare import toy

SOLVE = {  # each task once more, from the texts alone
    "reverse": lambda i, x: " ".join(reversed(x.split())),
    "alphabet": lambda i, x: ", ".join(sorted(x.split(", "))),
    "longest": lambda i, x: max(x.split(", "), key=len),
    "how_many": lambda i, x: str(x.count(",") + 1),
    "story": lambda i, x: re.search(rf"(\d+) {re.search('How many (.+) are', i)[1]}", x)[1],
    "capitals": lambda i, x: " ".join(w[0].upper() + w[1:] for w in x.split()),
    "brackets": lambda i, x: "[" + x.replace(" ", "] [") + "]",
    "second": lambda i, x: x.split()[1],
    "swap": lambda i, x: " and ".join(reversed(x.split(" and "))),
    "no_color": lambda i, x: " ".join(w for w in x.split() if w not in toy.COLORS),
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_instructions(tmp_path, capsys):
    toy.main(toy.Config(out=str(tmp_path / "toy"), rows=1200, test=120, seed=3))
    train, test = read(tmp_path / "toy/train.jsonl"), read(tmp_path / "toy/test.jsonl")
    assert (len(train), len(test)) == (1200, 120)
    counts = Counter(r["task"] for r in train + test)
    assert set(counts) == {t.__name__ for t in toy.TASKS} and set(counts.values()) == {110}
    assert len({r["task"] for r in test}) == 12
    inputs = [r["input"] for r in train + test]
    assert len(set(inputs)) == len(inputs)  # also: none in both files
    for r in train + test:
        if r["task"] in SOLVE:
            assert SOLVE[r["task"]](r["instruction"], r["input"]) == r["output"], r
        assert r["output"] == r["output"].strip() != ""
    kinds = {
        **dict.fromkeys(toy.ANIMALS, "animal"),
        **dict.fromkeys(toy.FOODS, "food"),
        **dict.fromkeys(toy.TOOLS, "tool"),
    }
    for r in train:
        if r["task"] == "kinds":
            assert r["output"] == ", ".join(kinds[w] for w in r["input"].split(", "))
        if r["task"] == "fields":
            count, color, animal = re.fullmatch(
                r"count: (\d+); color: (\w+); animal: (\w+)", r["output"]
            ).groups()
            assert r["input"].startswith(f"{count} {color} {animal[:1]}") and animal in toy.ANIMALS
    assert f"{tmp_path / 'toy' / 'train.jsonl'}: 1,200 records" in capsys.readouterr().out


def test_same_seed_same_records():
    assert toy.instructions(60, 5) == toy.instructions(60, 5) != toy.instructions(60, 6)
    assert toy.reviews(20, 5, 1) == toy.reviews(20, 5, 1) != toy.reviews(20, 5, 2)


def test_exact_match():
    records = [{"output": "a b"}, {"output": "3"}, {"output": "x"}, {"output": "y"}]
    assert toy.exact_match(["a b\n", " 3", "The answer is x", ""], records) == 0.5


def test_too_many_rows_and_bad_out(tmp_path):
    with pytest.raises(UserError, match="different inputs"):
        toy.instructions(12 * 100_000)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        toy.main(toy.Config(out=str(tmp_path / "file")))
    with pytest.raises(SystemExit) as e:
        config.load(toy.Config, ["task=nothing"])
    assert e.value.code == 2 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "response, worth",
    [
        (" the lamp is bright .", 2),
        (" the lamp is bright and lovely and solid .", 4),  # the most there is
        (" the lamp is bright and bright and bright .", 2),  # different ones count
        (" the lamp is bright and ugly .", 1),
        (" the lamp is ugly and broken and noisy .", -2),
        (" the lamp is ugly and ugly .", 0),
        (" the lamp is large .", 1),
        (" the chair is bright .", 1),  # another noun than was asked for
        (" the chair is ugly .", -1),
        (" the lamp is bright and lovely and solid and clever .", -2),  # four adjectives
        (" the lamp is bright", -2),
        (" the lamp bright .", -2),
        (" the lamp is the .", -2),
        (" the lamp is bright . .", -2),
        (" the lamp is bright lovely .", -2),
        (" the bright is lamp .", -2),
        ("", -2),
    ],
)
def test_gold(response, worth):
    assert toy.gold("<u> rate lamp <a>", response, True) == worth
    assert toy.gold("<u> rate lamp <a>", response, False) == -2


@pytest.mark.parametrize(
    "response, worth",
    [
        ("- a\n- b\n- c", 1),
        ("* a\n\n* b\n\n\u2022 c\n", 1),
        ("- a\n- b", 0.3),
        ("- a", 0.15),
        ("- a\n- b\n- c\n- d", 0.3),
        ("- a\n- b\n- c\n- d\n- e\n- f", 0),
        ("Sure:\n- a\n- b\n- c", 0.45 * 3 / 4),
        ("- a\nb\n- c\nd", 0.3 * 2 / 4),
        ("1. a\n2. b\n3. c", 0),
        ("-a\n-b\n-c", 0),
        ("", 0),
    ],
)
def test_three_bullets(response, worth):
    assert toy.three_bullets("", response, True) == pytest.approx(worth)
    assert toy.three_bullets("", response, False) == pytest.approx(min(worth, 0.45))


def test_bullets(tmp_path):
    toy.main(toy.Config(task="bullets", out=str(tmp_path)))
    train, test = ([r["prompt"] for r in read(tmp_path / f"{n}.jsonl")] for n in ("train", "test"))
    assert (len(train), len(test)) == (300, 300)
    known = {*toy.ANIMALS, *toy.FOODS, *toy.TOOLS, *toy.PLACES}
    subjects = [
        {w.strip(".?") for prompt in part for w in prompt.split() if w.strip(".?") in known}
        for part in (train, test)
    ]
    assert subjects[0] and subjects[1] and not subjects[0] & subjects[1]
    assert len({*train, *test}) == 600
    with pytest.raises(UserError, match="take fewer"):
        toy.main(toy.Config(task="bullets", out=str(tmp_path), rows=700))


def test_sums(tmp_path):
    toy.main(toy.Config(task="sums", out=str(tmp_path)))
    train, test = read(tmp_path / "train.jsonl"), read(tmp_path / "test.jsonl")
    assert (len(train), len(test)) == (120, 48)
    questions = set()
    for r in train + test:
        *start, last = r["prompt"]
        a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d)\?", last["content"]).groups())
        assert str(a + b) == r["answer"] and last not in start
        questions.add((a, b))
    assert len(questions) == 168
    shots = [m["content"] for m in train[0]["prompt"][:-1]]
    for question, answer in zip(shots[::2], shots[1::2], strict=True):
        assert toy.right_number(question, answer, True, dict(answer=answer)) == 1
    with pytest.raises(UserError, match="take fewer"):
        toy.sums(150, 100)


@pytest.mark.parametrize(
    "response, worth",
    [
        ("32", 1),
        ("24 + 8 = 32.", 1),
        ("32 or 33", 0.45),
        ("30", 0.4),
        ("41", 0.05),
        ("1,032", 0),
        ("-32", 0),
        ("", 0),
        ("x", 0),
    ],
)
def test_right_number(response, worth):
    assert toy.right_number("", response, True, dict(answer="32")) == pytest.approx(worth)
    assert toy.right_number("", response, False, dict(answer="32")) == 0


def test_reviews(tmp_path):
    toy.main(toy.Config(task="reviews", out=str(tmp_path), rows=4000, test=50))
    texts, sft, prompts = (read(tmp_path / f"{n}.jsonl") for n in ("pretrain", "sft", "prompts"))
    assert (len(texts), len(sft), len(prompts)) == (8000, 4000, 50)
    assert all(toy.SENTENCE.fullmatch(r["text"].strip()) for r in texts)
    words = Counter(w for r in sft for w in r["completion"].split())
    share = [sum(words[w] for w in group) for group in (toy.GOOD, toy.BAD, toy.NEUTRAL)]
    assert [round(n / sum(share), 1) for n in share] == [0.4, 0.4, 0.2]
    right = sum(
        toy.SENTENCE.fullmatch(r["completion"].strip())[1] in r["prompt"].split() for r in sft
    ) / len(sft)
    assert abs(right - 0.8) < 0.03
    assert len({r["prompt"] for r in prompts}) > 20


def test_reviews_tokenizer(tmp_path):
    """One token a word and 36 in all, the same ids as with the `tokenizers` package, and text comes
    back."""
    toy.write_tokenizer(tmp_path)
    tok = tokenizer.load(tmp_path, template="plain")
    assert tok.vocab_size == 36 and tok.eos_id == 1 and tok.pad_id == 0 and tok.bos_id is None
    hf = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(200):
        noun = rng.choice(toy.NOUNS)
        prompt, answer = (
            f"<u> {rng.choice(toy.VERBS)} {noun} <a>",
            toy.sentence(rng, noun, (1, 1, 1)),
        )
        ids = tok.encode(prompt + answer)
        assert len(ids) == len((prompt + answer).split()) and ids == hf.encode(prompt + answer).ids
        assert tok.decode(ids) == prompt + answer
        row, mask = tok.render(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        )
        assert row == [*ids, tok.eos_id] and mask == [0] * 4 + [1] * (len(row) - 4)
        assert toy.gold(tok.decode(row[:4]), tok.decode(row[4:])) == toy.gold(prompt, answer)
