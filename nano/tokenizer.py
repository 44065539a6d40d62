"""The tokenizer of a model directory: text to ids and back, and conversations to (ids, mask).

    byte-level BPE   on tiktoken: tokenizer.json, vocab.json + merges.txt, or a tiktoken file (Llama
                     3's tokenizer.model)
    sentencepiece    on sentencepiece: tokenizer.model, spiece.model (T5's), or a tokenizer.json
                     with a byte-fallback BPE or a Unigram model

Text of users and data sets is encoded so that nothing in it becomes a control token. Only a chat
template writes control tokens, by id. Tokenizer.render is the one place that lays out conversations
(with nano/chat.py) and puts BOS first, for training, evaluation, chat and RL alike.
"""

import base64
import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import regex  # comes with tiktoken
import sentencepiece
import tiktoken

from nano import adapters, chat, files, tools
from nano.config import UserError
from nano.vocab import (
    BYTE,
    BYTE_CHAR,
    CHAR_BYTE,
    CONTROL,
    GPT2,
    LLAMA3,
    NORMAL,
    O200K,
    QWEN,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    BytePairJson,
    Id,
    SpecialTokensMap,
    TokenIds,
    TokenizerConfig,
    TokenizerJson,
    UnigramJson,
    added_token,
    one_regex,
    part,
    sentencepiece_proto,
)

FILES = [  # the files of a model directory that belong to its tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
]


PROTOS = ("tokenizer.model", "spiece.model")  # names of a sentencepiece model


def files_of(dir):
    return [path for pattern in FILES for path in Path(dir).glob(pattern)]


def has_vocabulary(dir):
    names = ("tokenizer.json", *PROTOS, "vocab.json")
    return any((Path(dir) / name).exists() for name in names) or any(Path(dir).glob("*.tiktoken"))


def copy_files(source, dir):
    """Copies tokenizer files and generation_config.json byte for byte into `dir`.

    Such files of another model in `dir` are removed. Nothing happens if `dir` is the source.
    """
    if Path(source).resolve() == Path(dir).resolve():
        return
    for path in files_of(dir):
        if not (Path(source) / path.name).exists():
            path.unlink()
    for path in files_of(source):
        files.write_bytes(Path(dir) / path.name, path.read_bytes())
    settings = files.read_json(Path(dir) / "tokenizer_config.json", missing={})
    if settings.pop("auto_map", None):  # names a .py file, which does not go along
        files.write_json(Path(dir) / "tokenizer_config.json", settings, ensure_ascii=False)


PADDING = "<|score_padding|>"


def write_padding(tok, dir):
    """Makes tok.padding() the token with which the tokenizer of a score model's directory pads.

    transformers reads a score at the last token that is not padding."""
    name, id = tok.padding()
    path = Path(dir) / "tokenizer_config.json"
    settings = files.read_json(path, missing={})
    listed = dict(settings.get("added_tokens_decoder") or {})
    # A token may be known by no other name than that of the padding which it was.
    for entry in tok.added.values():
        if entry["id"] == tok.pad_id:
            listed.setdefault(str(tok.pad_id), {k: v for k, v in entry.items() if k != "id"})
    if name not in tok.added:
        listed[str(id)] = {k: v for k, v in added_token(id, name).items() if k != "id"}
    if listed:
        settings["added_tokens_decoder"] = listed
    settings |= {"pad_token": name, "padding_side": "right"}
    files.write_json(path, settings, ensure_ascii=False)
    path = Path(dir) / "special_tokens_map.json"
    if path.exists():
        files.write_json(path, files.read_json(path) | {"pad_token": name}, ensure_ascii=False)


# ----------------------------------------------------------------------------------- pre-tokenizers

# The bytes that occur in UTF-8 text.
UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
RUN = re.compile(r"\s+|\S+")
LONG = 250_000  # characters; tiktoken's regex engine runs out of stack on runs some times as long


def flat(node):
    """The steps of a normalizer, pre-tokenizer or post-processor of tokenizer.json, as a flat list.

    Nested sequences are unrolled. node may be None.
    """
    if not node:
        return []
    if node["type"] != "Sequence":
        return [node]
    kinds = ("normalizers", "pretokenizers", "processors")
    children = next((node[kind] for kind in kinds if kind in node), None)
    if children is None:
        raise UserError("tokenizer.json is damaged: a step of type Sequence has no steps")
    return [step for child in children for step in flat(child)]


def first(node, kind):
    """The first of the steps of that type, or None."""
    return next((step for step in flat(node) if step["type"] == kind), None)


def grouped(pattern):
    """The same regex with the alternatives before the usual lookahead in a group.

    tiktoken's engine compiles a group without lookaround to one automaton. It tries alternatives
    beside a lookahead one after another, which takes half as long again.
    """
    head, mark, tail = pattern.partition(r"|\s+(?!")
    try:
        regex.compile(head, regex.V1)
    except regex.error:  # the lookahead stands inside a group
        return pattern
    return rf"(?:{head}){mark}{tail}"


def splitter(steps):
    """A function from text to its pieces as bytes, for any chain of supported pre-tokenizer steps.

    steps: what flat returns. UserError for a step that is not supported.
    """
    stages = []
    for step in steps:
        kind = step["type"]
        behavior = step.get("behavior", "Isolated")
        if kind == "ByteLevel":
            if step.get("use_regex", True):
                stages.append(cutter(GPT2))
            if step is not steps[-1]:  # later steps see the characters that stand for bytes
                stages.append(lambda text: ["".join(map(BYTE_CHAR.get, text.encode()))])
        elif kind == "Digits":
            stages.append(cutter(r"\p{N}" if part(step, "individual_digits") else r"\p{N}+"))
        elif kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
            many = "+" if behavior == "Contiguous" else ""
            stages.append(cutter(r"[!-/:-@\[-`{-~\p{P}]" + many))
        elif kind == "Split" and behavior in ("Isolated", "Removed"):
            pattern = part(step, "pattern")
            pattern = pattern.get("Regex") or regex.escape(pattern.get("String", ""))
            keep, invert = behavior == "Isolated", part(step, "invert")
            stages.append(cutter(pattern, keep or invert, keep or not invert))
        else:
            raise UserError(
                f"tokenizer.json has the pre-tokenizer {kind} {behavior}, which is not supported"
            )
    stand_ins = steps[-1]["type"] != "ByteLevel"

    def split(text):
        pieces = [text]
        for stage in stages:
            pieces = [part for piece in pieces for part in stage(piece)]
        if stand_ins:
            return [piece.translate(CHAR_BYTE).encode("latin-1") for piece in pieces]
        return [piece.encode() for piece in pieces]

    return split


