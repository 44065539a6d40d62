"""The tokenizer of a model directory: text to ids and back, and conversations, laid out by chat.py,
to (ids, mask).

    byte-level BPE   on tiktoken: tokenizer.json, vocab.json + merges.txt, or a tiktoken file (Llama
                     3's tokenizer.model)
    sentencepiece    on sentencepiece: tokenizer.model, or a byte-fallback tokenizer.json

Text of users and data sets is encoded so that nothing in it can become a control token. The control
tokens of a conversation come from its template alone, by id. `render` is the one place that lays
out conversations and gives them their BOS, for training, evaluation, chat and RL alike."""

import base64
import hashlib
import json
import re
import unicodedata
from itertools import chain
from pathlib import Path

import regex  # comes with tiktoken
import sentencepiece
import tiktoken

from nano import chat, files
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
    added_token,
    one_regex,
    pre_tokenizer,
    sentencepiece_proto,
)

FILES = [  # of a model directory: what its tokenizer is made of
    "tokenizer.json",
    "tokenizer.model",
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


def files_of(dir):
    return [path for pattern in FILES for path in Path(dir).glob(pattern)]


def copy_files(source, dir):
    """Copies tokenizer files and generation_config.json, byte for byte, to `dir` if that is not the
    source itself. Such files of another model that lie there are removed."""
    if Path(source).resolve() == Path(dir).resolve():
        return
    names = {path.name for path in files_of(source)}
    for path in files_of(dir):
        if path.name not in names:
            path.unlink()
    for path in files_of(source):
        files.write_bytes(Path(dir) / path.name, path.read_bytes())


# ----------------------------------------------------------------------------------- pre-tokenizers

UTF8 = [
    byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5
]  # the bytes that occur in text
RUN = re.compile(r"\s+|\S+")
LONG = 250_000  # characters; tiktoken's regex engine runs out of stack on runs some times as long


def flat(node):
    """The steps of a normalizer, pre-tokenizer or post-processor of tokenizer.json, with sequences
    unrolled."""
    if not node or node["type"] != "Sequence":
        return [node] if node else []
    return [
        step
        for value in node.values()
        if isinstance(value, list)
        for child in value
        for step in flat(child)
    ]


def grouped(pattern):
    """The same regex with the alternatives before the usual lookahead in a group. A group without
    lookaround is one automaton to tiktoken's engine; alternatives beside a lookahead are tried one
    after another, which takes half as long again."""
    head, mark, tail = pattern.partition(r"|\s+(?!")
    try:
        regex.compile(head, regex.V1)
    except regex.error:  # the lookahead stands inside a group
        return pattern
    return rf"(?:{head}){mark}{tail}"


def splitter(steps):
    """Any chain of pre-tokenizer steps in Python: a function from text to its pieces as bytes."""
    stages = []
    for step in steps:
        kind, how = step["type"], step.get("behavior", "Isolated")
        if kind == "ByteLevel":
            stages += [cutter(GPT2)] if step.get("use_regex", True) else []
            # later steps see the stand-ins of the bytes
            stages += (
                [lambda text: ["".join(map(BYTE_CHAR.get, text.encode()))]]
                if step is not steps[-1]
                else []
            )
        elif kind == "Digits":
            stages.append(cutter(r"\p{N}" if step["individual_digits"] else r"\p{N}+"))
        elif kind == "Punctuation" and how in ("Isolated", "Contiguous"):
            stages.append(cutter(r"[!-/:-@\[-`{-~\p{P}]" + "+" * (how == "Contiguous")))
        elif kind == "Split" and how in ("Isolated", "Removed"):
            pattern = step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"])
            stages.append(
                cutter(
                    pattern,
                    how == "Isolated" or step["invert"],
                    how == "Isolated" or not step["invert"],
                )
            )
        else:
            raise UserError(
                f"tokenizer.json has the pre-tokenizer {kind} {how}, which is not supported"
            )
    stand_ins = steps[-1]["type"] != "ByteLevel"

    def split(text):
        pieces = [text]
        for stage in stages:
            pieces = [part for piece in pieces for part in stage(piece)]
        return [
            piece.translate(CHAR_BYTE).encode("latin-1") if stand_ins else piece.encode()
            for piece in pieces
        ]

    return split


def cutter(pattern, matches=True, gaps=True):
    """A function that cuts text into the matches of `pattern` and the gaps between them."""
    compiled = regex.compile(
        pattern, regex.V1
    )  # V1 has nested sets, as the regexes of tokenizer.json do

    def cut(text):
        at, pieces = 0, []
        for match in compiled.finditer(text):
            start, end = match.span()
            if gaps and start > at:
                pieces.append(text[at:start])
            if matches and end > start:
                pieces.append(text[start:end])
            at = end
        return pieces + [text[at:]] if gaps and at < len(text) else pieces

    return cut


def bounded(text):
    """`text`, cut inside runs of whitespace, or of anything else, that are longer than LONG to 2 *
    LONG characters."""
    cuts, end = [0], 0
    for at in range(
        0, len(text), LONG
    ):  # a run of 2 * LONG cannot hide between two of these places
        if at >= end:
            end = RUN.match(text, at).end()
            cuts += range(at + LONG, end, LONG)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


class Cache(dict):
    """piece -> ids, worked out once for each short piece."""

    def __init__(self, encode):
        self.encode = encode

    def __missing__(self, piece):
        ids = self.encode(piece)
        if len(piece) <= 32 and len(self) < 1 << 18:
            self[piece] = ids
        return ids


# ---------------------------------------------------------------------------------------- back ends
# .encode(text, lead): ids of a stretch of text; lead: with the space in front that some
#     vocabularies ask for
# .prefix: where they do: "always" (every stretch between control tokens), "missing" (the same, but
#     for stretches that begin with a space), "first" (the text's start, unless it begins with a
#     space) or "never"
# .bytes: id -> bytes


class BytePairs:
    """Byte-level BPE on tiktoken. ranks: bytes -> merge order; ids: rank -> id, None where they are
    the same."""

    def __init__(
        self,
        ranks,
        pattern,
        ids=None,
        bytes_of=None,
        split=None,
        normal=None,
        holes=b"",
        prefix="never",
    ):
        self.core = tiktoken.Encoding(
            "bpe", pat_str=grouped(pattern or r"[\s\S]+"), mergeable_ranks=ranks, special_tokens={}
        )
        self.bytes = bytes_of or {rank: token for token, rank in ranks.items()}
        self.fast, self.ids, self.normal, self.holes, self.prefix = (
            pattern is not None,
            ids,
            normal,
            holes,
            prefix,
        )
        self.split, self.pieces = split, Cache(self._piece)

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
        if self.fast and len(raw.translate(None, self.holes)) == len(raw):
            return self._ids(self.core.encode_ordinary(text))
        return list(chain.from_iterable(map(self.pieces.__getitem__, self.split(text))))

    def _piece(self, piece):
        # a byte that the vocabulary lacks is dropped from its piece, and merges reach across the
        # hole
        piece = piece.translate(None, self.holes)
        return self._ids(self.core._encode_single_piece(piece)) if piece else []

    def _ids(self, ranks):
        return ranks if self.ids is None else [self.ids[rank] for rank in ranks]


def bpe_from_json(spec, added):
    """BytePairs from the content of a tokenizer.json; no merge makes the `added` tokens.

    tiktoken merges the pair whose product has the lowest rank, tokenizer.json the pair that stands
    first in a list. These are the same where every merge has a product of its own and parts made
    before it; the rest is refused."""
    model, vocab = spec["model"], spec["model"]["vocab"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            "tokenizer.json marks the parts of words, which byte-level BPE here does not support"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    products, known = ["".join(merge) for merge in merges], set(BYTE_CHAR.values())
    if model.get(
        "ignore_merges"
    ):  # a piece that is a token is taken whole, and a token is listed once for each split
        made = [vocab.get(token, -1) for token in products]
        if made != sorted(made):
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
                    f"merge {left!r} {right!r} of tokenizer.json has a part or a product out of order"
                )
            known.add(token)
    bytes_of = {
        id: token.translate(CHAR_BYTE).encode("latin-1", "replace") for token, id in vocab.items()
    }
    singles = {bytes([byte]): vocab.get(char, -1) for byte, char in BYTE_CHAR.items()}
    ids = [vocab[token] for token in products]
    if ids == sorted(ids):  # then ids are ranks; the bytes that have none are never encoded
        ranks = {
            byte: max(bytes_of) + 1 + i if id < 0 else id
            for i, (byte, id) in enumerate(singles.items())
        }
        ranks |= {bytes_of[id]: id for id in ids}
        ids = None
    else:
        ranks = {token: rank for rank, token in enumerate([*singles, *map(bytes_of.get, ids)])}
        ids = [*singles.values(), *ids]
    steps, normals = (
        flat(spec["pre_tokenizer"]),
        [step["type"] for step in flat(spec.get("normalizer"))],
    )
    spaced = [step["type"] == "ByteLevel" and step.get("add_prefix_space", False) for step in steps]
    if any(spaced[1:]) or normals not in ([], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"]):
        raise UserError(
            f"tokenizer.json has normalizers {normals} and pre-tokenizers {steps}: not supported together"
        )
    holes = bytes(byte for byte in UTF8 if BYTE_CHAR[byte] not in vocab)
    prefix, normal = "always" if spaced[0] else "never", normals[0] if normals else None
    return BytePairs(ranks, one_regex(steps), ids, bytes_of, splitter(steps), normal, holes, prefix)


class SentencePiece:
    """A sentencepiece model; prefix as above."""

    WORD = re.compile("▁*[^▁]+|▁+")

    def __init__(self, proto, prefix):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # the appended field says normalizer_spec { add_dummy_prefix: false }
            self.bare = sentencepiece.SentencePieceProcessor(
                model_proto=proto + b"\x1a\x02\x18\x00"
            )
        except RuntimeError as error:
            raise UserError(f"the sentencepiece model does not load: {error}") from None
        tokens = [self.model.id_to_piece(id) for id in range(len(self.model))]
        self.prefix = prefix if self.model.encode("a") != self.bare.encode("a") else "never"
        self.control = [
            token
            for id, token in enumerate(tokens)
            if self.model.is_control(id) or self.model.is_unknown(id)
        ]
        self.bytes = {
            id: bytes([int(token[3:5], 16)])
            if self.model.is_byte(id)
            else token.replace("▁", " ").encode()
            for id, token in enumerate(tokens)
        }
        # text is encoded word by word where the model leaves it as it is and no piece reaches into
        # the next word
        probe = " a  b\u00a0ﬁ１e\u0301\u3000\t\u0085.  "
        kept = b"".join(map(self.bytes.get, self.bare.encode(probe))) == probe.encode()
        self.by_word = kept and not any("▁" in token.lstrip("▁") for token in tokens)
        self.words = Cache(self.bare.encode)

    def encode(self, text, lead):
        if not self.by_word or text.count(" ") * 10 < len(text):  # few and long words do not repeat
            return (self.model if lead else self.bare).encode(text)
        text = "▁" * lead + text.replace(" ", "▁")
        return list(chain.from_iterable(map(self.words.__getitem__, self.WORD.findall(text))))


def proto_from_json(spec, prefix):
    """The sentencepiece ModelProto of a byte-fallback BPE tokenizer.json: a piece's score is minus
    its merge rank."""

    model, pieces = spec["model"], []
    tokens = {id: token for token, id in model["vocab"].items()}
    special = {entry["id"]: entry["special"] for entry in spec["added_tokens"]}
    products = [
        "".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    rank = {token: i for i, token in reversed(list(enumerate(products)))}
    # sentencepiece ranks products, tokenizer.json merges; runs of one character may be interleaved
    if any(
        rank[b] < rank[a] and len({*b}) > 1 for a, b in zip(products, products[1:], strict=False)
    ):
        raise UserError(
            "the merges of tokenizer.json are not in order; put its tokenizer.model into the folder"
        )
    unknown = model["vocab"].get(model.get("unk_token") or "<unk>", 0)
    for id in range(max(tokens) + 1):
        token = tokens.get(id, f"<unused_id_{id}>")
        kind = NORMAL if len(token) == 1 or token in rank else UNUSED
        if id in special or id not in tokens:
            kind = CONTROL if special.get(id, True) else USER_DEFINED
        if re.fullmatch("<0x..>", token):
            kind = BYTE
        score = -1e7 - id if len(token) == 1 else -rank.get(token, 0)
        pieces.append((token, score, UNKNOWN if id == unknown else kind))
    return sentencepiece_proto(pieces, prefix != "never", unknown)


# -------------------------------------------------------------------------------------------- files

RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(248)]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *RESERVED[:2],
    "<|finetune_right_pad_id|>",
    RESERVED[2],
]
LLAMA3_SPECIAL += [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *RESERVED[3:],
]
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
]
# what tiktoken files do not say, by their number of ranks: regex, normalization, BOS, EOS, special
# tokens from an id on
TIKTOKEN = {
    50_256: (GPT2, None, None, "<|endoftext|>", 50_256, ["<|endoftext|>"]),  # r50k, GPT-2's
    100_256: (LLAMA3, None, None, "<|endoftext|>", 100_257, ["<|endoftext|>"]),  # cl100k
    128_000: (LLAMA3, None, "<|begin_of_text|>", "<|end_of_text|>", 128_000, LLAMA3_SPECIAL),
    151_643: (QWEN, "NFC", None, "<|endoftext|>", 151_643, QWEN_SPECIAL),
    199_998: (O200K, None, None, "<|endoftext|>", 199_999, ["<|endoftext|>"]),  # o200k
}


