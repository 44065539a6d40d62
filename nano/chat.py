r"""Chat templates: a conversation as text, and the parts of it that the assistant has to produce.

A chat template is a program in Jinja. We run it as transformers runs it, so the text is what the
template makes of the conversation. But each character of the text knows its origin, which is the
template's own text (t below), a message (1, 2, ...), or unknown (nano/traced.py).

    <|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n2 < 3<|im_end|>\n
    ttttttttttttttttttt111ttttttttttttttttttttttttttttttttt22222tttttttttttttt
                                                           ^^^^^^^^^^^^^^^ the target

Two things follow. A name of a control token counts as that token only where all of its characters
are the template's. And an answer is where the characters of its message are. Its target begins
where the prompt for it ends: that is the text of the messages before it, rendered with
add_generation_prompt. It ends with the token that ends its turn.

TEMPLATES are named templates, texts in Jinja under nano/templates. `choose` picks the template of a
model. Tokenizer.render turns its parts into ids.
"""

import functools
import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, chain, takewhile
from os.path import commonprefix
from pathlib import Path

import jinja2
import jinja2.meta

from nano.config import UserError
from nano.traced import (
    FIRST,
    TEMPLATE,
    UNKNOWN,
    Looked,
    Opaque,
    check_jinja,
    jinja,
    joined,
    literal,
    traced,
)

JINJA = Path(__file__).parent / "templates"
# The named templates, each with the tokens that the vocabulary must have.
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "zephyr": (),
    "alpaca": (),
    "columns": (),
    "plain": (),
}
# These are for data of our own: other programs have no use for them, so no model is saved with one.
PRIVATE = ("columns", "plain")
ROLES = ("system", "user", "assistant", "tool")


class NotFollowed(UserError):
    """A conversation that the chat template cannot lay out so that its targets are known.

    .reason: the same without the number of the message.
    """

    def __init__(self, reason, message=None, advice=""):
        number = "" if message is None else f"message {message + 1}: "
        super().__init__(number + reason + advice)
        self.reason = reason
        self.message = message


# ----------------------------------------------------------------------------------- conversations

THOUGHTS = ("reasoning_content", "thinking")  # two names of one field; a template reads one of them
# What a template may print in an answer that has no thought. White space belongs to it where it
# stands on lines of its own.
EMPTY_THOUGHT = re.compile(r"<(\w+)></\1>|<(\w+)>\s+</\2>|\[THINK\]\[/THINK\]")
SPACE = re.compile(r"\s*")
WORDS = re.compile(r"\S\s+\S|\w | \w")  # what makes text prose
# Messages to try a template on, by the letters of their roles; c is an answer that calls a tool.
TRIAL = {
    "s": {"role": "system", "content": "\ue000"},
    "u": {"role": "user", "content": "\ue001"},
    "a": {"role": "assistant", "content": "\ue002"},
    "c": {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "abcdefghi",
                "function": {"name": "f", "arguments": {"x": "\ue002"}},
            }
        ],
    },
    "t": {"role": "tool", "content": "\ue003", "name": "f", "tool_call_id": "abcdefghi"},
}


def trial(letters):
    return [TRIAL[letter] for letter in letters]


