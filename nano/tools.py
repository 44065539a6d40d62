"""Tools: definitions, calls and results in a conversation, and calls read from an answer.

A chat template that knows tools lays them out in its own way. For all others `spelled` writes them
into the texts of the messages, in the tags of Hermes models:

    system     ... <tools>\\na definition in JSON on each line\\n</tools> ...
    assistant  <tool_call>\\n{"name": "add", "arguments": {"a": 1, "b": 2}}\\n</tool_call>
    user       <tool_response>\\n3\\n</tool_response>

Definitions and results are parts of a prompt. Calls are answers, so they are learned.
"""

import json
import re
from itertools import groupby
from os.path import commonprefix

from nano.chat import NotFollowed

DEFINITIONS = """\
You can call functions. These are their definitions:
<tools>
{}
</tools>

To call a function, write its name and its arguments as a JSON object between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
Its result comes back between <tool_response> and </tool_response>."""

# What a template is tried with. Its names, its argument and its result are found in the text again.
NAMES = "\ue010", "\ue011"
ARGUMENTS = {"\ue012": "\ue013"}
RESULT = "\ue014"
JSON = re.compile(r'\{\s*"\ue012"\s*:\s*"\ue013"\s*\}')
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {"\ue012": {"type": "string", "description": ""}},
                "required": ["\ue012"],
            },
        },
    }
    for name in NAMES
]
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def call_id(number):
    """Nine letters and digits, as Mistral's templates need them."""
    return f"call{number:05}"


def calling(calls, content=""):
    """The message of an answer with calls, [(name, arguments), ...]."""
    calls = [
        {"type": "function", "id": call_id(i), "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result_of(call, text):
    """The message of the result of a call of `calling`."""
    name = call["function"]["name"]
    return {"role": "tool", "content": text, "name": name, "tool_call_id": call["id"]}


def spelled(messages, tools, system=True):
    """A conversation whose messages are texts alone, with the plain form of all about tools.

    tools: a list of definitions, or None. system: whether the chat template takes a system message.
    Otherwise the definitions open the first message. Results in a row are one turn of the user.
    """
    talk = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            texts = [f"<tool_response>\n{m['content']}\n</tool_response>" for m in group]
            talk.append({"role": "user", "content": "\n".join(texts)})
            continue
        for message in group:
            texts = [message["content"]] if message["content"] else []
            for call in message.get("tool_calls") or ():
                function = {key: call["function"][key] for key in ("name", "arguments")}
                texts.append(f"<tool_call>\n{dumps(function)}\n</tool_call>")
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            talk.append(rest | {"content": "\n".join(texts)})
    if tools:
        text = DEFINITIONS.format("\n".join(map(dumps, tools)))
        if system and talk[0]["role"] != "system":
            talk.insert(0, {"role": "system", "content": text})
        else:
            order = (talk[0]["content"], text) if system else (text, talk[0]["content"])
            talk[0] = talk[0] | {"content": "\n\n".join(part for part in order if part)}
    return talk


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def loosely(text):
    """The pattern of a text in which white space and numbers, which count calls, may differ."""
    parts = re.split(r"(\s+|\d+)", text)
    return "".join(
        re.escape(part) if i % 2 == 0 else r"\d+" if part.isdigit() else r"\s*"
        for i, part in enumerate(parts)
    )


def answer_of(tok, ids):
    """The message of an answer that a model gave, its calls apart from its text."""
    text = tok.decode(ids, skip_special=False, inside=True)
    before, calls = tok.tools.read(text)
    if not calls:
        return {"role": "assistant", "content": tok.decode(ids)}
    return calling(calls, tok.decode_until(ids, [text[len(before) :]])[0])


class Tools:
    """What a chat template (chat.ChatTemplate) makes of tools.

    .definitions, .calls   whether it lays out definitions, and calls with their results
    .system                whether it lays out a system message
    .call                  the pattern of a call up to its arguments, or None for a template whose
                           arguments are no JSON object
    """

    def __init__(self, layout):
        self.layout = layout
        self.lead = ""  # what stands before the first call of an answer alone
        self.definitions = NAMES[0] in self.text([USER], TOOLS, generation=True)
        once = [USER, calling([(NAMES[0], ARGUMENTS)])]
        text = self.text([*once, result_of(once[1]["tool_calls"][0], RESULT)])
        self.calls = "\ue013" in text and RESULT in text
        self.system = RESULT in self.text([{"role": "system", "content": RESULT}, USER, ANSWER])
        twice = [USER, calling([(name, ARGUMENTS) for name in NAMES])]
        answer = next(filter(None, map(self.answer, (twice, once))), "")
        self.learn(answer)

    def text(self, messages, tools=None, generation=False):
        """The text of a conversation, or "" where the template refuses it."""
        try:
            return str.__str__(self.layout.render(messages, generation, tools))
        except NotFollowed:
            return ""

    def answer(self, messages):
        """The target of the last message, or None where the template refuses the conversation."""
        try:
            messages, tools = self.conversation(messages, TOOLS)
            layout = self.layout.lay_out(messages, False, tools)
        except NotFollowed:
            return None
        _, begin, end = layout.targets[-1]
        return layout.text[begin:end]

    def learn(self, answer):
        """Learns the form of calls from an answer that calls NAMES[0], or both of NAMES."""
        places = [answer.find(name) for name in NAMES]
        arguments = [*JSON.finditer(answer)]
        self.call = None
        if not arguments or not 0 <= places[0] < arguments[0].start():
            return
        opening = answer[: places[0]]
        between = answer[places[0] + 1 : arguments[0].start()]
        if len(arguments) > 1:  # what opens only the first call of an answer is no part of the form
            second = answer[arguments[0].end() : places[1]]
            shared = commonprefix([opening[::-1], second[::-1]])[::-1]
            opening, self.lead = shared, opening.removesuffix(shared)
        if not between:  # nothing ends the name
            return
        self.call = re.compile(f"{loosely(opening)}(.{{1,200}}?){loosely(between)}")

    def conversation(self, messages, tools=None):
        """(messages, tools) as the template takes them: as they are, or `spelled`."""
        called = any(message.get("tool_calls") for message in messages)
        if (not tools or self.definitions) and (not called or self.calls):
            return messages, tools
        return spelled(messages, tools, self.system), None

    def read(self, text):
        """(the text before the calls, [(name, arguments), ...]) of an answer.

        text: with the names of control tokens. A call whose arguments are no whole JSON object
        stays text.
        """
        calls = []
        begin = at = 0
        while self.call and (match := self.call.search(text, at)):
            at = match.end()
            try:
                arguments, at = json.JSONDecoder().raw_decode(text, at)
                # Half a character (\ud83d alone) is no text, and NaN is no JSON.
                json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                begin = begin if calls else match.start()
                calls.append((match[1], arguments))
        before = text[:begin] if calls else text
        return before.rstrip().removesuffix(self.lead.rstrip()).rstrip(), calls
