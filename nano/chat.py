"""Chat templates: how a conversation is laid out as text, and what of it the assistant has to produce.

A template is a key of TEMPLATES or the model's own, in Jinja, from which `learn` reads its turns; `choose` finds the one that is
meant. A model that is taught a key's template gets it in Jinja too (`in_jinja`), as other programs read it. Which ids the text
becomes is tokenizer.py's part: Tokenizer.render lays out a conversation and encodes it.
"""

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from nano.config import UserError

# A layout turns (messages, whether to end with the prompt of an answer) into parts (text, fixed, target). Fixed text is
# the template's own, with tokens in it; the rest is the messages'. target: the index of the assistant message that has
# it as target, or None. Neighbours of equal target are encoded as one text, so nothing depends on how it was cut.


@dataclass(frozen=True)
class Turns:
    """A conversation laid out turn by turn; {} stands for a message's content, {bos} and {eos} for these tokens."""

    user: str
    assistant: str  # ends with the token that ends the turn
    generation: str = ""  # how `assistant` begins: the prompt of an answer, all after it is target
    tail: str = ""  # follows an assistant turn, no target
    start: str = ""  # opens a conversation that has no system message
    system: str | None = None
    opened: str | None = None  # the user turn after a system message, where these share a block
    tool: str | None = None
    final: str = ""  # opens the content of an assistant turn that ends the conversation
    # what becomes of a thought, the content up to </think>: "text" like any; "framed" by `final` in such a turn, left out of others
    thoughts: Literal["text", "framed", "refused"] = "text"
    strip: tuple = ()  # roles whose content loses its outer whitespace
    alternate: bool = False  # users and assistants have to take turns
    bos: bool = True  # BOS comes first where the tokenizer puts it before texts
    needs: tuple = ()  # tokens that the vocabulary must have

    def fixed(self):
        return "".join(
            [self.user, self.assistant, self.tail, self.start, self.system or "", self.tool or ""]
        )

    def __call__(self, messages, generation):
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if self.alternate and turns != (["user", "assistant"] * len(turns))[: len(turns)]:
            raise UserError(
                "with this chat template users and assistants have to take turns, the user first"
            )
        parts = [] if roles[0] == "system" else [(self.start, True, None)]
        for n, (role, message) in enumerate(zip(roles, messages, strict=True)):
            content, target = full(message), n if role == "assistant" else None
            shared = self.opened is not None and role == "user" and roles[:n] == ["system"]
            form = self.opened if shared else getattr(self, role)
            if form is None:
                raise UserError(
                    f"message {n + 1}: this chat template has no {role} turns; choose another template="
                )
            if role in self.strip:
                content = content.rstrip() if shared else content.strip()
            before, _, after = form.partition("{}")
            if role == "assistant":
                parts.append((self.generation, True, None))
                before, final = (
                    before.removeprefix(self.generation),
                    self.final * (n == len(messages) - 1),
                )
                if self.thoughts == "refused" and "</think>" in content:
                    raise UserError(
                        f"message {n + 1}: what this chat template makes of </think> is not followed: choose template="
                    )
                if self.thoughts == "framed":
                    thought, content = self.part(content)
                    middle = final.find("</think>") - 1  # a line's end before it
                    parts += [
                        (before + final[:middle], True, target),
                        (thought * bool(final), False, target),
                    ]
                    before, content = final[middle:], content.lstrip("\n") if final else content
                else:
                    before += final
            parts += [(before, True, target), (content, False, target), (after, True, target)]
            parts += [(self.tail, True, None)] * (role == "assistant")
        return parts + [(self.generation, True, None)] * generation

    @staticmethod
    def part(content):
        """(thought, answer), in the way of Qwen3's template."""
        thought, *rest = content.split("</think>")
        return (
            (thought.split("<think>")[-1].strip("\n"), rest[-1].lstrip("\n"))
            if rest
            else ("", content)
        )

    def jinja(self):
        """The same as a Jinja template, in which {bos} and {eos} are left to fill in."""

        def turn(role, form, strip="strip"):
            before, _, after = form.partition("{}")
            content = "message['content']" + f".{strip}()" * (role in self.strip)
            return f"{{{{- {before!r} + {content} + {after!r} }}}}"

        roles = {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant + self.tail,
            "tool": self.tool,
        }
        turns = [
            (f"message['role'] == '{role}'", turn(role, form))
            for role, form in roles.items()
            if form is not None
        ]
        if self.opened is not None:
            turns.insert(
                0,
                (
                    "message['role'] == 'user' and loop.index0 == 1 and system",
                    turn("user", self.opened, "rstrip"),
                ),
            )
        if self.alternate:
            wrong = "loop.index0 >= system and (message['role'] == 'user') != (loop.index0 % 2 == system)"
            turns.insert(
                0,
                (
                    wrong,
                    "{{- raise_exception('users and assistants have to take turns, the user first') }}",
                ),
            )
        lines = ["{%- set system = 1 if messages[0]['role'] == 'system' else 0 %}"]
        lines += (
            [f"{{%- if not system %}}{{{{- {self.start!r} }}}}{{%- endif %}}"] if self.start else []
        )
        lines += ["{%- for message in messages %}"]
        lines += [
            f"    {{%- {'elif' if i else 'if'} {when} %}}{say}"
            for i, (when, say) in enumerate(turns)
        ]
        lines += [
            "    {%- else %}{{- raise_exception('no turns of role ' + message['role']) }}",
            "    {%- endif %}",
        ]
        lines += [
            "{%- endfor %}",
            f"{{%- if add_generation_prompt %}}{{{{- {self.generation!r} }}}}{{%- endif %}}",
        ]
        return "\n".join(lines)


