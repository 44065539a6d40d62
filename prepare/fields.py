"""The fields of a record become messages: what prepare.instructions and prepare.preferences share.

Whoever recognises a record takes the fields that it uses out of it. What is left must be known to
be harmless, or the record is dropped and counted (`check_rest`). So no part of a record that
changes the prompt or the answer is lost silently.

A message is what tok.render takes: {"role", "content"}, and perhaps "input", "columns", "weight",
"reasoning_content", "tool_calls", "name", "tool_call_id".
"""

import json
import re

from nano.records import BadRecord


class Drop(Exception):
    """A record that is in order but gives no rows. It is counted under the exception's text.

    row: (ids, mask) of a record that was rendered before, for show=.
    """

    def __init__(self, reason, row=None):
        super().__init__(reason)
        self.row = row


USERS = "user human prompter customer question"
ASSISTANTS = "assistant ai gpt gpt4 model bot chatbot chatgpt bard bing llm answer"
TOOLS = "tool function observation function_response function_result tool_response tool_result "
TOOLS += "tool_output ipython environment"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(USERS.split(), "user"),
    **dict.fromkeys(ASSISTANTS.split(), "assistant"),
    **dict.fromkeys(TOOLS.split(), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),  # its content is a call
}
SYSTEMS = "system system_prompt system_message system_instruction systemPrompt system_text".split()
TURNS = "messages conversations conversation".split()
THOUGHTS = "reasoning_content reasoning thinking thought thoughts".split()
DEFINITIONS = "tools functions".split()
MEDIA = re.compile(
    r"(images?|videos?|audios?|files?|documents?|attachments?)(_(bytes|url|urls|path|paths))?", re.I
)
# Marks of what is not to be learned, of a message or a record. The first kind means: 1 is learned.
LEARNED = "weight loss loss_mask train training train_on_turn trainable is_trainable learn".split()
LEARNED += ["kto_tag", "desirable"]
MASKED = "mask masked ignore ignored".split()
MARKS = {*LEARNED, *MASKED, "label"}
# Names of fields that a row may do without, after any first words such as prompt_id.
HARMLESS = re.compile(
    r"(.*[_\-. ])?(id|ids|idx|index|no|uid|uuid|guid|hash|md5|sha1|sha256|url|urls|uri|link|links"
    r"|date|time|timestamp|created|updated|created_at|updated_at|create_time|update_time"
    r"|source|sources|dataset|datasets|origin|split|subset|file_?name|lang|language|locale"
    r"|licen[sc]e|author|author_profile|user_name|username|model|models|generator|version"
    r"|domain|domains|category|categories|topic|topics|tag|tags|labels?|task|tasks|task_type"
    r"|task_name|type|kind|level|difficulty|quality|scores?|ratings?|rank|votes|upvotes|likes"
    r"|length|len|tokens|token_count|count|turns|cost|seed|temperature|top_p|finish_reason|logprobs?"
    r"|metadata|meta|extra_info|is_classification|name|tool_call_id|critique|annotations|principle)"
    r"|(num|n)_\w+|__\w+__|(correct|incorrect)_answers|custom_system_prompt"
    r"|most_similar_instructions",
    re.I,
)
LONG = 200  # characters: a longer text is no name, date or label
# What stands between the texts of a rendered row: control tokens, the names of roles and fields,
# the first sentences of Alpaca, punctuation and white space.
HEADERS = f"{' '.join(ROLES)} {USERS} {ASSISTANTS} instruction input context prompt query request "
HEADERS += "response output completion inst sys bos eos"
HEADER = re.compile(
    rf"<[^<>\s]+>|({'|'.join(HEADERS.split())}|[qa](?=:))(?![^\W_])"
    r"|below is an instruction that describes a task"
    r"(, paired with an input that provides further context)?\."
    r"\s+write a response that appropriately completes the request\."
    r"|[\W_]",
    re.I,
)


def message(role, content, **more):
    """A message as tok.render takes it."""
    return {"role": role, "content": content, **more}