def cutter(pattern, matches=True, gaps=True):
    """A function from text to a list of the matches of `pattern` and of the gaps between them."""
    try:
        # tokenizer.json has nested sets in its regexes, which V0 does not know.
        compiled = regex.compile(pattern, regex.V1)
    except regex.error as error:
        raise UserError(f"tokenizer.json splits text by {pattern!r:.80}: {error}") from None

    def cut(text):
        pieces = []
        end = 0
        for match in compiled.finditer(text):
            if gaps and match.start() > end:
                pieces.append(text[end : match.start()])
            if matches and match[0]:
                pieces.append(match[0])
            end = match.end()
        if gaps and end < len(text):
            pieces.append(text[end:])
        return pieces

    return cut


def bounded(text):
    """A list of parts of `text` in which no run of whitespace, or of anything else, is very long.

    Runs longer than LONG to 2 * LONG characters are split.
    """
    borders = [0]
    end = 0
    # A run of 2 * LONG characters covers at least one of these places.
    for start in range(0, len(text), LONG):
        if start >= end:
            end = RUN.match(text, start).end()
            borders += range(start + LONG, end, LONG)
    return [text[a:b] for a, b in pairwise([*borders, len(text)])]


class Cache(dict):
    """piece -> ids. Ids of short pieces are computed once."""

    def __init__(self, encode):
        self.encode = encode

    def __missing__(self, piece):
        ids = self.encode(piece)
        if len(piece) <= 32 and len(self) < 1 << 18:
            self[piece] = ids
        return ids

    def join(self, pieces):
        return list(chain.from_iterable(map(self.__getitem__, pieces)))


# ---------------------------------------------------------------------------------------- back ends
# .encode(text, lead): list of ids. lead: put a space in front, as some vocabularies expect.
# .prefix: where that space goes.
#     "always"   before every stretch of text between control tokens
#     "missing"  the same, except before stretches that begin with a space
#     "first"    before the whole text, unless it begins with a space
#     "never"
# .bytes: {id: bytes}
# .unknown: the id of what the vocabulary cannot spell, or None


@dataclass
class BytePairs:
    """Byte-level BPE on tiktoken."""

    ranks: dict  # {bytes: merge order}
    bytes: dict  # {id: bytes}
    pattern: str | None  # the regex that splits text; None where only `split` can
    ids: list | None = None  # rank -> id; None where both are equal
    split: Callable | None = None  # text -> pieces as bytes
    normal: str | None = None  # a Unicode normal form
    holes: bytes = b""  # the bytes that the vocabulary lacks
    prefix: str = "never"
    unknown: None = None

    def __post_init__(self):
        pattern = grouped(self.pattern or r"[\s\S]+")
        try:
            self.core = tiktoken.Encoding(
                "bpe", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={}
            )
        except ValueError as error:
            raise UserError(f"tiktoken does not take the tokenizer: {error}") from None
        self.pieces = Cache(self._piece)

    def encode(self, text, lead):
        if self.normal and not text.isascii():
            text = unicodedata.normalize(self.normal, text)
        if lead and not text.startswith(" "):
            text = " " + text
        if len(text) > LONG:
            return list(chain.from_iterable(map(self._encode, bounded(text))))
        return self._encode(text)

    def _encode(self, text):
        raw = text.encode() if self.holes else b""
        if self.pattern and raw == raw.translate(None, self.holes):
            return self._ids(self.core.encode_ordinary(text))
        return self.pieces.join(self.split(text))

    def order(self, special):
        """What decides the ids, beside the way that text is split: the tokens by merge order."""
        return sorted(self.ranks, key=self.ranks.get)

    def _piece(self, piece):
        # A byte that the vocabulary lacks is dropped, and merges reach across the gap.
        piece = piece.translate(None, self.holes)
        return self._ids(self.core._encode_single_piece(piece)) if piece else []

    def _ids(self, ranks):
        return [self.ids[rank] for rank in ranks] if self.ids else ranks