def full(message):
    """A message's content, and the input of an Alpaca record a blank line below."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def alpaca(messages, generation):
    """Stanford Alpaca's prompt, with and without input; a system message stands in for its first paragraph."""
    parts, answer = [], ("\n\n### Response:", True, None)
    for n, message in enumerate(messages):
        content, given = message["content"], message.get("input")
        if message["role"] == "assistant":
            parts += [answer, (content, False, n), ("{eos}", True, n)]
        elif message["role"] == "system":
            parts.append((content, False, None))
        elif message["role"] == "user":
            if n == 0:
                paired = ", paired with an input that provides further context" if given else ""
                parts.append(
                    (f"Below is an instruction that describes a task{paired}. ", True, None)
                )
                parts.append(
                    ("Write a response that appropriately completes the request.", True, None)
                )
            parts += [("\n\n### Instruction:\n", True, None), (content, False, None)]
            parts += [("\n\n### Input:\n", True, None), (given, False, None)] if given else []
        else:
            raise UserError(f"message {n + 1}: the template alpaca has no {message['role']} turns")
    return parts + [answer] * generation


ALPACA = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}{{- '\\n\\n### Response:' + message['content'] + '{eos}' }}
    {%- elif message['role'] == 'system' %}{{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {%- if loop.first %}{{- 'Below is an instruction that describes a task' }}
            {%- if message['input'] %}{{- ', paired with an input that provides further context' }}{%- endif %}
            {{- '. Write a response that appropriately completes the request.' }}
        {%- endif %}
        {{- '\\n\\n### Instruction:\\n' + message['content'] }}
        {%- if message['input'] %}{{- '\\n\\n### Input:\\n' + message['input'] }}{%- endif %}
    {%- else %}{{- raise_exception('no turns of role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Response:' }}{%- endif %}"""


SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def columns(messages, generation):
    """`### NAME:` newline text, columns a blank line apart; the target is the last answer, all but its first name.

    With "columns" in the messages every answer ends a shot, and shots are three blank lines apart. Without them, one
    question and answer are INSTRUCTION, INPUT, RESPONSE (after a system message INSTRUCTION, QUESTION, RESPONSE), and
    longer conversations are FROM and VALUE of every turn before the last answer, GPT.
    """
    given = any(message.get("columns") for message in messages)
    chat = not given and sum(message["role"] == "user" for message in messages) > 1
    asked, answer = (
        "QUESTION" if messages[0]["role"] == "system" else "INSTRUCTION",
        "GPT" if chat else "RESPONSE",
    )
    parts, gap = [], ""
    for n, message in enumerate(messages):
        role, last = message["role"], message["role"] == "assistant" and n == len(messages) - 1
        named = message.get("columns")
        if not named and chat and not last:
            named = [("FROM", SPEAKERS[role]), ("VALUE", full(message))]
        elif not named and role == "assistant":
            named = [(answer, message["content"])]
        elif not named:
            named = [(asked if role == "user" else "INSTRUCTION", message["content"])]
            named += [("INPUT", message["input"])] if message.get("input") else []
        for i, (name, text) in enumerate(named):
            target = n if last else None
            parts += [(f"{gap}### {name}:\n", False, target if i else None), (text, False, target)]
            gap = "\n\n"
        if role == "assistant":
            answer, gap = named[0][0] if given else answer, "\n\n\n\n" if given else "\n\n"
        parts += [("{eos}", True, n)] * last
    return parts + [(f"{gap}### {answer}:\n", False, None)] * generation


def tagged(header, end, tail="", tool="tool", **rest):
    """Turns that all are a header with the role in it, the content and an end."""
    roles = {"system": "system", "user": "user", "tool": tool}
    turns = {role: header.replace("ROLE", name) + "{}" + end + tail for role, name in roles.items()}
    answer = header.replace("ROLE", "assistant")
    return Turns(**turns, assistant=answer + "{}" + end, generation=answer, tail=tail, **rest)


TEMPLATES = {
    "chatml": tagged(
        "<|im_start|>ROLE\n", "<|im_end|>", "\n", needs=("<|im_start|>", "<|im_end|>")
    ),
    "llama2": Turns(
        system="{bos}[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        opened="{} [/INST]",
        user="{bos}[INST] {} [/INST]",
        assistant=" {} {eos}",
        strip=("user", "assistant"),
        alternate=True,
        bos=False,
    ),
    "llama3": tagged(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
        tool="ipython",
        strip=("system", "user", "assistant", "tool"),
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Turns(
        start="{bos}",
        system="{bos}[INST] {}\n\n",
        opened="{} [/INST]",
        user="[INST] {} [/INST]",
        assistant=" {}{eos}",
        alternate=True,
        bos=False,
    ),
    "zephyr": tagged("<|ROLE|>\n", "{eos}", "\n"),
    "alpaca": alpaca,
    "columns": columns,
    "plain": Turns(system="{}", user="{}", assistant="{}{eos}"),
}


def check(messages):
    """UserError, with its number, for a message that makes the list no conversation."""
    if not isinstance(messages, list) or not messages:
        raise UserError("a conversation has to be a list of at least one message")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in SPEAKERS:
            raise UserError(
                f"message {n} needs a role, one of {', '.join(SPEAKERS)}: {message!r:.100}"
            )
        if message["role"] == "system" and n > 1:
            raise UserError(
                f"message {n}: a conversation has one system message at most, and it comes first"
            )
        pairs = message.get("columns") or []
        texts = [
            message.get("content"),
            message.get("input") or "",
            *(text for pair in pairs for text in pair),
        ]
        if not all(isinstance(text, str) for text in texts) or any(
            len(pair) != 2 for pair in pairs
        ):
            raise UserError(
                f"message {n} needs text as its content (and input, and columns of [name, text]): {message!r:.100}"
            )


def in_jinja(name, marks):
    """The template `name` of TEMPLATES in Jinja; None for those that chat in plain messages cannot tell: plain text has no turns,
    and columns need names."""
    layout = TEMPLATES[name]
    if name in ("plain", "columns"):
        return None
    first = "{{- '{first}' }}" if marks["first"] and getattr(layout, "bos", True) else ""
    source = first + (ALPACA.strip() if name == "alpaca" else layout.jinja())
    for mark, text in marks.items():
        source = source.replace(f"{{{mark}}}", text)
    return source


def choose(key, own, marks, added):
    """(name, layout, Jinja) of the template `key`, a name or Jinja itself, or of the directory's own (`own`, in Jinja); a part is
    None where there is none.

    marks: {"bos", "eos", "first"} -> the texts of these tokens, first: of the BOS that comes before all texts. added: a regex that
    finds the added tokens, or None where there are none.
    """

    def lacking(name):
        needs = getattr(TEMPLATES[name], "needs", ())
        return [t for t in needs if not (added and added.fullmatch(t))] or ["EOS"] * (
            not marks["eos"]
        )

    key, source = (None, key) if key and "{" in key else (key, own)
    name = next(
        (t for t in TEMPLATES if source and source == in_jinja(t, marks) and not lacking(t)), None
    )
    layout = TEMPLATES[name] if name else learn(source, marks, added) if source and added else None
    if layout and not name:
        users = {t: getattr(turns, "user", "") for t, turns in TEMPLATES.items()}
        users = {
            t: user.replace("{bos}", marks["bos"]).replace("{eos}", marks["eos"])
            for t, user in users.items()
        }
        name = next(
            (t for t, user in users.items() if user == layout.user),
            "mistral" if "[INST]" in layout.user else "model",
        )
    if key not in (None, name, *TEMPLATES):
        raise UserError(f"unknown template '{key}': there are {', '.join(TEMPLATES)}")
    if key in (None, name):
        return name, layout, source
    if lacking(key):
        raise UserError(
            f"template={key} needs {', '.join(lacking(key))}, which this tokenizer does not have"
        )
    return key, TEMPLATES[key], in_jinja(key, marks)


# contents that a template is tried on
PLAIN = [*"abcde"], [" a b\n", "\tc  ", " <d> & é\n\n", " 'e' ", "f"]
STARTS = (
    "<think>\nwhy \n</think>\n\n",
    "<think></think>",
    "<think>x</think>y</think>\n",
    "z</think>",
    "\n\n",
)
THOUGHTS = [["a", f"{start}b\n", "c", f"{start}d"] for start in STARTS]


def learn(source, marks, added):
    """The Turns that lay out conversations as the Jinja template `source` does; None where turns cannot.

    They are read off what the template makes of a few conversations. Then both have to give the same text for all kinds
    of conversations. A template that prints today's date prints the same day in July 2024 for ever.
    """
    import jinja2.sandbox  # comes with torch; only models with a chat template need it

    def refuse(reason):
        raise jinja2.TemplateError(reason)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": datetime(2024, 7, 26).strftime,
    }
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    source = re.sub(
        r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", source
    )  # a mark that prints nothing
    source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
    roles = {role[0]: role for role in SPEAKERS}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError:
        return None

    def talk(who, contents):
        return [
            {"role": roles[r], "content": content}
            for r, content in zip(who, contents, strict=False)
        ]

    def show(who, *contents, ask=False):
        bos, eos = marks["bos"], marks["eos"]
        try:
            return template.render(
                messages=talk(who, contents),
                add_generation_prompt=ask,
                bos_token=bos,
                eos_token=eos,
            )
        except (
            Exception
        ):  # a foreign program: whatever it raises, it does not lay out this conversation
            return ""

    def holds(turns, *talks, tries=PLAIN):
        for texts in tries:
            for who, ask in [(who, False) for who in talks] + [
                (who, True) for who in talks if who[-1] in "ut"
            ]:
                laid_out = "".join(text for text, _, _ in turns(talk(who, texts), ask))
                if show(who, *texts, ask=ask) != laid_out:
                    return False
        return True

    s, u, a, v, b = "\ue000\ue001\ue002\ue003\ue004"  # contents that occur nowhere else
    one, found = (
        show("u", u),
        re.fullmatch(f"(.*){u}(.*){a}(.*){v}(.*){b}(.*)", show("uaua", u, a, v, b), re.S),
    )
    stop = found and added.search(found[5])
    if not one or not stop:
        return None
    head, answer, back, last_answer, end = found.groups()
    before, after = back.removeprefix(end), one.removeprefix(head + u)
    reply = answer.removeprefix(after)
    pad = "\n {} \n".format
    padded = {
        "user": show("u", pad(u)),
        "assistant": show("ua", u, pad(a)),
        "system": show("su", pad(s), u),
    }
    turns = Turns(
        user=before + "{}" + after,
        assistant=reply + "{}" + end[: stop.end()],
        generation=show("u", u, ask=True).removeprefix(one),
        tail=end[stop.end() :],
        start=head.removesuffix(before),
        final=last_answer.removeprefix(answer),
        strip=tuple(
            role for role, text in padded.items() if not re.search(pad(f"[{s}{u}{a}]"), text)
        ),
        bos=False,
    )
    if not holds(turns, "u", "ua", "uau", "uaua", "uauau"):
        return None
    ways = (replace(turns, thoughts=way) for way in ("text", "framed"))
    turns = next(
        (way for way in ways if holds(way, "ua", "uau", "uaua", tries=THOUGHTS)),
        replace(turns, thoughts="refused"),
    )
    turns = replace(turns, alternate=not holds(turns, "uu", "uaa"))
    if found := re.fullmatch(f"(.*){s}(.*){u}.*", show("su", s, u), re.S):
        shared = not found[2].endswith(before)
        system = found[1] + "{}" + (found[2] if shared else found[2].removesuffix(before))
        more = replace(turns, system=system, opened="{}" + after if shared else None)
        turns = more if holds(more, "su", "sua", "suau", "suaua") else turns
    if found := not turns.alternate and re.fullmatch(
        f".*{a}(.*){v}(.*){b}.*", show("uata", u, a, v, b), re.S
    ):
        more = replace(turns, tool=found[1].removeprefix(end) + "{}" + found[2].removesuffix(reply))
        turns = more if holds(more, "uat", "uata", "uatta") else turns
    return turns