class ChatTemplate:
    """A chat template in Jinja. `parts` lays out a conversation.

    source: the template. tokens: {"bos_token": text, ...}. added: the names of the added tokens.
    stops: those of them that end an answer by generation_config.json. name: of TEMPLATES.

    .stops      names of the tokens at which an answer ends by the template, EOS or `stops`
    .control    names of the tokens that the template prints outside of answers
    .broken     why the template lays out nothing, or None
    """

    def __init__(self, source, tokens, added, stops=(), name=None):
        check_jinja()
        self.name = name
        longest_first = sorted(added, key=len, reverse=True)
        self.token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # What ends a last answer that the template leaves open: one without and one with calls.
        self.closing = dict.fromkeys((False, True), next(iter(stops), None))
        self.stops = {*stops, tokens.get("eos_token")} - {None}
        self.ends = {*self.stops}  # and those of an answer that is not the last
        self.headers = {}  # whether there are tools -> what `header` returns
        self.shapes = {}  # shape of a text -> where its answers are
        self.placings = {}  # roles of a conversation -> what `placing` returns
        self.control = set()
        self.broken = None
        try:
            self.template = jinja(source)
        except (jinja2.TemplateError, RecursionError) as error:
            self.broken = f"the chat template is no valid Jinja ({error})"
            return
        self.variables = {**self.template.globals, "documents": None}
        self.variables |= {key: literal(token) for key, token in tokens.items()}
        for closed, followed in (("ua", "uau"), ("uc", "uct")):
            self.learn_ends(trial(closed), trial(followed), stops)
        for letters in ("uau", "suau", "uctau"):
            self.learn_control(trial(letters))

    # ---- what the template prints

    def render(self, messages, generation=False, tools=None, opening=None):
        """The Traced text of a conversation, letter for letter that of apply_chat_template.

        opening: the name of the first column of the answer that the text asks for.
        NotFollowed where the template fails.
        """
        talk = [self.entry(message, chr(FIRST + n)) for n, message in enumerate(messages)]
        return self.printed(talk, generation, tools, opening)

    def printed(self, talk, generation, tools=None, opening=None):
        """What the template makes of messages as `entry` gives them."""
        if self.broken:
            raise NotFollowed(self.broken)
        values = {
            **self.variables,
            "messages": talk,
            "tools": traced(tools, UNKNOWN),
            "add_generation_prompt": generation,
        }
        if opening:
            values["opening"] = traced(opening, UNKNOWN)
        environment = self.template.environment
        try:  # what template.render does, without a copy of the globals
            context = environment.context_class(environment, values, None, self.template.blocks)
            return joined(self.template.root_render_func(context))
        except Exception as error:  # of any kind: a template is a foreign program
            reason = f"{error}".strip().rstrip(".") or type(error).__name__
            raise NotFollowed(
                f"the chat template does not take this conversation ({reason:.200})"
            ) from None

    def entry(self, message, mark):
        """A message as the template gets it."""
        entry = {
            key: literal(value) if key == "role" else traced(value, mark)
            for key, value in message.items()
        }
        if len(entry) == 2:
            return entry
        if "columns" in message:  # names of columns are the data's, and no part of an answer
            pairs = zip(message["columns"], entry["columns"], strict=True)
            entry["columns"] = [[traced(name, UNKNOWN), text] for (name, _), (_, text) in pairs]
        for key in THOUGHTS:
            if entry.get(key):
                entry |= dict.fromkeys(THOUGHTS, entry[key])
        return entry

    def placing(self, messages, generation):
        """(origins, pieces) of the text of a conversation, as in lay_out, for a template that only
        places the contents: it lays out all conversations of equal roles alike.

        None where the template looks at a content, and where it may trim one.
        """
        for message in messages:
            content = message["content"]
            if [*message] != ["role", "content"] or not content or content != content.strip():
                return None
        key = (generation, *[message["role"] for message in messages])
        if key not in self.placings:
            if len(self.placings) > 10_000:
                self.placings.clear()
            self.placings[key] = self.place(messages, generation)
        return self.placings[key]

    def place(self, messages, generation):
        """What `placing` returns, from a rendering of messages of unknown contents."""
        talk = [
            {"role": literal(message["role"]), "content": Opaque([n])}
            for n, message in enumerate(messages)
        ]
        try:
            text = Opaque([]) + self.printed(talk, generation)
        except (NotFollowed, Looked):
            return None
        marks = [chr(FIRST + n) for n in range(len(messages))]
        once = joined(traced("x", marks[p]) if isinstance(p, int) else p for p in text.parts)
        origins, _, pieces = stretches(once, len(messages))
        places = "".join(origins).replace(TEMPLATE, "")
        apart = places == once.origin.replace(TEMPLATE, "")  # two that touch are one stretch
        return (origins, pieces) if apart and {*places} == {*marks} else None

    def lay_out(self, messages, generation=False, tools=None, learned=None, empty_thought=False):
        """The Layout of a conversation.

        learned: the numbers of the messages that are targets, by default all answers.
        empty_thought: the empty thought that a template prints is a target too.
        NotFollowed where the template leaves out a message, or where a target is not found. With
        generation, the text is a prompt, and answers in it need no targets.
        """
        if self.name not in ("alpaca", "columns"):
            messages = [m if len(m) == 2 else standard(m) for m in messages]
        learned = {*answers_of(messages)} if learned is None else learned
        if placing := None if tools else self.placing(messages, generation):
            origins, pieces = placing
            texts = [
                piece if origin == TEMPLATE else messages[ord(origin) - FIRST]["content"]
                for origin, piece in zip(origins, pieces, strict=True)
            ]
            plain = "".join(texts)
            starts = [0, *accumulate(map(len, texts))]
        else:
            text = self.render(messages, generation, tools)
            plain = str.__str__(text)
            origins, starts, pieces = stretches(text, len(messages))
            check_whole(messages, pieces)
        # Where the answers are depends on the template's own text. Templates look into contents for
        # thoughts and switches such as /no_think, too.
        flags = [
            message["role"] + "?" * ("think" in (message.get("content") or ""))
            for message in messages
        ]
        shape = (*pieces, *flags, *learned, bool(tools), empty_thought, generation)
        if shape not in self.shapes:
            if len(self.shapes) > 10_000:
                self.shapes.clear()
            if placing:
                text = self.render(messages, generation)
            needed = set() if generation else learned
            places = self.places(messages, text, tools, needed, empty_thought)
            index = functools.partial(index_of, starts)
            self.shapes[shape] = [
                (n, index(a), rest, index(b), stop) for n, a, rest, b, stop in places
            ]
        targets = []
        closing = None
        for n, (i, skipped), rest, (j, taken), stop in self.shapes[shape]:
            begin = starts[i] + skipped
            end = starts[j] + taken
            if rest and plain.startswith(rest, begin):
                begin += len(rest)  # the prompt says already how the answer begins
                shape = (*shape, n)
            if n in learned and not generation:
                check_answer(messages[n], plain[begin:end], n, n + 1 == len(messages))
            targets.append((n, begin, end))
            closing = stop
        return Layout(plain, origins, starts, targets, closing, shape)

    def parts(self, *request, **options):
        """[(text, own, target), ...] of what lay_out takes: see Layout.parts."""
        return self.lay_out(*request, **options).parts()

    # ---- where the answers are

    def places(self, messages, text, tools, needed, empty_thought):
        """[(n, begin, rest, end, stop), ...] of the answers: what `begin` and `end` return.

        NotFollowed where one of the answers `needed` has no place.
        """
        places = []
        border = 0
        for n in answers_of(messages):
            try:
                begin, rest = self.begin(messages, text, n, tools)
                if not empty_thought:
                    begin, rest = skip_empty_thought(text, begin, rest)
                end, stop = self.end(messages, text, n, begin, tools)
                if begin < border:
                    raise NotFollowed("the chat template joins this answer with the one before", n)
            except NotFollowed:
                if n in needed:
                    raise
                continue
            border = end
            places.append((n, begin, rest, end, stop))
        return places

    def begin(self, messages, text, n, tools):
        """(where in `text` the target of message n begins, how the prompt for it goes on).

        The prompt goes on where it says how the answer has to begin, as with <think>.
        """
        first = text.origin.find(chr(FIRST + n))
        who, at = anchor(text, n, len(text) if first < 0 else first)
        until = first
        if first < 0:
            later = (text.origin.find(chr(FIRST + i), at) for i in range(n + 1, len(messages)))
            until = min((place for place in later if place >= 0), default=len(text))
        begin = -1
        rest = ""
        try:
            columns = messages[n].get("columns")
            prompt = self.render(messages[:n], True, tools, columns and columns[0][0])
        except NotFollowed:  # as of no messages at all
            pass
        else:
            asker, place = anchor(prompt, n, len(prompt))
            if asker == who:
                begin = at + self.common(prompt[place:], text[at:until])
                rest = str.__str__(prompt)[place + begin - at :]
        # Some templates do not ask for an answer behind a tool's result, but begin it in that way.
        header, lead = self.header(tools)
        find = text.find if first < 0 else text.rfind
        whole = find(header, at, until) if header else -1
        if whole >= 0 and whole + len(header) > begin:
            begin = whole + len(header)
            rest = ""
        elif whole < 0 and header and lead not in text[at : max(at, begin)]:
            partly = find(lead, max(at, begin), until)
            if partly >= 0:
                begin = partly + self.common(header, text[partly:until])
                rest = ""
        if begin < 0 or (rest.split() and rest.split()[:1] == text[begin:until].split()[:1]):
            raise NotFollowed("the chat template does not begin this answer as it asks for one", n)
        return begin, rest if begin == first else ""

    def end(self, messages, text, n, begin, tools):
        """(where the target of message n ends, the token to add where the template has none).

        It ends behind the first token after the answer's characters that ends an answer.
        """
        mark = chr(FIRST + n)
        _, lead = self.header(tools)
        spans = [match.span() for match in re.finditer(f"{mark}+", text.origin)]
        # A result may repeat the name of the call. So the answer's characters may go on later.
        for after in [stop for _, stop in spans][::-1] or [begin]:
            start = max(begin, after)
            end = next((m.end() for m in self.control_tokens(text, start) if m[0] in self.ends), 0)
            foreign = re.search(f"[^{TEMPLATE}{UNKNOWN}{mark}]", text.origin[begin:end])
            crossed = lead and lead not in self.ends and lead in text[start:end]
            if end and not foreign and not crossed:
                break
        else:
            start = max([begin, *(stop for _, stop in spans)])
            closing = self.closing[bool(messages[n].get("tool_calls"))]
            ended = any(match[0] in self.ends for match in self.control_tokens(text, start))
            if n + 1 < len(messages) or ended or not closing:
                raise NotFollowed("the chat template has no token that ends this answer", n)
            return len(text), closing
        calls = messages[n].get("tool_calls") or ()
        names = {name for call in calls for name in (call.get("id"), call["function"]["name"])}
        if {str.__str__(text)[a:b] for a, b in spans if a >= end} - names:
            raise NotFollowed("the chat template prints this answer in several places", n)
        return end, None

    def answers_in(self, text):
        """[(begin, end), ...] of the targets in a text that the template has rendered.

        UserError where the template does not print what asks for an answer.
        """
        header, _ = self.header(None)
        if not header:
            raise UserError(
                "the chat template prints nothing that asks for an answer, so none is found in "
                "rendered text: name what stands before answers, response_template="
            )
        spans = []
        end = 0
        while (at := text.find(header, end)) >= 0:
            begin = at + len(header)
            ends = (m.end() for m in self.token.finditer(text, begin) if m[0] in self.ends)
            end = next(ends, len(text))
            spans.append((begin, end))
        return spans

    def common(self, a, b):
        """The length of what both texts begin with, in whole tokens, and empty thoughts of a."""
        length = len(commonprefix([str.__str__(a), str.__str__(b)]))
        wholes = chain(EMPTY_THOUGHT.finditer(a), self.token.finditer(a), self.token.finditer(b))
        halves = (m.start() for m in wholes if m.start() < length < m.end())
        return min(halves, default=length)

    def header(self, tools):
        """(what the template prints to ask for an answer, the token or text that opens it)."""
        key = bool(tools)
        if key not in self.headers:
            try:
                told, asked = (self.render(trial("u"), ask, tools) for ask in (False, True))
                header = str.__str__(asked)[self.common(told, asked) :]
            except NotFollowed:
                header = ""
            match = self.token.match(header)
            self.headers[key] = header, match[0] if match else header
        return self.headers[key]

    def control_tokens(self, text, start=0):
        """The matches of the tokens in the template's own text."""
        for match in self.token.finditer(text, start):
            if is_literal(text, match):
                yield match

    # ---- what is learned of a template at the start

    def learn_ends(self, closed, followed, stops):
        """Adds the tokens that end the answer of `closed`, and of `followed` by a message."""
        _, lead = self.header(None)
        try:
            alone, inner = (self.render(talk) for talk in (closed, followed))
        except NotFollowed:
            return
        alone, inner = (text[text.rfind("\ue002") + 1 or len(text) :] for text in (alone, inner))
        shared = self.token.findall(alone, 0, self.common(alone, inner))
        shared = [*takewhile(lambda token: token != lead, shared)]
        last, within = (
            self.token.findall(tail, 0, len(tail) - len(tail.origin.lstrip(TEMPLATE)))
            for tail in (alone, inner)
        )
        known = [token for token in within if token in self.stops]
        if known and known[0] not in last:  # the token that opens the next message ends the answer
            self.closing["tool_calls" in closed[-1]] = known[0]
        elif shared:
            known = [token for token in shared if token in self.stops]
            self.stops.add((known or shared[-1:])[0])
        elif last:
            self.stops.add(last[0])
            self.ends |= {*within[:1]} if len(within) > 1 else set()
        self.ends |= self.stops

    def learn_control(self, talk):
        """Adds the tokens that the template prints outside of the answers of `talk`.

        Those that a default system prompt names in its prose are left out.
        """
        try:
            parts = self.parts(talk, empty_thought=True)
        except NotFollowed:
            return
        for text, own, target in parts:
            if own and target is None:
                pieces = re.split(f"({self.token.pattern})", text)
                prose = [at for at, piece in enumerate(pieces) if WORDS.search(piece)]
                if prose:
                    del pieces[prose[0] : prose[-1] + 1]
                self.control |= {piece for piece in pieces if self.token.fullmatch(piece)}


