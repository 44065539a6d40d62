"""What tokenizer files are made of.

The regexes that split text before its merges, the printable characters that stand for bytes, the
types of the fields in JSON files, and sentencepiece's tokenizer.model. Nothing here encodes text.
"""

import struct
from typing import Annotated, NotRequired, Required, TypedDict

from nano.config import UserError

# ----------------------------------------------------------------------------------- pre-tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Single digits are split off first, so that the spaces before a digit stay together.
DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{CASED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACE}"
)
QWEN = LLAMA3.replace("{1,3}", "")
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"{UPPER}*{LOWER}+{CASED}?|{UPPER}+{LOWER}*{CASED}?"
O200K = rf"{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}"

# GPT-2's printable characters for the 256 bytes.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_CHAR = {byte: chr(byte) for byte in VISIBLE}
BYTE_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
CHAR_BYTE = {ord(char): byte for byte, char in BYTE_CHAR.items()}


def part(step, key):
    """A field of a step in tokenizer.json that steps of its type have. UserError where it lacks."""
    if key not in step:
        raise UserError(f"tokenizer.json is damaged: a step of type {step['type']} lacks {key!r}")
    return step[key]


def one_regex(steps):
    """The one regex with which tiktoken splits text as these pre-tokenizer steps do, or None."""
    kinds = [step["type"] for step in steps]
    gpt2 = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and gpt2 and part(steps[0], "individual_digits"):
        return DIGITS_GPT2
    if kinds == ["Split", "ByteLevel"] and not gpt2 and "Regex" in part(steps[0], "pattern"):
        pattern = steps[0]["pattern"]["Regex"]
        how = (part(steps[0], "behavior"), part(steps[0], "invert"))
        if how == ("Removed", True):
            return pattern
        # tiktoken drops the text between matches. The second alternative matches that text.
        if how == ("Isolated", False):
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return None


# ----------------------------------------------------------------------------------- tokenizer.json


def added_token(id, content, **flags):
    """An added token as a dict with the keys of tokenizer.json. flags: those that differ."""
    return {
        "id": id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | flags


# ----------------------------------------------------------- types of the fields that are read here

Id = Annotated[int, ("from 0 to 2^31 - 1", lambda id: 0 <= id < 2**31)]
IdText = Annotated[str, ("a number of at most 9 digits", lambda s: s.isdecimal() and len(s) < 10)]
Ids = int | list[int] | None


class AddedToken(TypedDict, total=False):
    content: Required[str]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class NumberedToken(AddedToken):
    id: Id


class Pattern(TypedDict, total=False):
    String: str
    Regex: str


class Step(TypedDict, total=False):
    """Of a normalizer, a pre-tokenizer or a post-processor."""

    type: Required[str]
    normalizers: list["Step"]
    pretokenizers: list["Step"]
    processors: list["Step"]
    add_prefix_space: bool
    use_regex: bool
    individual_digits: bool
    pattern: Pattern
    behavior: str
    invert: bool
    prepend: str
    content: str
    replacement: str
    prepend_scheme: str
    precompiled_charsmap: str | None
    split: bool
    single: list[dict]


class Typed(TypedDict):
    type: NotRequired[str]


class TokenizerJson(TypedDict, total=False):
    added_tokens: list[NumberedToken]
    normalizer: Step | None
    pre_tokenizer: Step | None
    post_processor: Step | None
    model: Required[Typed]


class BytePairModel(TypedDict, total=False):
    vocab: Required[dict[str, Id]]
    merges: Required[list[str | list[str]]]
    unk_token: str | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    byte_fallback: bool
    ignore_merges: bool


class BytePairJson(TypedDict):
    model: BytePairModel


class UnigramModel(TypedDict, total=False):
    vocab: Required[list[list[str | float]]]
    unk_id: Required[Id]
    byte_fallback: bool


class UnigramJson(TypedDict):
    model: UnigramModel


class NamedTemplate(TypedDict):
    name: str
    template: str


class SpecialTokensMap(TypedDict, total=False):
    bos_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    pad_token: str | AddedToken | None
    unk_token: str | AddedToken | None


class TokenizerConfig(SpecialTokensMap, total=False):
    added_tokens_decoder: dict[IdText, AddedToken]
    add_bos_token: bool | None
    add_prefix_space: bool | None
    chat_template: str | list[NamedTemplate] | None
    extra_ids: Annotated[int, ("from 0 to 10,000", lambda n: 0 <= n <= 10_000)]
    legacy: bool | None
    tokenizer_class: str | None


class TokenIds(TypedDict, total=False):
    """Of config.json and generation_config.json."""

    bos_token_id: Ids
    eos_token_id: Ids
    pad_token_id: Ids
    is_encoder_decoder: bool | None


# ------------------------------------------------------------------------------------ sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, GGUF's too


def sentencepiece_proto(pieces, prefix, ids, table=None):
    """The bytes of a tokenizer.model: a protobuf ModelProto, written without a schema.

    pieces: (text, score, kind) of each id. prefix: whether a space goes before every text.
    ids: of unknown, BOS, EOS and padding; -1 for none. table: of a Unigram model, the bytes of its
    normalizer's table of characters; None for a BPE, which leaves characters and spaces as they
    are.
    Source: sentencepiece_model.proto of google/sentencepiece.
    """

    def varint(n):
        if n < 128:
            return bytes([n])
        return bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number, value):
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value % (1 << 64))

    proto = [
        field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind))
        for text, score, kind in pieces
    ]
    # trainer_spec: model_type Unigram or BPE, byte_fallback, and the ids
    trainer = field(3, 2 if table is None else 1) + field(
        35, any(kind == BYTE for _, _, kind in pieces)
    )
    for number, id in enumerate(ids, 40):
        trainer += field(number, id)
    # normalizer_spec: name, table, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = field(1, b"identity") + field(2, table or b"") + field(3, prefix)
    normalizer += field(4, table is not None) + field(5, 1)
    return b"".join([*proto, field(2, trainer), field(3, normalizer)])
