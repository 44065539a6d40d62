"""Chat templates: how a conversation is laid out as text, and which part the assistant produces.

A template is a key of TEMPLATES or a model's own template in Jinja. `learn` reads the turns of a
Jinja template, and `choose` picks the template of a model. A model that is trained with a key's
template is saved with the same template in Jinja (`in_jinja`), as other programs read it.
Tokenizer.render turns the text into ids.
"""

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Literal

from nano.config import UserError

JINJA = Path(__file__).parent / "templates"  # the templates for other programs, to the same effect

# A layout is a function from (messages, whether to end with the prompt of an answer) to a list of
# parts (text, fixed, target). Fixed text is the template's own: names of tokens are tokens there.
# All other text comes from the messages. target is the index of the assistant message whose target
# the text belongs to, or None. Neighbours of equal target are encoded as one text.


@dataclass(frozen=True)
class Turns:
    """A conversation laid out turn by turn.

    {} stands for a message's content, {bos} and {eos} for these tokens.
    """

    user: str
    assistant: str  # ends with the token that ends the turn
    generation: str = ""  # prompt of an answer: how `assistant` begins. The target comes after it
    tail: str = ""  # follows an assistant turn, no target
    start: str = ""  # opens a conversation that has no system message
    system: str | None = None
    opened: str | None = None  # user turn after a system message, where both share a block
    tool: str | None = None
    final: str = ""  # opens the content of an assistant turn that ends the conversation
    # How a thought, the content up to </think>, is laid out. text: as is. framed: inside `final` in
    # the last turn, dropped from earlier ones. refused: an error.
    thoughts: Literal["text", "framed", "refused"] = "text"
    strip: tuple = ()  # roles whose content loses its outer whitespace
    alternate: bool = False  # users and assistants have to take turns
    bos: bool = True  # BOS comes first where the tokenizer puts it before texts
    needs: tuple = ()  # tokens that the vocabulary must have

    def fixed(self):
        """The template's own text, joined."""
        forms = (self.user, self.assistant, self.tail, self.start, self.system, self.tool)
        return "".join(filter(None, forms))

    def __call__(self, messages, generation):
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant"] * len(turns)
        if self.alternate and turns != expected[: len(turns)]:
            raise UserError(
                "with this chat template users and assistants have to take turns, the user first"
            )
        parts = [] if roles[0] == "system" else [(self.start, True, None)]
        for n, message in enumerate(messages):
            role = roles[n]
            content = full(message)
            shared = self.opened is not None and role == "user" and roles[:n] == ["system"]
            form = self.opened if shared else getattr(self, role)
            if form is None:
                raise UserError(
                    f"message {n + 1}: this chat template has no {role} turns; "
                    "choose another template="
                )
            if role in self.strip:
                content = content.rstrip() if shared else content.strip()
            before, _, after = form.partition("{}")
            if role == "assistant":
                before = before.removeprefix(self.generation)
                parts.append((self.generation, True, None))
                parts += self.answer(before, content, after, n, n == len(messages) - 1)
                parts.append((self.tail, True, None))
            else:
                parts += [(before, True, None), (content, False, None), (after, True, None)]
        if generation:
            parts.append((self.generation, True, None))
        return parts

    def answer(self, before, content, after, n, last):
        """The parts of assistant message n that are its target. last: it ends the conversation."""
        if self.thoughts == "refused" and "</think>" in content:
            raise UserError(
                f"message {n + 1}: what this chat template makes of </think> is not followed: "
                "choose template="
            )
        parts = []
        final = self.final if last else ""
        if self.thoughts == "framed":
            thought, content = self.part(content)
            if final:
                middle = final.find("</think>") - 1  # before the line break that precedes it
                parts = [(before + final[:middle], True, n), (thought, False, n)]
                before = ""
                final = final[middle:]
                content = content.lstrip("\n")
        return [*parts, (before + final, True, n), (content, False, n), (after, True, n)]

    @staticmethod
    def part(content):
        """(thought, answer) of an assistant's content, split as Qwen3's template does."""
        thought, *rest = content.split("</think>")
        if not rest:
            return "", content
        return thought.split("<think>")[-1].strip("\n"), rest[-1].lstrip("\n")