@dataclass
class Layout:
    """A conversation's text and where its answers are in it."""

    text: str
    origins: list  # of the stretches of one origin
    starts: list  # where they start, and where the text ends
    targets: list  # [(number of the message, begin, end), ...]
    closing: str | None  # the token to add where the template leaves the last answer open
    shape: tuple  # what is equal here is equal in layouts of equal shape: the template's own text

    def parts(self):
        """[(text, own, target), ...]: the stretches of the text, one after another.

        own: the text is the template's, so names of tokens are tokens in it.
        target: the number of the message whose target the text belongs to, or None.
        """
        borders = {}
        for n, begin, end in self.targets:
            borders |= {begin: n, end: None}
        edges = sorted(borders)
        parts = []
        target = None
        for origin, start, stop in zip(self.origins, self.starts, self.starts[1:], strict=False):
            while edges and edges[0] < stop:
                edge = edges.pop(0)
                if edge > start:
                    parts.append((self.text[start:edge], origin == TEMPLATE, target))
                target = borders[edge]
                start = edge
            parts.append((self.text[start:stop], origin == TEMPLATE, target))
        return [*parts, (self.closing, True, self.targets[-1][0])] if self.closing else parts


def standard(message):
    """A message without the keys that are ours alone: its input goes into its content."""
    rest = {k: value for k, value in message.items() if k not in ("input", "columns", "weight")}
    if message.get("input"):
        rest["content"] += "\n\n" + message["input"]
    return rest


