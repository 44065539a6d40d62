"""Tokenizer files to write: a byte-level BPE's tokenizer.json and its parts."""

from nano.vocab import DIGITS_GPT2, GPT2

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def pre_tokenizer(pattern):
    """The list of steps in tokenizer.json that split text by `pattern`, a regex of nano.vocab.

    nano.vocab.one_regex is the reverse.
    """
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


def added_tokens_decoder(added):
    """The entry `added_tokens_decoder` of tokenizer_config.json, as a dict.

    added: list of what nano.vocab.added_token returns.
    """
    return {str(a["id"]): {key: a[key] for key in a if key != "id"} for a in added}


def byte_level_json(vocab, merges, added, pattern=GPT2, nfc=False, bos=None, ignore_merges=False):
    """The content of tokenizer.json for a byte-level BPE, as a dict.

    vocab: {token: id}. merges: list of "left right". added: list of what added_token returns.
    pattern: a regex of nano.vocab that splits text. nfc: whether text is normalized first.
    bos: the token that goes before every text, or None. ignore_merges: a piece of text that is a
    token is taken whole.
    """
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