def merge_pairs(model):
    """The merges of tokenizer.json as pairs. Older files write each as "left right"."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"merge {' '.join(pair)!r:.80} of the tokenizer is not of two parts")
    return pairs


def check_ids(vocab):
    """UserError for a vocabulary {token: id} without tokens, and for two tokens of one id."""
    if not vocab:
        raise UserError("the vocabulary of the tokenizer is empty")
    token_of = {}
    for token, id in vocab.items():
        if token_of.setdefault(id, token) is not token:
            raise UserError(
                f"the tokens {token_of[id]!r:.60} and {token!r:.60} of the tokenizer "
                f"have the same id {id}"
            )


def byte_pairs(model, added, pattern, split, normal, prefix):
    """BytePairs from the vocabulary and the merges of a byte-level BPE.

    model: the dict of that name in tokenizer.json. added: the names of the added tokens, which no
    merge makes. pattern, split, normal, prefix: as in BytePairs.

    tiktoken merges the pair whose product has the lowest rank. tokenizer.json merges the pair that
    stands first in a list. Both agree where every merge has a product of its own and parts made
    before it. UserError for other merges, and for settings that are not supported.
    """
    vocab = model["vocab"]
    check_ids(vocab)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            "tokenizer.json marks the parts of words, which byte-level BPE here does not support"
        )
    merges = merge_pairs(model)
    products = ["".join(merge) for merge in merges]
    known = set(BYTE_CHAR.values())
    if model.get("ignore_merges"):
        # A piece that is a token is taken whole. Each token is listed once for each way to split
        # it, so the ranks come from the ids.
        order = [vocab.get(token, -1) for token in products]
        if order != sorted(order):
            raise UserError("the merges of tokenizer.json do not follow the order of its ids")
        products = [
            token
            for token in vocab
            if len(token) > 1 and token not in added and known.issuperset(token)
        ]
        products.sort(key=vocab.get)
    else:
        for (left, right), token in zip(merges, products, strict=True):
            if left not in known or right not in known or token in known or token not in vocab:
                raise UserError(
                    f"merge {left!r} {right!r} of tokenizer.json has a part or a product "
                    "out of order"
                )
            known.add(token)
    bytes_of = {
        id: token.translate(CHAR_BYTE).encode("latin-1", "replace") for token, id in vocab.items()
    }
    # Every byte needs a rank. Those that the vocabulary lacks, the holes, are never encoded.
    unused = max(bytes_of) + 1
    ranks = {bytes([byte]): vocab.get(char, unused + byte) for byte, char in BYTE_CHAR.items()}
    ranks |= {bytes_of[vocab[token]]: vocab[token] for token in products}
    ids = list(ranks.values())
    if ids[256:] == sorted(ids[256:]):  # then the ids serve as ranks
        ids = None
    else:
        ranks = {token: rank for rank, token in enumerate(ranks)}
    holes = bytes(byte for byte in UTF8 if BYTE_CHAR[byte] not in vocab)
    return BytePairs(ranks, bytes_of, pattern, ids, split, normal, holes, prefix)


def splitting_of_json(spec):
    """How a byte-level tokenizer.json splits text, as keyword arguments of byte_pairs."""
    steps = flat(spec["pre_tokenizer"])
    normals = [step["type"] for step in flat(spec.get("normalizer"))]
    spaced = [step["type"] == "ByteLevel" and step.get("add_prefix_space", False) for step in steps]
    if any(spaced[1:]) or normals not in ([], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"]):
        raise UserError(
            f"tokenizer.json has normalizers {normals} and pre-tokenizers {steps}: "
            "not supported together"
        )
    return {
        "pattern": one_regex(steps),
        "split": splitter(steps),
        "normal": normals[0] if normals else None,
        "prefix": "always" if spaced[0] else "never",
    }


def splitting_of_class(folder, config):
    """The same for vocab.json and merges.txt, from the class that tokenizer_config.json names."""
    kind = config.get("tokenizer_class") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise UserError(
            f"{folder} needs a tokenizer.json: vocab.json does not tell how a {kind} splits text"
        )
    pattern, normal = (GPT2, None) if kind == "GPT2Tokenizer" else (QWEN, "NFC")
    cut = cutter(pattern)
    return {
        "pattern": pattern,
        "split": lambda text: [piece.encode() for piece in cut(text)],
        "normal": normal,
        "prefix": "always" if config.get("add_prefix_space") else "never",
    }


class SentencePiece:
    """A sentencepiece model from the bytes of its tokenizer.model. prefix: as above."""

    WORD = re.compile("▁*[^▁]+|▁+")

    def __init__(self, proto, prefix):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # sentencepiece has no switch for add_dummy_prefix. In a protobuf the last value of a
            # field counts, so these bytes append normalizer_spec { add_dummy_prefix: false }.
            self.bare = sentencepiece.SentencePieceProcessor(
                model_proto=proto + b"\x1a\x02\x18\x00"
            )
        except RuntimeError as error:
            raise UserError(f"the sentencepiece model does not load: {error}") from None
        self.prefix = prefix if self.model.encode("a") != self.bare.encode("a") else "never"
        if prefix == "missing" and self.model.encode(" a") == self.model.encode("a"):
            self.prefix = "always"  # the model takes the space away that text begins with
        self.bytes = {}
        self.control = {}  # {name: id} of control and unknown pieces
        tokens = [self.model.id_to_piece(id) for id in range(len(self.model))]
        for id, token in enumerate(tokens):
            self.bytes[id] = token.replace("▁", " ").encode()
            if self.model.is_byte(id):  # "<0x41>"
                self.bytes[id] = bytes.fromhex(token[3:5])
            elif self.model.is_control(id) or self.model.is_unknown(id):
                self.control[token] = id
        # Text is encoded word by word if the model leaves text as it is and no piece reaches into
        # the next word. Then ids of words are cached, which is faster.
        probe = " a  b\u00a0ﬁ１e\u0301\u3000\t\u0085.  "
        kept = b"".join(map(self.bytes.get, self.bare.encode(probe))) == probe.encode()
        self.by_word = kept and not any("▁" in token.lstrip("▁") for token in tokens)
        self.words = Cache(self.bare.encode)
        self.unknown = self.model.unk_id()

    def order(self, special):
        """What decides the ids: the ids of each piece's own text, whatever its score is. Text never
        becomes an id of `special`, so these pieces are left out."""
        texts = [self.bytes[id].decode(errors="replace") for id in self.bytes if id not in special]
        return [repr(ids).encode() for ids in self.bare.encode(texts)]

    def encode(self, text, lead):
        if not self.by_word or text.count(" ") * 10 < len(text):  # few and long words do not repeat
            return (self.model if lead else self.bare).encode(text)
        text = text.replace(" ", "▁")
        if lead:
            text = "▁" + text
        return self.words.join(self.WORD.findall(text))


def proto_from_json(spec, prefix):
    """The bytes of the tokenizer.model of a byte-fallback BPE, from the content of tokenizer.json.

    A piece's score is minus its merge rank. UserError for merges in an order that scores cannot
    express.
    """
    model = spec["model"]
    check_ids(model["vocab"])
    tokens = {id: token for token, id in model["vocab"].items()}
    special = {entry["id"]: entry.get("special", True) for entry in spec.get("added_tokens", [])}
    products = ["".join(merge) for merge in merge_pairs(model)]
    rank = {}
    for i, token in enumerate(products):
        rank.setdefault(token, i)
    # sentencepiece ranks products, tokenizer.json ranks merges. Runs of one character may be out of
    # order: both ways to merge them give the same pieces.
    if any(rank[b] < rank[a] and len({*b}) > 1 for a, b in pairwise(products)):
        raise UserError(
            "the merges of tokenizer.json are not in order; put its tokenizer.model into the folder"
        )
    unknown = model["vocab"].get(model.get("unk_token") or "<unk>", 0)
    pieces = []
    for id in range(max(tokens) + 1):
        token = tokens.get(id, f"<unused_id_{id}>")
        if id == unknown:
            kind = UNKNOWN
        elif re.fullmatch("<0x..>", token):
            kind = BYTE
        elif id in special or id not in tokens:
            kind = CONTROL if special.get(id, True) else USER_DEFINED
        else:
            kind = NORMAL if len(token) == 1 or token in rank else UNUSED
        score = -1e7 - id if len(token) == 1 else -rank.get(token, 0)
        pieces.append((token, score, kind))
    return sentencepiece_proto(pieces, prefix != "never", (unknown, -1, -1, -1))


def proto_from_unigram(spec, prefix):
    """The same of a Unigram model, whose pieces have scores, and whose normalizer is a table."""
    model = spec["model"]
    special = {entry["id"]: entry.get("special", True) for entry in spec.get("added_tokens", [])}
    pieces = []
    for id, entry in enumerate(model["vocab"]):
        if [type(part) for part in entry] not in ([str, float], [str, int]):
            raise UserError(f"piece {id} of tokenizer.json is {entry!r:.60}, not [text, score]")
        token, score = entry
        kind = BYTE if model.get("byte_fallback") and re.fullmatch("<0x..>", token) else NORMAL
        if id == model["unk_id"]:
            kind = UNKNOWN
        elif id in special:
            kind = CONTROL if special[id] else USER_DEFINED
        pieces.append((token, score, kind))
    table = first(spec.get("normalizer"), "Precompiled")
    try:
        table = base64.b64decode((table or {}).get("precompiled_charsmap") or "", validate=True)
    except ValueError:
        raise UserError(
            "tokenizer.json is damaged: its precompiled_charsmap is not base64"
        ) from None
    return sentencepiece_proto(pieces, prefix != "never", (model["unk_id"], -1, -1, -1), table)


# -------------------------------------------------------------------------------------------- files

LLAMA3_NAMES = [
    *"begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1".split(),
    *"finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id".split(),
    *"eom_id eot_id python_tag".split(),
    *(f"reserved_special_token_{i}" for i in range(3, 248)),
]
LLAMA3_SPECIAL = [f"<|{name}|>" for name in LLAMA3_NAMES]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPECIAL += [f"<|extra_{i}|>" for i in range(205)]
# What tiktoken files do not say, by their number of ranks: regex, normal form, BOS, EOS, the id of
# the first special token, and the names of the special tokens.
TIKTOKEN = {
    50_256: (GPT2, None, None, "<|endoftext|>", 50_256, ["<|endoftext|>"]),  # r50k, GPT-2's
    100_256: (LLAMA3, None, None, "<|endoftext|>", 100_257, ["<|endoftext|>"]),  # cl100k
    128_000: (LLAMA3, None, "<|begin_of_text|>", "<|end_of_text|>", 128_000, LLAMA3_SPECIAL),
    151_643: (QWEN, "NFC", None, "<|endoftext|>", 151_643, QWEN_SPECIAL),
    199_998: (O200K, None, None, "<|endoftext|>", 199_999, ["<|endoftext|>"]),  # o200k
}


def read_json(path, kind):
    """A JSON file of the type `kind` of nano.vocab, or {} where there is none."""
    return files.read_json(path, missing={}, kind=kind, unicode=True)


def read_tiktoken(path):
    """The ranks {bytes: int} of a file of lines "base64 rank"; None for a file of another kind.

    UserError for a damaged file.
    """
    with open(path, "rb") as file:
        if not re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000)):
            return None
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(text, validate=True): int(rank) for text, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if sorted(ranks.values()) != [*range(len(ranks))]:
        raise UserError(f"{path} is damaged: its ranks are not 0, 1, 2 and so on")
    return ranks


def check_sentencepiece(path, spec):
    """UserError where a tokenizer.json prepares text otherwise than sentencepiece.

    sentencepiece turns spaces into ▁ and may put one ▁ before the text. For a BPE it does nothing
    else. For a Unigram model it also looks characters up in a table and removes spaces beside
    spaces and at both ends.
    """
    known = {("Prepend", "▁"), ("Replace", " ▁"), ("Metaspace", "▁"), ("Split", " ")}
    if spec["model"].get("type") == "Unigram":
        known |= {("Precompiled", ""), ("Strip", ""), ("Replace", "▁"), ("WhitespaceSplit", "")}
    steps = flat(spec.get("normalizer")) + flat(spec.get("pre_tokenizer"))
    texts = set()
    for step in steps:
        source = (step.get("pattern") or {}).get("String") or ""
        target = step.get("prepend") or step.get("content") or step.get("replacement") or ""
        texts.add((step["type"], source + target))
    if not texts <= known or texts.isdisjoint({("Replace", " ▁"), ("Metaspace", "▁")}):
        raise UserError(
            f"{path} prepares text by {steps}: without a tokenizer.model that is not supported"
        )


def read_sentencepiece(folder, spec, config, added):
    """(SentencePiece, the file it was read from, {"bos": id, ...}); completes `added`."""
    whole = folder / "tokenizer.json"
    proto = next((path for name in PROTOS if (path := folder / name).exists()), None)
    unigram = bool(spec) and spec["model"].get("type") == "Unigram"
    if not proto:
        check_sentencepiece(whole, spec)
    space = first(spec.get("pre_tokenizer"), "Metaspace")
    if space:
        default = "always" if space.get("add_prefix_space", True) else "never"
        prefix = space.get("prepend_scheme", default)
        if prefix == "always":
            prefix = "missing"
        names = spec["model"]["vocab"] if not proto and not unigram else ()
        wide = any("▁" in name[1:] for name in names if name not in added)
        if wide and space.get("split", True):
            raise UserError(
                f"{whole} splits text at every space, but has tokens with several; "
                "that is not supported"
            )
    elif spec:
        prefix = "always" if first(spec.get("normalizer"), "Prepend") else "never"
    else:
        prefix = "first" if config.get("legacy") is False else "always"
    if proto:
        content = proto.read_bytes()
    else:
        content = (proto_from_unigram if unigram else proto_from_json)(spec, prefix)
    back = SentencePiece(content, prefix)
    for name, id in back.control.items():
        added.setdefault(name, added_token(id, name))
    if proto and proto.name == "spiece.model":  # T5 numbers these behind the model's, backwards
        last = len(back.model) + config.get("extra_ids", 100) - 1
        for n in range(config.get("extra_ids", 100)):
            added.setdefault(f"<extra_id_{n}>", added_token(last - n, f"<extra_id_{n}>"))
    if not proto and prefix == "never":  # sentencepiece finds the other added tokens by itself
        for name in [name for name, entry in added.items() if not entry["special"]]:
            del added[name]
    ends = {key: getattr(back.model, f"{key}_id")() for key in ("bos", "eos", "pad")}
    ends = {key: id for key, id in ends.items() if id >= 0}
    return back, proto or whole, ends


def read_vocabulary(folder, spec, config, added, names):
    """(back end, the files it was read from, {"bos": id, ...} where these files say so).

    spec: the content of tokenizer.json, or {}. config: that of tokenizer_config.json. added:
    {name: added token}, which is completed. names: {"bos": name, ...}. UserError for a folder
    without a supported vocabulary.
    """
    whole = folder / "tokenizer.json"
    pair = [folder / "vocab.json", folder / "merges.txt"]
    model = spec.get("model", {})
    from_pair = not spec and all(path.exists() for path in pair)
    if from_pair:
        lines = files.read_text(pair[1]).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        model = {"vocab": read_json(pair[0], dict[str, Id]), "merges": merges}
    is_bpe = bool(spec) and model.get("type", "BPE") == "BPE"
    if is_bpe:
        files.check_json(spec, BytePairJson, whole)
    if from_pair or (is_bpe and first(spec.get("pre_tokenizer"), "ByteLevel")):
        for name in names.values():
            if name in model["vocab"]:
                added.setdefault(name, added_token(model["vocab"][name], name))
        how = splitting_of_class(folder, config) if from_pair else splitting_of_json(spec)
        return byte_pairs(model, added, **how), pair if from_pair else [whole], {}

    proto = folder / "tokenizer.model"
    for file in [proto, *sorted(folder.glob("*.tiktoken"))]:
        if ranks := file.exists() and read_tiktoken(file):
            if len(ranks) not in TIKTOKEN:
                raise UserError(
                    f"{file} has {len(ranks)} ranks, and no kind of that size is known: "
                    f"{sorted(TIKTOKEN)}"
                )
            pattern, normal, bos, eos, start, special = TIKTOKEN[len(ranks)]
            taken = {entry["id"] for entry in added.values()}
            for id, name in enumerate(special, start):
                if id not in taken:
                    added.setdefault(name, added_token(id, name))
            ends = {"bos": bos, "eos": eos}
            ends = {key: added[name]["id"] for key, name in ends.items() if name in added}
            bytes_of = {rank: token for token, rank in ranks.items()}
            return BytePairs(ranks, bytes_of, pattern, normal=normal), [file], ends

    unigram = model.get("type") == "Unigram"
    if unigram:
        files.check_json(spec, UnigramJson, whole)
    has_proto = any((folder / name).exists() for name in PROTOS)
    if has_proto or unigram or (is_bpe and model.get("byte_fallback")):
        back, file, ends = read_sentencepiece(folder, spec, config, added)
        return back, [file], ends
    if spec:
        raise UserError(
            f"{whole} is a tokenizer of the kind {model.get('type', 'BPE')} without bytes: "
            "a byte-level or byte-fallback BPE or a sentencepiece tokenizer.model is needed"
        )
    raise UserError(
        f"{folder} has no tokenizer.json, tokenizer.model, vocab.json + merges.txt or *.tiktoken"
    )


def own_template(folder, config):
    """The chat template of a model directory in Jinja, or None."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return files.read_text(path)
    source = config.get("chat_template")
    if isinstance(source, list):
        return next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def named_tokens(settings):
    """{"bos_token": text, ...} of tokenizer_config.json, as templates get them in transformers."""
    more = settings.get("extra_special_tokens")
    settings = settings | (more if isinstance(more, dict) else {})
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    tokens = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in tokens.items()
    }
    return {key: token for key, token in tokens.items() if isinstance(token, str) and token}