def read_json(path):
    return files.read_json(path) if path.exists() else {}


def read_tiktoken(path):
    """The ranks (bytes -> int) of a file of lines "base64 rank"; None for a file of another
    kind."""
    with open(path, "rb") as file:
        if not re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000)):
            return None
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(text, validate=True): int(rank) for text, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def check_sentencepiece(path, spec):
    """UserError where a byte-fallback tokenizer.json prepares text otherwise than sentencepiece: by
    a space that becomes ▁, before the text too perhaps, and nothing else."""
    known = {
        ("Prepend", None, "▁"),
        ("Replace", " ", "▁"),
        ("Metaspace", None, "▁"),
        ("Split", " ", None),
    }
    steps = flat(spec.get("normalizer")) + flat(spec.get("pre_tokenizer"))
    found = [
        (
            s["type"],
            (s.get("pattern") or {}).get("String"),
            *map(s.get, ("prepend", "content", "replacement")),
        )
        for s in steps
    ]
    found = [(kind, pattern, next(filter(None, texts), None)) for kind, pattern, *texts in found]
    if {*found} - known or not {"Replace", "Metaspace"} & {kind for kind, *_ in found}:
        raise UserError(
            f"{path} prepares text by {steps}: without a tokenizer.model that is not supported"
        )


def read_vocabulary(folder, spec, config, added, names):
    """(back end, the files it was read from, {"bos": id, ...} where these files say so); completes
    `added`."""
    whole, proto, vocab, merges = (
        folder / f for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    )
    read, model = [whole], spec.get("model", {})
    if not spec and vocab.exists() and merges.exists():
        read, kind = [vocab, merges], config.get("tokenizer_class") or "GPT2Tokenizer"
        pattern = {"GPT2Tokenizer": GPT2, "Qwen2Tokenizer": QWEN}.get(kind)
        if pattern is None:
            raise UserError(
                f"{folder} needs a tokenizer.json: vocab.json does not tell how a {kind} splits text"
            )
        *steps, last = pre_tokenizer(pattern)
        last = last | {"add_prefix_space": config.get("add_prefix_space", False)}
        lines = [
            line
            for line in merges.read_text(encoding="utf-8").split("\n")
            if line and not line.startswith("#version")
        ]
        model = {"vocab": read_json(vocab), "merges": lines}
        spec = {
            "model": model,
            "normalizer": {"type": "NFC"} if pattern == QWEN else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]},
        }
    if any(step["type"] == "ByteLevel" for step in flat(spec.get("pre_tokenizer"))):
        for name in filter(model["vocab"].__contains__, names.values()):
            added.setdefault(name, added_token(model["vocab"][name], name))
        return bpe_from_json(spec, added), read, {}

    for file in [proto, *sorted(folder.glob("*.tiktoken"))]:
        if ranks := file.exists() and read_tiktoken(file):
            if len(ranks) not in TIKTOKEN:
                raise UserError(
                    f"{file} has {len(ranks)} ranks, and no kind of that size is known: {sorted(TIKTOKEN)}"
                )
            pattern, normal, bos, eos, first, special = TIKTOKEN[len(ranks)]
            taken = {entry["id"] for entry in added.values()}
            for id, name in enumerate(special, first):
                if id not in taken:
                    added.setdefault(name, added_token(id, name))
            ends = {
                key: added[name]["id"]
                for key, name in (("bos", bos), ("eos", eos))
                if name in added
            }
            return BytePairs(ranks, pattern, normal=normal), [file], ends

    if proto.exists() or (model.get("type") == "BPE" and model.get("byte_fallback")):
        if not proto.exists():
            check_sentencepiece(whole, spec)
        space = next(
            (step for step in flat(spec.get("pre_tokenizer")) if step["type"] == "Metaspace"), None
        )
        if space:
            prefix = space.get(
                "prepend_scheme", "always" if space.get("add_prefix_space", True) else "never"
            )
            prefix = "missing" if prefix == "always" else prefix
            wide = any("▁" in name[1:] for name in model["vocab"] if name not in added)
            if wide and space.get("split", True) and not proto.exists():
                raise UserError(
                    f"{whole} splits text at every space, but has tokens with several; that is not supported"
                )
        elif spec:
            prefix = (
                "always"
                if any(step["type"] == "Prepend" for step in flat(spec["normalizer"]))
                else "never"
            )
        else:
            prefix = "first" if config.get("legacy") is False else "always"
        back = SentencePiece(
            proto.read_bytes() if proto.exists() else proto_from_json(spec, prefix), prefix
        )
        for name in back.control:
            added.setdefault(name, added_token(back.model.piece_to_id(name), name))
        if (
            not proto.exists() and prefix == "never"
        ):  # sentencepiece finds the other added tokens by itself
            for name in [name for name, entry in added.items() if not entry["special"]]:
                del added[name]
        ends = {key: getattr(back.model, f"{key}_id")() for key in ("bos", "eos", "pad")}
        return (
            back,
            [proto] if proto.exists() else read,
            {key: id for key, id in ends.items() if id >= 0},
        )

    if spec:
        raise UserError(
            f"{whole} is a tokenizer of the kind {model.get('type')}; byte-level or byte-fallback BPE is needed"
        )
    raise UserError(
        f"{folder} has no tokenizer.json, tokenizer.model, vocab.json + merges.txt or *.tiktoken"
    )