def answers_of(messages):
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def thought_of(message):
    """The thought of an answer, without outer whitespace; "" where it has none."""
    for key in THOUGHTS:
        if message.get(key):
            return message[key].strip()
    inside, mark, _ = (message.get("content") or "").partition("</think>")
    return inside.rpartition("<think>")[2].strip() if mark else ""


def skip_empty_thought(text, begin, rest):
    """The same place, or behind the empty thought that the template prints there."""
    for match in EMPTY_THOUGHT.finditer(text):
        opened = SPACE.match(text, begin).end() >= match.start()
        if opened and begin < match.end() and is_literal(text, match):
            if not match[2]:
                return match.end(), ""
            stop = SPACE.match(text, match.end()).end()
            origin = text.origin[match.end() : stop]
            return stop - len(origin.lstrip(TEMPLATE)), ""
    return begin, rest


def anchor(text, n, end):
    """(which of the first n messages has the last characters before `end`, where they end).

    (-1, 0) where none has any.
    """
    places = ((text.origin.rfind(chr(FIRST + i), 0, end) + 1, i) for i in range(n))
    place, who = max(places, default=(0, -1))
    return (who, place) if place else (-1, 0)


def check_whole(messages, origins):
    """NotFollowed where a message that says something has no characters in the text."""
    for n, message in enumerate(messages):
        if chr(FIRST + n) in origins:
            continue
        text = (message.get("content") or "").strip()
        if text or message.get("tool_calls"):
            what = f"this {message['role']} message" if text else "the calls of this answer"
            raise NotFollowed(f"the chat template leaves out {what}", n)