def full(message):
    """A message's content, and the input of an Alpaca record a blank line below."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def alpaca(messages, generation):
    """Stanford Alpaca's prompt, with and without input.

    A system message stands in for its first paragraph.
    """
    parts = []
    answer = ("\n\n### Response:", True, None)
    for n, message in enumerate(messages):
        role, content, given = message["role"], message["content"], message.get("input")
        if role == "assistant":
            parts += [answer, (content, False, n), ("{eos}", True, n)]
        elif role == "system":
            parts.append((content, False, None))
        elif role == "user":
            if n == 0:
                paired = ", paired with an input that provides further context" if given else ""
                intro = (
                    f"Below is an instruction that describes a task{paired}. "
                    "Write a response that appropriately completes the request."
                )
                parts.append((intro, True, None))
            parts += [("\n\n### Instruction:\n", True, None), (content, False, None)]
            if given:
                parts += [("\n\n### Input:\n", True, None), (given, False, None)]
        else:
            raise UserError(f"message {n + 1}: the template alpaca has no {role} turns")
    return [*parts, answer] if generation else parts


SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def columns(messages, generation):
    """`### NAME:`, a line break and text, columns a blank line apart.

    The target is the last answer: all of its columns except the name of the first.

    If messages have "columns", every answer ends a shot, and shots are three blank lines apart.
    Otherwise one question and answer are INSTRUCTION, INPUT and RESPONSE (after a system message
    INSTRUCTION, QUESTION and RESPONSE). In longer conversations every turn before the last answer
    is FROM and VALUE, and the answer is GPT.
    """
    given = any(message.get("columns") for message in messages)
    roles = [message["role"] for message in messages]
    chat = not given and roles.count("user") > 1
    answer = "GPT" if chat else "RESPONSE"
    question = "QUESTION" if roles[0] == "system" else "INSTRUCTION"
    names = {"assistant": answer, "user": question}
    parts = []
    gap = ""
    for n, message in enumerate(messages):
        role = roles[n]
        target = n if role == "assistant" and n == len(messages) - 1 else None
        named = message.get("columns")
        if not named and chat and target is None:
            named = [("FROM", SPEAKERS[role]), ("VALUE", full(message))]
        elif not named:
            named = [(names.get(role, "INSTRUCTION"), message["content"])]
            if message.get("input") and role != "assistant":
                named.append(("INPUT", message["input"]))
        for i, (name, text) in enumerate(named):
            parts.append((f"{gap}### {name}:\n", False, target if i else None))
            parts.append((text, False, target))
            gap = "\n\n"
        if role == "assistant" and given:
            names["assistant"] = named[0][0]
            gap = "\n\n\n\n"
        if target is not None:
            parts.append(("{eos}", True, n))
    if generation:
        parts.append((f"{gap}### {names['assistant']}:\n", False, None))
    return parts


def tagged(header, end, tail="", tool="tool", **rest):
    """Turns of which each is a header with the role in it, the content and an end."""
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
        texts = [message.get("content"), message.get("input") or "", *chain.from_iterable(pairs)]
        if not all(isinstance(text, str) for text in texts) or {*map(len, pairs)} - {2}:
            raise UserError(
                f"message {n} needs text as its content "
                f"(and input, and columns of [name, text]): {message!r:.100}"
            )


def fill(text, marks):
    """`text` with {bos} and the like replaced. marks: {"bos": text, ...}."""
    for mark, token in marks.items():
        text = text.replace(f"{{{mark}}}", token)
    return text


def in_jinja(name, marks):
    """The template `name` of TEMPLATES in Jinja, or None.

    Plain messages cannot tell the others: plain text has no turns, and columns need names. The
    files are fixed: a model that was saved with one is known by its text.
    """
    path = JINJA / f"{name}.jinja"
    if not path.exists():
        return None
    source = path.read_text(encoding="utf-8").removesuffix("\n")
    if marks["first"] and getattr(TEMPLATES[name], "bos", True):
        source = "{{- '{first}' }}" + source
    return fill(source, marks)


def choose(key, own, marks, added):
    """(name, layout, Jinja) of a chat template. Each is None where there is none.

    key: a name, a template in Jinja, or None for `own`. own: the directory's own template in Jinja,
    or None. marks: {"bos", "eos", "first"} -> the texts of these tokens. first: the BOS that comes
    before all texts. added: a regex that finds the added tokens, or None for no tokens.
    UserError for an unknown name, and for a template whose tokens the vocabulary lacks.
    """

    def lacking(name):
        needs = getattr(TEMPLATES[name], "needs", ())
        lack = [token for token in needs if not (added and added.fullmatch(token))]
        return lack or ([] if marks["eos"] else ["EOS"])

    if key and "{" in key:
        own = key
        key = None
    name = layout = None
    if own:
        same = (t for t in TEMPLATES if own == in_jinja(t, marks) and not lacking(t))
        name = next(same, None)
        layout = TEMPLATES[name] if name else added and learn(own, marks, added)
    if layout and not name:
        users = ((t, getattr(turns, "user", "")) for t, turns in TEMPLATES.items())
        same = (t for t, user in users if fill(user, marks) == layout.user)
        name = next(same, "mistral" if "[INST]" in layout.user else "model")
    if key not in (None, name, *TEMPLATES):
        raise UserError(f"unknown template '{key}': there are {', '.join(TEMPLATES)}")
    if key in (None, name):
        return name, layout, own
    if lacking(key):
        raise UserError(
            f"template={key} needs {', '.join(lacking(key))}, which this tokenizer does not have"
        )
    return key, TEMPLATES[key], in_jinja(key, marks)


# Contents of messages that a template is tried on.
PLAIN = [*"abcde"], [" a b\n", "\tc  ", " <d> & é\n\n", " 'e' ", "f"]
STARTS = (
    "<think>\nwhy \n</think>\n\n",
    "<think></think>",
    "<think>x</think>y</think>\n",
    "z</think>",
    "\n\n",
)
THOUGHTS = [["a", f"{start}b\n", "c", f"{start}d"] for start in STARTS]


def compile_jinja(source):
    """The compiled Jinja template, or None for a source that is no template.

    A template that prints today's date prints the same day in July 2024 for ever.
    """
    import jinja2.sandbox  # comes with torch; only models with a chat template need it

    def refuse(reason):
        raise jinja2.TemplateError(reason)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime(2024, 7, 26).strftime
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    # {% generation %} and {% endgeneration %} mark the target for programs that know them. A
    # statement that prints nothing takes their place.
    source = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{%\1 set _ = 0 \3%}", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError:
        return None


def learn(source, marks, added):
    """The Turns that lay out conversations as the Jinja template `source` does, or None.

    marks, added: as in `choose`.

    Jinja says nothing about which text is a target, so the turns are read off what the template
    makes of a few conversations with contents that occur nowhere else. Then both have to give the
    same text for all kinds of conversations. None if they do not, or if the template fails.
    """
    template = compile_jinja(source)
    if template is None:
        return None
    roles = {role[0]: role for role in SPEAKERS}

    def talk(who, contents):
        pairs = zip(who, contents, strict=False)
        return [{"role": roles[letter], "content": content} for letter, content in pairs]

    def show(who, *contents, ask=False):
        try:
            return template.render(
                messages=talk(who, contents),
                add_generation_prompt=ask,
                bos_token=marks["bos"],
                eos_token=marks["eos"],
            )
        except Exception:  # of any kind: a template is a foreign program
            return ""

    def holds(turns, *talks, tries=PLAIN):
        """Whether turns and template agree on conversations, such as "uau" for three roles."""
        asks = [(who, True) for who in talks if who[-1] in "ut"]
        for who, ask in [(who, False) for who in talks] + asks:
            for texts in tries:
                parts = turns(talk(who, texts), ask)
                if show(who, *texts, ask=ask) != "".join(text for text, _, _ in parts):
                    return False
        return True

    def split(pattern, who, *contents):
        return re.fullmatch(pattern, show(who, *contents), re.S)

    s, u, a, v, b = "\ue000\ue001\ue002\ue003\ue004"
    one = show("u", u)
    match = split(f"(.*){u}(.*){a}(.*){v}(.*){b}(.*)", "uaua", u, a, v, b)
    stop = match and added.search(match[5])
    if not one or not stop:
        return None
    head, answer, back, last_answer, end = match.groups()
    before = back.removeprefix(end)
    after = one.removeprefix(head + u)
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
    same = (way for way in ways if holds(way, "ua", "uau", "uaua", tries=THOUGHTS))
    turns = next(same, replace(turns, thoughts="refused"))
    turns = replace(turns, alternate=not holds(turns, "uu", "uaa"))
    if match := split(f"(.*){s}(.*){u}.*", "su", s, u):
        shared = not match[2].endswith(before)
        more = replace(
            turns,
            system=match[1] + "{}" + (match[2] if shared else match[2].removesuffix(before)),
            opened="{}" + after if shared else None,
        )
        if holds(more, "su", "sua", "suau", "suaua"):
            turns = more
    match = split(f".*{a}(.*){v}(.*){b}.*", "uata", u, a, v, b)
    if match and not turns.alternate:
        tool = match[1].removeprefix(end) + "{}" + match[2].removesuffix(reply)
        more = replace(turns, tool=tool)
        if holds(more, "uat", "uata", "uatta"):
            turns = more
    return turns