def load(path, template=None):
    """The Tokenizer of a model directory.

    template: a key of chat.TEMPLATES, or a chat template in Jinja; None: the directory's own chat
    template, where it has one. A key that names the directory's own template means that one, with
    its default system prompt. UserError for files that are missing, damaged, or of a kind whose ids
    would not come out exactly, and for a template whose tokens are not there."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no model directory {folder}")
    spec, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "generation_config.json")
    named = read_json(folder / "special_tokens_map.json") | {
        key: value for key, value in config.items() if value
    }
    names = {key: named.get(f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
    names = {
        key: name["content"] if isinstance(name, dict) else name for key, name in names.items()
    }
    added = {entry["content"]: added_token(**entry) for entry in spec.get("added_tokens", [])}
    for id, entry in config.get("added_tokens_decoder", {}).items():
        added.setdefault(entry["content"], added_token(**entry | {"id": int(id)}))
    for name, id in read_json(folder / "added_tokens.json").items():
        added.setdefault(name, added_token(id, name, name in names.values()))
    back, read, ends = read_vocabulary(folder, spec, config, added, names)
    for key in ("bos", "eos", "pad"):
        if names[key] in added:
            ends[key] = added[names[key]]["id"]
        elif key not in ends and not named:  # only the model's own configuration can tell
            ends[key] = (
                as_list((read_json(folder / "config.json") | generation).get(f"{key}_token_id"))
                or [None]
            )[0]

    singles = [
        step["single"]
        for step in flat(spec.get("post_processor"))
        if step["type"] == "TemplateProcessing"
    ]
    add_bos = config.get(
        "add_bos_token", "SpecialToken" in singles[0][0] if singles else not spec and "bos" in ends
    )
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in read))
    digest.update(
        json.dumps(
            sorted((name, entry["id"], entry["special"]) for name, entry in added.items())
        ).encode()
    )
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    texts = {entry["id"]: name for name, entry in added.items()}
    marks = {key: texts.get(ends.get(key), "") for key in ("bos", "eos")}
    marks["first"] = marks["bos"] if add_bos else ""
    name, layout, jinja = chat.choose(template, source, marks, alternation(added.values()))
    stops = as_list(generation.get("eos_token_id"))
    tok = Tokenizer(back, added, ends, add_bos, digest.hexdigest(), name, layout, marks, stops)
    tok.chat_template, tok.adopted = jinja, bool(jinja) and jinja != source
    return tok


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def mend(text):
    """The text as UTF-8 can hold it: halves of surrogate pairs are put together, lone ones
    replaced."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