def load(path, template=None, options=(), base=None):
    """The Tokenizer of a model or adapter directory.

    An adapter directory without a vocabulary has that of its base, and may have a chat template of
    its own. base: takes the place of the base that the adapter names.
    template: a key of chat.TEMPLATES, or a chat template in Jinja. None: the directory's own chat
    template, where it has one. A key that names the directory's own template selects that one, with
    its default system prompt.
    options: ["name=value", ...] for variables that the template reads, such as
    enable_thinking=false. They become a part of .chat_template.

    UserError for files that are missing or damaged, for a kind of tokenizer whose ids would not
    come out exactly, and for a template whose tokens the vocabulary lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise files.no_model_directory(folder)
    ends_of = folder  # the directory whose generation_config.json names the ends of a response
    if adapters.is_adapter(folder):
        ends_of = adapters.find_base(folder, base) or folder
        if not has_vocabulary(folder):
            if template is None:
                config = read_json(folder / "tokenizer_config.json", TokenizerConfig)
                template = own_template(folder, config)
            folder = ends_of = adapters.base_of(folder, base)
    spec = read_json(folder / "tokenizer.json", TokenizerJson)
    config = read_json(folder / "tokenizer_config.json", TokenizerConfig)
    generation = read_json(ends_of / "generation_config.json", TokenIds)
    named = read_json(folder / "special_tokens_map.json", SpecialTokensMap)
    named |= {key: value for key, value in config.items() if value}
    texts = named_tokens(named)
    names = {key: texts.get(f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
    added = {entry["content"]: added_token(**entry) for entry in spec.get("added_tokens", [])}
    for id, entry in config.get("added_tokens_decoder", {}).items():
        added.setdefault(entry["content"], added_token(**entry | {"id": int(id)}))
    for name, id in read_json(folder / "added_tokens.json", dict[str, Id]).items():
        added.setdefault(name, added_token(id, name, special=name in names.values()))
    try:
        back, read, ends = read_vocabulary(folder, spec, config, added, names)
        post = first(spec.get("post_processor"), "TemplateProcessing")
        start = next(iter(part(post, "single")), ()) if post else ()
    except UserError as e:
        raise UserError(str(e) if str(folder) in str(e) else f"{folder}: {e}") from None
    for key in ("bos", "eos", "pad"):
        if names[key] in added:
            ends[key] = added[names[key]]["id"]
        elif key not in ends and not named:  # only the model's own configuration can tell
            settings = read_json(folder / "config.json", TokenIds) | generation
            ends[key] = next(iter(as_list(settings.get(f"{key}_token_id"))), None)

    default = not spec and "bos" in ends
    if post:
        default = "SpecialToken" in start
    # PADDING only pads, so a score model that has it reads the same tokens as its policy.
    tokens = sorted(
        (name, entry["id"], entry["special"]) for name, entry in added.items() if name != PADDING
    )
    content = b"".join(file.read_bytes() for file in read) + json.dumps(tokens).encode()
    return Tokenizer(
        back,
        added,
        ends,
        add_bos=config.get("add_bos_token", default),
        fingerprint=hashlib.sha256(content).hexdigest(),
        stops=as_list(generation.get("eos_token_id")),
        named=texts,
        own=own_template(folder, config),
        template=template,
        dir=folder,
        options=options,
        encodes=read_json(ends_of / "config.json", TokenIds).get("is_encoder_decoder"),
    )


def as_list(value):
    """The ids of a field of generation_config.json. -1 in old files stands for none."""
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if id is not None and id >= 0]


def mend(text):
    """`text` as UTF-8 can hold it: surrogate pairs are joined, lone surrogates replaced."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# Characters that are whitespace in Unicode. Python's \s has four control characters more.
WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


def alternation(entries):
    """A regex that splits text at these added tokens, the longest first; None for no tokens."""
    tokens = []
    for entry in sorted(entries, key=lambda entry: -len(entry["content"])):
        text = re.escape(entry["content"])
        if entry["single_word"]:
            text = rf"(?<!\w){text}(?!\w)"
        if entry["rstrip"]:
            text += f"[{WHITE}]*"
        tokens.append(text)
    return re.compile("(" + "|".join(tokens) + ")") if tokens else None


def added_in(text, pattern, added):
    """[(start, stop, id), ...]: the added tokens in `text`, and with None what is between them.

    pattern: what `alternation` returned, or None. added: {name: added token}.
    """
    spans = []
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        name = match[0]
        if name not in added:  # whitespace follows, which a token with rstrip takes in
            name = max((name for name in added if match[0].startswith(name)), key=len)
        before = text[at : match.start()]
        if added[name]["lstrip"]:
            before = before.rstrip(WHITE)
        spans += [(at, at + len(before), None), (*match.span(), added[name]["id"])]
        at = match.end()
    return [span for span in [*spans, (at, len(text), None)] if span[0] < span[1]]


def first_of(stops, whole, control):
    """Where the first of the strings `stops` begins in the bytes `whole`, or None.

    control: [(start, stop), ...] of the names of control tokens. A string matches the whole of such
    a name, or nothing of it.
    """
    starts = []
    for stop in (mend(stop).encode() for stop in stops):
        for match in re.finditer(b"(?=%s)" % re.escape(stop), whole):
            ends = match.start(), match.start() + len(stop)
            if not any(start < end < stop for start, stop in control for end in ends):
                starts.append(match.start())
                break
    return min(starts, default=None)