def check_answer(message, target, n, last):
    """NotFollowed where a target lacks a part of its message.

    That templates leave out the thoughts of earlier answers is meant.
    """
    if len(message) == 2 and target.startswith(message["content"]):  # the usual case, quickly
        return
    if message.get("tool_calls"):
        names = [call["function"]["name"] for call in message["tool_calls"]]
        if any(target.count(name) < names.count(name) for name in names):
            raise NotFollowed("the chat template leaves out calls of this answer", n)
    if (message.get("content") or "").rpartition("</think>")[2].strip() not in target:
        raise NotFollowed("the chat template leaves out text of this answer", n)
    if last and thought_of(message) not in target:
        raise NotFollowed("the chat template leaves out the thought of this answer", n)


def is_literal(text, match):
    return not text.origin[match.start() : match.end()].strip(TEMPLATE)


@functools.cache
def stretch(count):
    """The regex of a stretch of one origin. An alternative for each of `count` messages is many
    times as fast as a back-reference."""
    origins = [TEMPLATE, UNKNOWN, *(chr(FIRST + n) for n in range(count))]
    return re.compile("|".join(f"{origin}+" for origin in origins))


def stretches(text, count):
    """(origins, starts, pieces) of the stretches of one origin in a Traced text.

    starts: the last one is the end of the text. pieces: the template's own texts, and for the
    others their origin. count: the number of messages.
    """
    runs = stretch(count).findall(text.origin)
    origins = [run[0] for run in runs]
    starts = [0, *accumulate(map(len, runs))]
    plain = str.__str__(text)
    pieces = [
        plain[a:b] if origin == TEMPLATE else origin
        for origin, a, b in zip(origins, starts, starts[1:], strict=False)
    ]
    return origins, starts, pieces