def alternation(entries):
    """A regex that splits text at these added tokens, the longest first; None for none."""
    tokens = []
    for entry in sorted(entries, key=lambda entry: -len(entry["content"])):
        text = re.escape(entry["content"])
        text = rf"(?<!\w){text}(?!\w)" if entry["single_word"] else text
        tokens.append(text + f"[{WHITE}]*" * entry["rstrip"])
    return re.compile("(" + "|".join(tokens) + ")") if tokens else None


START, AFTER, INSIDE = range(
    3
)  # a stretch of text opens the sequence, follows an added token, goes on from other text


class Tokenizer:
    """Text <-> ids, and conversations -> (ids, mask). Made by `load`.

    .bos_id .eos_id .pad_id   None where the model has none
    .vocab_size     the tokenizer's own: its highest id + 1 (a model's embedding may be larger)
    .stop_ids       tuple: EOS, the template's end of turn, the EOS ids of generation_config.json
    .template       name of the chat template ("model": the directory's own, of no other name), or
                    None
    .chat_template  the same in Jinja, or None; .adopted: it is not the directory's own
    .fingerprint    sha256 in hex over the vocabulary files and the special tokens
    """

    def __init__(self, model, added, ends, add_bos, fingerprint, template, layout, marks, stops):
        self.model, self.added, self.fingerprint = model, added, fingerprint
        self.template, self.layout, self._marks, self._known = template, layout, marks, {}
        self.bos_id, self.eos_id, self.pad_id = ends.get("bos"), ends.get("eos"), ends.get("pad")
        self.bos_first = bool(add_bos) and self.bos_id is not None and getattr(layout, "bos", True)
        self.bytes = model.bytes | {entry["id"]: name.encode() for name, entry in added.items()}
        self.vocab_size = max(self.bytes) + 1
        # control tokens: the special ones, and those of the template; text of users never turns
        # into one of them
        self._all = alternation(added.values())
        turns = (
            layout if isinstance(layout, chat.Turns) else chat.Turns(user="", assistant="{}{eos}")
        )
        self.control = {entry["id"] for entry in added.values() if entry["special"]} | {
            self.bos_id,
            self.eos_id,
        } - {None}
        self.control |= {piece for piece in self._fixed(turns.fixed()) if isinstance(piece, int)}
        self._plain = alternation(
            entry for entry in added.values() if entry["id"] not in self.control
        )
        # a vocabulary may hold a control token as an ordinary piece, into which text turns,
        # normalised perhaps
        self._leaks = {
            e["id"]
            for name, e in added.items()
            if e["id"] in self.control and e["id"] in model.encode(name, False)
        }
        end = [
            piece
            for piece in self._fixed(turns.assistant.partition("{}")[2])
            if isinstance(piece, int)
        ]
        self.stop_ids = tuple(sorted({*stops, *end, self.eos_id} - {None}))

    def check_embeddings(self, count, dir):
        """UserError when text may turn into an id for which the model of `dir` has no embedding.
        One that only pads may lie beyond its `count`: many a Llama was given such a token, and
        nothing here pads with it."""
        padding = {self.pad_id} - {self.bos_id, *self.stop_ids}
        if (last := max(self.bytes.keys() - padding)) >= count:
            raise UserError(
                f"{dir} has {count} embeddings, none for id {last} of its tokenizer: take the one it was trained with"
            )

    def encode(self, text, bos=False, eos=False):
        """list[int]. bos: begins with BOS, where the model has one. eos: ends with EOS; UserError
        where it has none."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        ids += self._text(text, START, self._plain)
        if eos and self.eos_id is None:
            raise UserError(
                "this tokenizer has no EOS token: name one as eos_token in its tokenizer_config.json"
            )
        if eos:
            ids.append(self.eos_id)
        return ids

    def bytes_of(self, ids):
        """The bytes of ids, for streaming: a character may be spread over several ids."""
        return b"".join(self.bytes.get(id, b"") for id in ids)

    def decode(self, ids, skip_special=True, inside=False):
        """str. Bytes that are not UTF-8 are replaced; skip_special leaves the control tokens out.
        inside: the ids go on from other text, so that a space before them is meant; else it is the
        one that sentencepiece puts before a text."""
        text = self.bytes_of(id for id in ids if not (skip_special and id in self.control)).decode(
            "utf-8", "replace"
        )
        spaced = (
            isinstance(self.model, SentencePiece) and self.model.prefix != "never" and not inside
        )
        return text.removeprefix(" ") if spaced else text

    def render(self, messages, add_generation_prompt=False, last_only=False):
        """(ids, mask) of a conversation: mask 1 on what the assistant has to produce, the end of
        its turn included.

        messages: list of {"role": "system" | "user" | "assistant" | "tool", "content": str};
        "input": str, as in Alpaca records, "columns": list of [name, text], and "weight": 0 on an
        assistant's turn that is no target are optional.
        last_only: targets in the last assistant turn alone. A turn begins with its prompt:
        render(messages[:-1], True) is a prefix of render(messages), and where they meet nothing is
        merged. UserError for messages that the template cannot lay out."""
        if self.layout is None:
            raise UserError(
                f"the model has no chat template that can be followed: choose template={'|'.join(chat.TEMPLATES)}"
            )
        chat.check(messages)
        parts, last = [], None
        for text, fixed, target in self.layout(messages, add_generation_prompt):
            for piece in self._fixed(text) if fixed else [text]:
                if (
                    parts
                    and isinstance(piece, str)
                    and isinstance(parts[-1][0], str)
                    and parts[-1][2] == target
                ):
                    parts[-1] = (parts[-1][0] + piece, parts[-1][1] and fixed, target)
                else:
                    parts.append((piece, fixed, target))
            last = last if target is None else target
        ids, mask, position = [self.bos_id] * self.bos_first, [0] * self.bos_first, START
        for piece, fixed, target in parts:
            key = (piece, position)
            new = (
                [piece]
                if isinstance(piece, int)
                else self._known.get(key) or self._text(piece, position, self._plain)
            )
            if fixed:  # the same in every conversation
                self._known[key] = new
            if piece != "":
                position = AFTER if isinstance(piece, int) else INSIDE
            ids += new
            learned = (
                target is not None
                and (target == last or not last_only)
                and messages[target].get("weight") != 0
            )
            mask += [int(learned)] * len(new)
        return ids, mask

    def _pieces(self, text, added):
        """`text` as ids (of added tokens) and the strings between them."""
        pieces = added.split(text) if added else [text]
        for i in range(1, len(pieces), 2):
            name = pieces[i]
            if name not in self.added:  # whitespace follows, which a token with rstrip takes in
                name = max((name for name in self.added if pieces[i].startswith(name)), key=len)
            pieces[i] = self.added[name]["id"]
            if self.added[name]["lstrip"]:
                pieces[i - 1] = pieces[i - 1].rstrip(WHITE)
        return [piece for piece in pieces if piece != ""]

    def _fixed(self, text):
        """The pieces of a template's own text, in which tokens are meant."""
        if text not in self._known:
            filled = text.replace("{bos}", self._marks["bos"]).replace("{eos}", self._marks["eos"])
            self._known[text] = self._pieces(filled, self._all)
        return self._known[text]

    def _text(self, text, position, added):
        """ids of text in which names of control tokens are but text; `added`: the tokens that
        count, or None."""
        ids, prefix = [], self.model.prefix
        for piece in self._pieces(mend(text), added):
            if isinstance(piece, int):
                ids.append(piece)
                position = AFTER
                continue
            lead = prefix == "always" or (prefix != "never" and piece[0] not in " ▁")
            lead = lead and (position == START or (position == AFTER and prefix != "first"))
            new = self.model.encode(piece, lead)
            ids += (
                new
                if not self._leaks or self._leaks.isdisjoint(new)
                else chain.from_iterable(map(self._spelled, new))
            )
        return ids

    def _spelled(self, id):
        """The ids of the name of a control token as text; any other id as it is."""
        name = self.bytes[id].decode() if id in self._leaks else ""
        if len(name) < 2:
            return [id]
        return chain.from_iterable(
            self._spelled(i)
            for part in (name[:1], name[1:])
            for i in self.model.encode(part, False)
        )