# Texts that tokenizers split, normalize and prefix in different ways. `identity` holds their ids.
PROBES = (
    "Hello  world",
    " a\tb \n\n  c\r\n",
    "I'll we'RE 1234567 12.5% x_y fooBar(1,2);",
    "naïve cafe\u0301 ﬁ １２ 你好，世界 مرحبا नमस्ते 😀👍🏽",
    "\u00a0\u3000-- ...!?\u2026 \x00\x7f",
)
# Where a stretch of text stands: it opens the sequence, follows an added token, or goes on from
# other text.
START, AFTER, INSIDE = range(3)


def identity_of(tok):
    """sha256 in hex over what a Tokenizer does to text. A token that only pads does not count."""
    special = {name: entry["id"] for name, entry in tok.added.items() if entry["special"]}
    padding = special.pop(PADDING, None)
    special = sorted((id, name) for name, id in special.items())
    probes = [tok._text(text, where, None) for text in PROBES for where in (START, INSIDE)]
    digest = hashlib.sha256(json.dumps([special, probes]).encode())
    order = tok.model.order({id for id, _ in special})
    ids = sorted(tok.bytes.keys() - {padding})
    tokens = [*map(tok.bytes.__getitem__, ids), *order]
    digest.update(b"".join([len(token).to_bytes(4, "little") + token for token in tokens]))
    return digest.hexdigest()


