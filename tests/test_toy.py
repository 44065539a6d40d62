"""The made-up language: `gold` is the reward it is meant to be, and its files and its tokenizer are
what its texts need."""

import json
import random
from collections import Counter

import pytest

from nano import config, tokenizer
from nano.config import UserError
from prepare import toy


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_records():
    assert toy.reviews(20, 5, 1) == toy.reviews(20, 5, 1) != toy.reviews(20, 5, 2)


def test_bad_out(tmp_path):
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