def is_empty(value):
    """Whether a field holds nothing: null, NaN, blank text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in ("[]", "{}")
    return value is None or value == [] or value == {} or value != value


def text(record, key):
    """The text in a field of a record, which is taken out; BadRecord when there is none."""
    if key not in record:
        raise BadRecord(f"field '{key}' is missing")
    value = record.pop(key)
    if isinstance(value, str):
        return value
    raise BadRecord(f"field '{key}' is {type(value).__name__} and not text")


def first(record, keys):
    """The first of `keys` whose field holds something, or None."""
    for key in keys:
        if key in record and not is_empty(record[key]):
            return key
    return None


def without(value, ignored):
    """A record without its nulls and the fields `ignored`, those of its messages included.

    A table has nulls in the fields that a record does not use.
    """
    record = value.copy()
    if None in record.values():
        record = {key: item for key, item in value.items() if item is not None}
    if not ignored:
        return record
    record = {key: item for key, item in record.items() if key not in ignored}
    for key, items in record.items():
        if isinstance(items, list):
            record[key] = [without(x, ignored) if isinstance(x, dict) else x for x in items]
    return record


def names_in(record, names):
    """Those of `names` that a record, or a message in it, has as a field. A set."""
    there = {*record}
    for items in record.values():
        if isinstance(items, list):
            there.update(key for item in items if isinstance(item, dict) for key in item)
    return there.intersection(names)


def learned(fields):
    """Whether the answers of a record, or a message, are to be learned. The marks are taken out.

    None where nothing says so. BadRecord for a mark that is neither 0 nor 1.
    """
    said = None
    values = {"0": False, "false": False, "1": True, "true": True}
    marks = [key for key in fields if key.lower() in MARKS]
    for key in marks:
        value = fields[key]
        if is_empty(value) or (key.lower() == "label" and not isinstance(value, bool)):
            continue
        del fields[key]
        number = isinstance(value, (int, float)) and value in (0, 1)
        word = str(int(value)) if number else str(value).lower()
        if word not in values:
            raise BadRecord(
                f"field '{key}' says whether a turn is learned and is {value!r:.40}, neither 0 nor "
                f"1: write one of them, or leave the field out with ignore=[{key}]"
            )
        mark = values[word] != (key.lower() in MASKED)
        said = mark if said is None else said and mark
    return said


def strings(value):
    """All texts in a field; None stands for any other value in it."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif not is_empty(value):
        yield value if isinstance(value, str) else None


def check_rest(rest, texts, what="field"):
    """Drop for fields that are left of a record, or of a message, unless they may be lost.

    These are empty or known to be harmless, or copies of `texts`, the texts of the row.
    """
    left = []
    texts = [text.strip() for text in texts if text and text.strip()]
    for key, value in rest.items():
        if is_empty(value):
            continue
        name = isinstance(value, str) and len(value) > LONG
        if HARMLESS.fullmatch(key) and not name:
            continue
        found = [*strings(value)]
        if texts and isinstance(value, str) and is_rendered(value, texts):
            continue
        if not isinstance(value, str):  # copies of messages, perhaps
            found = [x for x in found if x is None or x.strip().lower() not in ROLES]
        if None in found or any(x.strip() not in texts for x in found):
            left.append(key)
    if left:
        names = f"{', '.join(sorted(left)):.100}"
        media = any(MEDIA.fullmatch(key) for key in left)
        hint = "text alone is rendered" if media else "ignore= names those that may be lost"
        raise Drop(f"{what}s without a place in the row: {names} ({hint})")


def is_rendered(value, texts):
    """Whether a field holds all texts of the row, and nothing else but HEADER between them."""
    if not all(text in value for text in texts):
        return False
    at = 0
    while at < len(value):
        # the longest, because a text may begin with a header, and a header with a text
        header = HEADER.match(value, at)
        lengths = [len(text) for text in texts if value.startswith(text, at)]
        length = max([*lengths, header.end() - at if header else 0])
        if not length:
            return False
        at += length
    return True


def texts_of(messages):
    """All texts of messages, for check_rest."""
    for m in messages:
        yield m["content"]
        yield m.get("input")
        yield m.get("reasoning_content")
        for _, part in m.get("columns") or ():
            yield part


def system(record):
    """[the message of the record's system prompt], or [] where it has none."""
    if record.keys().isdisjoint(SYSTEMS):
        return []
    keys = [key for key in SYSTEMS if key in record and not is_empty(record[key])]
    prompts = [text(record, key) for key in keys]
    if len({*prompts}) > 1:
        raise Drop("two system prompts")
    return [message("system", prompts[0])] if prompts else []


def after_system(before, messages):
    """`messages` behind the system prompt of a record, which may stand in them too."""
    if before and messages and messages[0]["role"] == "system":
        if messages[0]["content"] != before[0]["content"]:
            raise Drop("two system prompts")
        return messages
    return before + messages


def history(record):
    """The messages of the rounds before a question, [[question, answer], ...] or messages."""
    if "history" not in record:
        return []
    rounds = record.pop("history")
    if is_empty(rounds):
        return []
    if isinstance(rounds, list) and all(isinstance(item, dict) for item in rounds):
        return turns(rounds)
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in rounds
    ):
        raise BadRecord("'history' is not a list of [question, answer]")
    pairs = [(message("user", ask), message("assistant", reply)) for ask, reply in rounds]
    return [m for pair in pairs for m in pair]