class Tokenizer:
    """Text <-> ids, and conversations -> (ids, mask). `load` makes it.

    .bos_id .eos_id .pad_id   None where the model has none
    .add_bos        whether a plain text begins with BOS
    .bos_first      whether render puts BOS first
    .vocab_size     the tokenizer's highest id + 1 (a model's embedding may be larger)
    .stop_ids       tuple: EOS, the template's end of turn, the EOS ids of generation_config.json
    .control        set of the ids that text never becomes: special tokens, and those that the
                    template prints outside of answers
    .template       name of the chat template, or None. "model": the directory's own, of no other
                    name
    .chat_template  the same in Jinja, or None
    .prompt_end     ids that close a prompt: [EOS] for an encoder, [] for a decoder, which goes on
    .adopted        whether chat_template is not the directory's own
    .empty_thoughts whether the empty thought that a template prints is a target
    .counts         Counter of last answers that the template leaves open, by the token that
                    `render` added
    .fingerprint    sha256 in hex over the vocabulary files and the special tokens
    .identity       sha256 in hex over what it does to text, in whatever files it was saved
    .dir            the directory that holds the tokenizer's files
    """

    def __init__(
        self,
        model,
        added,
        ends,
        add_bos,
        fingerprint,
        stops,
        named,
        own,
        template,
        options,
        dir,
        encodes,
    ):
        self.model = model
        self.dir = dir
        self.added = added
        self.fingerprint = fingerprint
        self.bos_id = ends.get("bos")
        self.eos_id = ends.get("eos")
        self.pad_id = ends.get("pad")
        self.bytes = model.bytes | {entry["id"]: name.encode() for name, entry in added.items()}
        self.vocab_size = max(self.bytes) + 1
        self._names = None
        self._plans = {}  # shape of a layout -> its steps
        self._all = alternation(added.values())
        texts = {entry["id"]: name for name, entry in added.items()}
        self._marks = {key: texts.get(ends.get(key), "") for key in ("bos", "eos")}
        self._named = {f"{key}_token": text for key, text in self._marks.items() if text} | named
        self._marks["first"] = self._marks["bos"] if add_bos else ""
        self._marks["prompt_end"] = self._marks["eos"] if encodes else ""
        self.prompt_end = [self.eos_id] if self._marks["prompt_end"] else []
        self._ends = [texts[id] for id in stops if id in texts]
        self._others = {}  # named template -> its layout, for what `advice` tries
        self.template, self.layout, self.chat_template = chat.choose(
            template, own, self._marks, added, self._layout, options
        )
        self.adopted = bool(self.chat_template) and self.chat_template != own
        self.add_bos = bool(add_bos) and self.bos_id is not None
        self.bos_first = self.add_bos and chat.takes_bos(self.layout)
        self.empty_thoughts = False
        self.counts = Counter()

        # Text never becomes a special token or a token of the chat template.
        self.control = {entry["id"] for entry in added.values() if entry["special"]}
        self.control |= {self.bos_id, self.eos_id}
        stops = {*stops, self.eos_id}
        if self.layout:
            self.control |= {
                added[name]["id"]
                for name in self.layout.control | self.layout.stops
                if name in added
            }
            stops |= {added[name]["id"] for name in self.layout.stops if name in added}
        self.control -= {None}
        self.stop_ids = tuple(sorted(stops - {None}))
        self._plain = alternation(e for e in added.values() if e["id"] not in self.control)
        # The vocabulary may hold the name of a control token as an ordinary piece. Text that
        # contains the name, perhaps only once it is normalized, then gives the control token's id.
        self._leaks = {
            entry["id"]
            for name, entry in added.items()
            if entry["id"] in self.control - {model.unknown}
            and entry["id"] in model.encode(name, False)
        }

    @functools.cached_property
    def tools(self):
        """What the chat template makes of tools, see nano/tools.py."""
        return tools.Tools(self.layout)

    @functools.cached_property
    def identity(self):
        return identity_of(self)

    def check_embeddings(self, count, dir):
        """UserError when text may become an id for which the model of `dir` has no embedding.

        count: number of embeddings. The id of a token that only pads may lie beyond: many a Llama
        was given such a token, and nothing here pads with it.
        """
        padding = {self.pad_id} - {self.bos_id, *self.stop_ids}
        last = max(self.bytes.keys() - padding)
        if last >= count:
            raise UserError(
                f"{dir} has {count} embeddings, none for id {last} of its tokenizer: "
                "take the one it was trained with"
            )

    def padding(self):
        """(name, id) of a token that can pad a score model's rows, because no completion ends in
        it: PAD, BOS or another special token. PADDING, of the next free id, if there is none."""
        names = {entry["id"]: name for name, entry in self.added.items()}
        for id in (self.pad_id, self.bos_id, *sorted(self.control)):
            if id in names and id not in self.stop_ids:
                return names[id], id
        return PADDING, self.vocab_size

    def encode(self, text, bos=False, eos=False):
        """list of ids. Names of control tokens in `text` are plain text.

        bos: begin with BOS, where the model has one. eos: end with EOS; UserError where the model
        has none.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        ids += self._text(text, START, self._plain)
        if eos:
            if self.eos_id is None:
                raise UserError(
                    "this tokenizer has no EOS token: "
                    "name one as eos_token in its tokenizer_config.json"
                )
            ids.append(self.eos_id)
        return ids

    def bytes_of(self, ids):
        """The bytes of ids, for streaming: the bytes of a character may come from several ids."""
        return b"".join(self.bytes.get(id, b"") for id in ids)

    def decode(self, ids, skip_special=True, inside=False):
        """The text of ids. Bytes that are not UTF-8 are replaced.

        skip_special: leave control tokens out. inside: the ids go on from other text, so a space
        at their beginning is kept. Otherwise it is the space that sentencepiece puts before a text,
        and is removed.
        """
        if skip_special:
            ids = [id for id in ids if id not in self.control]
        return self._decoded(self.bytes_of(ids), inside)

    def decode_until(self, ids, stops, inside=False):
        """(the text of ids before the first of the strings `stops`, whether there is one).

        Control tokens are left out of the text, but a string may name one. inside: as in decode.
        """
        pieces = [self.bytes.get(id, b"") for id in ids]
        borders = [0, *accumulate(map(len, pieces))]
        control = [
            (start, stop)
            for id, start, stop in zip(ids, borders, borders[1:], strict=False)
            if id in self.control
        ]
        end = first_of(stops, b"".join(pieces), control)
        stopped = end is not None
        end = borders[-1] if end is None else end
        kept = [
            piece[: max(end - start, 0)]
            for id, piece, start in zip(ids, pieces, borders, strict=False)
            if id not in self.control
        ]
        return self._decoded(b"".join(kept), inside), stopped

    def _decoded(self, raw, inside):
        text = raw.decode("utf-8", "replace")
        spaced = isinstance(self.model, SentencePiece) and self.model.prefix != "never"
        return text.removeprefix(" ") if spaced and not inside else text

    def read_rendered(self, text, spans):
        """(ids, mask) of a text that a chat template has rendered: it is not laid out again.

        Names of control tokens in it are these tokens. spans: [(begin, end), ...] of the targets.
        """
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        ids = []
        mask = []
        position = START
        for flag, (begin, end) in enumerate(pairwise(edges)):
            new = self._text(text[begin:end], position, self._all)
            position = INSIDE if begin < end else position
            ids += new
            mask += [flag % 2] * len(new)
        return ids, mask

    def spells_out(self, text):
        """Whether `text` has names of control tokens, which `encode` spells out."""
        if self._names is None:
            self._names = alternation(e for e in self.added.values() if e["id"] in self.control)
        return bool(self._names and self._names.search(text))

    def _layout(self, source, name=None):
        """The ChatTemplate of a source in Jinja with the tokens of this vocabulary."""
        return chat.ChatTemplate(source, self._named, self.added, self._ends, name)

    def render(self, messages, add_generation_prompt=False, last_only=False, tools=None):
        """(ids, mask) of a conversation, two lists of equal length.

        mask is 1 on what the assistant has to produce, including the end of its turn.

        messages: list of {"role": "system" | "user" | "assistant" | "tool", "content": str}.
        Optional keys: "input": str, as in Alpaca records; "columns": list of [name, text];
        "weight": 0 on an assistant's turn that is no target; and what templates read:
        "reasoning_content": str, "tool_calls": list of {"type": "function", "function": {"name":
        str, "arguments": dict or its JSON}}, "tool_call_id", "name". With tool_calls, content may
        be None.
        add_generation_prompt: end with the prompt of an answer. last_only: only the last assistant
        turn is a target. tools: list of the definitions of functions. For a template that does not
        know tools they are written into the messages, see nano/tools.py.

        render(messages[:-1], True) is a prefix of render(messages), and no token spans the border,
        unless the template lays out the messages otherwise when an answer follows.
        UserError for messages that are no conversation. NotFollowed for one that the template
        cannot lay out.
        """
        if self.layout is None:
            raise UserError(
                f"the model has no chat template: choose template={'|'.join(chat.TEMPLATES)}"
            )
        messages = chat.check(messages)
        if tools or any(m.get("tool_calls") for m in messages):
            messages, tools = self.tools.conversation(messages, tools)
        answers = chat.answers_of(messages)
        learned = {n for n in answers[-last_only:] if messages[n].get("weight") != 0}
        if self.template == "columns":  # it lays out one answer, the last message
            learned &= {len(messages) - 1}
            for n, message in enumerate(messages):
                if message.get("columns"):  # they stand in the place of the content
                    messages[n] = message | {"content": message["columns"][-1][1]}
        request = (messages, add_generation_prompt, tools, learned, self.empty_thoughts)
        try:
            layout = self.layout.lay_out(*request)
        except chat.NotFollowed as error:
            raise chat.NotFollowed(error.reason, error.message, self._advice(request)) from None
        if layout.closing:
            self.counts[layout.closing] += 1
        if layout.shape not in self._plans:
            if len(self._plans) > 10_000:
                self._plans.clear()
            self._plans[layout.shape] = self._plan(layout, learned)
        ids = []
        mask = []
        position = START
        starts = layout.starts
        for known, flags, first, last in self._plans[layout.shape]:
            if known is not None:
                ids += known
                mask += flags
                position = last
                continue
            (i, a), (j, b) = first, last
            text = layout.text[starts[i] + a : starts[j] + b]
            new = self._text(text, position, self._plain)
            ids += new
            mask += flags * len(new)
            if text:
                position = INSIDE
        return ids, mask

    def _plan(self, layout, learned):
        """How the text of a layout, and of each of the same shape, becomes ids, as a list of steps.

        Steps of what is the same in all of them: (ids, mask, None, where text stands behind them).
        Steps of text: (None, [its mask], where it begins, where it ends). These two places are
        what chat.index_of gives. Text of equal target between two tokens is
        encoded as one, so tokens may span its parts.
        """
        pieces = []  # (start, stop, id, target, own)
        at = 0
        for text, own, target in layout.parts():
            spans = added_in(text, self._all, self.added) if own else [(0, len(text), None)]
            for start, stop, id in spans:
                before = pieces[-1] if pieces else None
                if id is None and before and before[2:4] == (None, target):
                    start = before[0] - at
                    own = own and before[4]
                    pieces.pop()
                pieces.append((at + start, at + stop, id, target, own))
            at += len(text)
        steps = []
        position = START
        for start, stop, id, target, own in pieces:
            flag = int(target in learned)
            if id is not None or (own and position is not None):
                text = layout.text[start:stop]
                new = [id] if id is not None else self._text(text, position, self._plain)
                position = INSIDE if id is None else AFTER
                if not steps or steps[-1][0] is None:
                    steps.append(([], [], None, None))
                known, flags, _, _ = steps[-1]
                steps[-1] = (known + new, flags + [flag] * len(new), None, position)
            else:
                first, last = (chat.index_of(layout.starts, place) for place in (start, stop))
                steps.append((None, [flag], first, last))
                position = None  # it may be empty in another conversation
        return steps

    def _advice(self, request):
        """ "; template=NAME lays it out", or "": the first named template that takes a request."""
        for name in chat.TEMPLATES:
            if name == self.template or chat.lacking(name, self._marks, self.added):
                continue
            if name not in self._others:
                self._others[name] = self._layout(chat.in_jinja(name, self._marks), name)
            try:
                self._others[name].parts(*request)
            except chat.NotFollowed:
                continue
            return f"; template={name} lays it out"
        return "; no named template lays it out"

    def _text(self, text, position, added):
        """The ids of text in which names of control tokens are plain text.

        position: START, AFTER or INSIDE. added: what `alternation` returned for the tokens that
        count, or None.
        """
        ids = []
        prefix = self.model.prefix
        text = mend(text)
        spans = (
            added_in(text, added, self.added) if added else [(0, len(text), None)] if text else []
        )
        for start, stop, id in spans:
            if id is not None:
                ids.append(id)
                position = AFTER
                continue
            piece = text[start:stop]
            lead = prefix == "always" or (prefix != "never" and piece[0] not in " ▁")
            lead = lead and (position == START or (position == AFTER and prefix != "first"))
            new = self.model.encode(piece, lead)
            if not self._leaks or self._leaks.isdisjoint(new):
                ids += new
            else:
                ids += chain.from_iterable(map(self._spelled, new))
        return ids

    def _spelled(self, id):
        """The ids of a control token's name as plain text; [id] for any other id."""
        name = self.bytes[id].decode() if id in self._leaks else ""
        if len(name) < 2:
            return [id]
        ids = self.model.encode(name[:1], False) + self.model.encode(name[1:], False)
        return chain.from_iterable(map(self._spelled, ids))