def index_of(starts, place):
    """(i, offset): the stretch that starts at the place or last before it, and the way from there.

    The stretch behind the text has the end of the text for its start.
    """
    i = bisect_right(starts, place) - 1
    return i, place - starts[i]


# ---------------------------------------------------------------------------------- which template


def check(messages):
    """The messages as templates need them: the arguments of calls are objects, not JSON text.

    UserError, with its number, for a message that makes the list no conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("a conversation has to be a list of at least one message")
    checked = []
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(
                f"message {n} needs a role, one of {', '.join(ROLES)}: {message!r:.100}"
            )
        if message["role"] == "system" and n > 1:
            raise UserError(
                f"message {n}: a conversation has one system message at most, and it comes first"
            )
        if len(message) != 2 or not isinstance(message.get("content"), str):
            message = check_rest(message, n)
        checked.append(message)
    return checked


def check_rest(message, n):
    """A message with more than a role and text, as `check` returns it."""
    calls = message.get("tool_calls")
    if calls:
        message = message | {"tool_calls": [call_of(call, n) for call in calls]}
    content = message.get("content")
    if content is None and calls and message["role"] == "assistant":
        content = ""
    pairs = message.get("columns") or []
    texts = [content, *chain.from_iterable(pairs)]
    texts += [message[key] for key in ("input", *THOUGHTS) if message.get(key) is not None]
    if not all(isinstance(text, str) for text in texts) or {*map(len, pairs)} - {2}:
        raise UserError(
            f"message {n} needs text as its content "
            f"(and input, and columns of [name, text]): {message!r:.100}"
        )
    return message


def call_of(call, n):
    """A tool call of message n whose arguments are an object. UserError for what is no call."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"message {n}: a tool call needs a function with a name and arguments: {call!r:.100}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise UserError(
                f"message {n}: arguments that are no JSON: {arguments!r:.100}"
            ) from None
    if not isinstance(arguments, dict):
        raise UserError(f"message {n}: the arguments of a call are no object: {arguments!r:.100}")
    try:
        json.dumps(arguments, allow_nan=False)
    except ValueError:
        raise UserError(
            f"message {n}: arguments with NaN or Infinity, which are no JSON: {arguments!r:.100}"
        ) from None
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def in_jinja(name, marks):
    """The template `name` of TEMPLATES in Jinja.

    The files are fixed: a model that was saved with one is known by its text.
    marks: {"bos", "eos", "first", "prompt_end"} -> the texts of these tokens. first: the BOS that
    comes before all texts. A template that prints BOS by itself has no use for it. prompt_end: the
    EOS that closes an encoder's prompt.
    """
    source = template_file(name)
    if marks["first"] and "{bos}" not in source:
        source = "{{- '{first}' }}" + source
    for mark, token in marks.items():
        source = source.replace(f"{{{mark}}}", token)
    return source