def question(record, key):
    """Messages of the system prompt, the history, and the question in the field `key`.

    The question ends with the record's context and input.
    """
    before = after_system(system(record), history(record))
    ask = text(record, key)
    more = [name for name in ("context", "input") if name != key and name in record]
    more = [[name.upper(), text(record, name)] for name in more]
    more = [[name, part] for name, part in more if part.strip()]
    if key == "instruction":
        user = message("user", ask)
        if more:
            user["input"] = "\n\n".join(part for _, part in more)
    else:
        columns = [[key.upper(), ask], *more]
        user = message("user", "\n\n".join(part for _, part in columns), columns=columns)
    return [*before, user]


def definitions(record):
    """The definitions of tools in a record, a list of objects, or None where it has none."""
    key = first(record, DEFINITIONS)
    if key is None:
        return None
    tools = parsed(record.pop(key))
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Drop("tools that are no list of definitions")
    tools = [tool if "function" in tool else dict(type="function", function=tool) for tool in tools]
    return tools


def parsed(value):
    """The value of a JSON text; other values, and other texts, as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def calls_of(value):
    """Calls of tools in the form [{"type": "function", "function": {"name", "arguments"}}].

    value: one call or a list of calls, in that form or as {"name", "arguments"}, perhaps as JSON.
    """
    value = parsed(value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = parsed(call)
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Drop("a tool call without a name")
        arguments = parsed(inner.get("arguments", inner.get("parameters", {})))
        function = {"name": inner["name"], "arguments": arguments}
        known = ("name", "arguments", "parameters", "function", "type", "id", "index")
        extra = {key: x for part in (call, inner) for key, x in part.items() if key not in known}
        check_rest(extra, (), "field of a tool call, or field")
        more = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", **more, "function": function})
    return calls


def content_of(item):
    """(text, thought) of a message's content, a text or a list of parts, which is taken out."""
    key = "content" if "content" in item else "value"
    value = item.get(key)
    if not isinstance(value, list):
        return text(item, key), ""
    del item[key]
    parts, thought = [], ""
    for part in value:
        if not isinstance(part, dict):
            raise BadRecord(f"field '{key}' is a list of something else than parts")
        part = without(part, ())
        kind = part.pop("type", None)
        if kind in ("text", "input_text", "output_text"):
            parts.append(text(part, "text"))
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            thought += part.pop(kind)
        else:
            raise Drop(f"a part of type {kind!s:.30} (text alone is rendered)")
        check_rest(part, parts, "field of a part, or field")
    return "".join(parts), thought


def turn(item):
    """The message of one {role, content} or {from, value}. All of it is taken, or it is a Drop."""
    if not isinstance(item, dict):
        raise BadRecord("a message is not an object with a role and a content")
    item = without(item, ())
    name = text(item, "role" if "role" in item else "from")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise BadRecord(f"unknown role '{name:.40}'; known are {', '.join(ROLES)}")
    more = {}
    for key in ("tool_calls", "function_call"):
        if not is_empty(item.get(key)):
            more["tool_calls"] = more.get("tool_calls", []) + calls_of(item.pop(key))
    if role == "call":
        role = "assistant"
        more["tool_calls"] = calls_of(content_of(item)[0])
        content = ""
    elif more and is_empty(item.get("content", item.get("value"))):
        content = None
    else:
        content, thought = content_of(item)
        if thought:
            more["reasoning_content"] = thought
    if role == "assistant" and (key := first(item, THOUGHTS)):
        more["reasoning_content"] = text(item, key)
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if not is_empty(item.get(key)):
                more[key] = text(item, key)
    elif not is_empty(item.get("name")):
        raise Drop("a speaker's name beside a message")
    mark = learned(item)
    if mark and role != "assistant":
        raise Drop(f"a turn of the {role} that is marked to be learned")
    if mark is False and role == "assistant":
        more["weight"] = 0
    check_rest(item, (content, more.get("reasoning_content")), "field of a message, or field")
    return message(role, content, **more)


def turns(items):
    """Messages of a list of {role, content} or {from, value}."""
    if not isinstance(items, list) or not items:
        raise BadRecord("the conversation is not a list of messages")
    return [turn(item) for item in items]


def task(columns, name, answer):
    """Two messages: a question in parts, columns [[name, part], ...], and its answer of that name.

    The template "columns" lays the parts out under their names. Other templates take them joined.
    """
    columns = [[column, part] for column, part in columns if part]
    question = "\n\n".join(part for _, part in columns)
    return [
        message("user", question, columns=columns),
        message("assistant", answer, columns=[[name, answer]]),
    ]


def has_answers(messages):
    return any(m["role"] == "assistant" for m in messages)


def says_nothing(m):
    """Whether a message is the assistant's and empty: no text, no thought, no call."""
    return m["role"] == "assistant" and not (
        (m["content"] or "").strip() or m.get("tool_calls") or m.get("reasoning_content")
    )
