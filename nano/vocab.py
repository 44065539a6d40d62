"""What tokenizer files are made of, without a tokenizer: the regexes that split text before its
merges, the stand-ins of bytes, a byte-level tokenizer.json and sentencepiece's tokenizer.model."""

import struct

# ----------------------------------------------------------------------------------- pre-tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# single digits are split off first, so that the spaces before a digit stay together
DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{CASED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACE}"
)
QWEN = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"{UPPER}*{LOWER}+{CASED}?|{UPPER}+{LOWER}*{CASED}?"
O200K = rf"{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}"

# GPT-2's printable stand-ins for the 256 bytes
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_CHAR = {
    **{byte: chr(byte) for byte in VISIBLE},
    **{byte: chr(256 + i) for i, byte in enumerate(HIDDEN)},
}
CHAR_BYTE = {ord(char): byte for byte, char in BYTE_CHAR.items()}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def pre_tokenizer(pattern):
    """The steps of tokenizer.json that split text by one of the regexes above; one_regex is the
    reverse."""
    if pattern == GPT2:
        return [BYTE_LEVEL]
    if pattern == DIGITS_GPT2:
        return [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, BYTE_LEVEL | {"use_regex": False}]


def one_regex(steps):
    """The single regex with which tiktoken does the work of these pre-tokenizer steps, or None."""
    kinds = [step["type"] for step in steps]
    gpt2 = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and gpt2 and steps[0]["individual_digits"]:
        return DIGITS_GPT2
    if kinds == ["Split", "ByteLevel"] and not gpt2 and "Regex" in steps[0]["pattern"]:
        pattern, how = steps[0]["pattern"]["Regex"], (steps[0]["behavior"], steps[0]["invert"])
        if how == ("Removed", True):
            return pattern
        if how == (
            "Isolated",
            False,
        ):  # keeps what lies between matches, which tiktoken alone would drop
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return None


# ----------------------------------------------------------------------------------- tokenizer.json


def added_token(
    id, content, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False, **_
):
    """An added token, as tokenizer.json lists them."""
    return {
        "id": id,
        "content": content,
        "single_word": single_word,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": normalized,
        "special": special,
    }


def added_tokens_decoder(added):
    """The entry of that name in tokenizer_config.json."""
    return {str(a["id"]): {key: a[key] for key in a if key != "id"} for a in added}


def byte_level_json(vocab, merges, added, pattern=GPT2, nfc=False, bos=None, ignore_merges=False):
    """The dict of a byte-level BPE's tokenizer.json.

    vocab: {token: id}; merges: "left right" each; added: of added_token. bos: a token to put before
    every text.
    nfc: text is normalized. ignore_merges: a piece that is a token is taken whole."""
    post = None
    if bos:
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
        post = {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, b],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer(pattern)},
        "post_processor": post,
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


# ------------------------------------------------------------------------------------ sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, GGUF's too


def sentencepiece_proto(pieces, prefix, unk=0, bos=None, eos=None, pad=None):
    """The bytes of a BPE's tokenizer.model, a protobuf of pieces (1), trainer (2) and normalizer
    (3) settings.

    pieces: (text, score, kind) each. prefix: whether a space goes before every text. unk, bos, eos,
    pad: ids."""

    def varint(n):
        head = b""
        while n > 127:
            head, n = head + bytes([n & 127 | 128]), n >> 7
        return head + bytes([n])

    def field(number, value):
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value % (1 << 64))

    out = [
        field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind))
        for text, score, kind in pieces
    ]
    # model_type BPE, byte_fallback
    trainer = field(3, 2) + field(35, any(kind == BYTE for _, _, kind in pieces))
    for number, id in ((40, unk), (41, bos), (42, eos), (43, pad)):
        trainer += field(number, -1 if id is None else id)
    # name, add_dummy_prefix, no remove_extra_whitespaces, escape_whitespaces
    normalizer = field(1, b"identity") + field(3, prefix) + field(4, 0) + field(5, 1)
    return b"".join([*out, field(2, trainer), field(3, normalizer)])