def takes_bos(layout):
    """Whether BOS opens texts: without a template, or with a named one that does not print it."""
    return layout is None or (layout.name is not None and "{bos}" not in template_file(layout.name))


def template_file(name):
    return (JINJA / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def with_options(source, options):
    """`source` with values for variables that it reads, where the caller gives no others.

    options: ["name=value", ...]; a value is JSON, or else text.
    UserError for a name that the template does not read, and for one that is given twice.
    """
    try:
        read = jinja2.meta.find_undeclared_variables(jinja(source).environment.parse(source))
    except jinja2.TemplateError:
        return source  # ChatTemplate says so
    lines = ""
    names = [option.partition("=")[0] for option in options]
    for option in options:
        name, _, value = option.partition("=")
        if names.count(name) > 1:
            raise UserError(f"template_options: '{name}' is given twice: leave one out")
        try:
            value = json.loads(value)
        except ValueError:
            pass
        if name not in read:
            raise UserError(
                f"template_options: the chat template reads no '{name}'; "
                f"it reads {', '.join(sorted(read))}"
            )
        value = "none" if value is None else json.dumps(value)  # JSON's true is also Jinja's
        lines += f"{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
    # trim_blocks takes the line break away
    return f"{lines}\n{source}" if lines else source


def choose(key, own, marks, added, build, options=()):
    """(name, ChatTemplate, Jinja) of a chat template. Each is None where there is none.

    key: a name, a template in Jinja, or None for `own`. own: the directory's own template in Jinja,
    or None. marks: as in in_jinja. added: the names of the added tokens.
    build: a function from (Jinja, name or None) to the ChatTemplate. options: as in with_options.
    UserError for an unknown name, and for a template whose tokens the vocabulary lacks.
    """
    if key and "{" in key:
        own = key
        key = None
    name = template = None
    if own and key not in PRIVATE:
        public = [
            name for name in TEMPLATES if name not in PRIVATE and not lacking(name, marks, added)
        ]
        name = next((name for name in public if own == in_jinja(name, marks)), None)
        own = with_options(own, options)
        template = build(own, name)
        name = name or alike(template, public, marks, build)
    if key not in (None, name, *TEMPLATES):
        raise UserError(f"unknown template '{key}': there are {', '.join(TEMPLATES)}")
    if options and not (template or key):
        raise UserError("template_options: the model has no chat template; name one, template=")
    if key in (None, name):
        return name, template, own
    if lack := lacking(key, marks, added):
        raise UserError(
            f"template={key} needs {', '.join(lack)}, which this tokenizer does not have"
        )
    source = with_options(in_jinja(key, marks), options)
    return key, build(source, key), None if key in PRIVATE else source


def lacking(name, marks, added):
    """The tokens of a named template that the vocabulary lacks."""
    lack = [token for token in TEMPLATES[name] if token not in added]
    return lack or ([] if marks["eos"] else ["EOS"])


def alike(template, names, marks, build):
    """The first of the named templates that lays out a user's turn like `template`, or "model"."""
    turn = user_turn(template)
    same = (
        name for name in names if turn and user_turn(build(in_jinja(name, marks), name)) == turn
    )
    return next(same, "mistral" if "[INST]" in "".join(turn or ()) else "model")


def user_turn(template):
    """What a template prints before and after a user's text, or None."""
    try:
        one, four = (template.render(trial(letters)) for letters in ("u", "uaua"))
    except NotFollowed:
        return None
    user, answer = TRIAL["u"]["content"], TRIAL["a"]["content"]
    pieces = re.split(f"{user}|{answer}", str.__str__(four))
    if len(pieces) != 5 or one.count(user) != 1:
        return None
    return pieces[2].removeprefix(pieces[4]), str.__str__(one).partition(user)[2]
