"""Strings that know where each of their characters comes from, and Jinja that keeps it.

A chat template is a program in Jinja. It may trim, drop, move or repeat what the messages say. The
strings that it works on are Traced: each character has an origin, and keeps it when the template
adds, slices, strips, splits or joins. The origin is the template's own text (t below), a message
(1, 2, ...), or unknown.

    <|im_start|>user\\nHi!<|im_end|>\\n
    ttttttttttttttttttt111tttttttttttt

nano/chat.py reads from the origins which part of a conversation's text is what.
"""

import functools
import json
import operator
from datetime import datetime
from itertools import chain

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2.compiler import CodeGenerator

from nano.config import UserError

DAY = datetime(2024, 7, 26)  # of templates that print the date

# ------------------------------------------------------------------ strings that know their origin

# The origin of a character is a character itself. FIRST + n stands for message n.
TEMPLATE, UNKNOWN, FIRST = "\0", "\1", 128
ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}


new_str = str.__new__


class Traced(str):
    """A string with the origin of each of its characters, .origin, a string of the same length.

    A method that is not named here gives a plain str, whose characters are of unknown origin.
    """

    __slots__ = ("origin",)

    def __new__(cls, text, origin=None):
        self = new_str(cls, text)
        self.origin = origin_of(text) if origin is None else origin
        return self

    def __str__(self):
        return self

    def __getitem__(self, key):
        return type(self)(str.__getitem__(self, key), self.origin[key])

    def __add__(self, other):
        if type(self) is type(other) is Traced:  # the usual case, quickly
            both = new_str(Traced, str.__add__(self, other))
            both.origin = self.origin + other.origin
            return both
        return plus(self, other)

    def __radd__(self, other):
        return plus(other, self)

    def join(self, items):
        return joined([part for item in items for part in (self, item)][1:])

    def replace(self, old, new, count=-1):
        if not old:
            return str.replace(self, old, new, count)
        return Traced(new).join(self.split(old, count))

    def lstrip(self, chars=None):
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars=None):
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self


class Safe(Traced):
    """What the filter `safe` gives. Jinja escapes plain text that is added to it."""

    __slots__ = ()

    def __str__(self):
        return Traced(str.__str__(self), self.origin)

    def join(self, items):
        raise jinja2.TemplateError("join on safe text")

    replace = join


class Looked(BaseException):
    """An Opaque was looked at. No program may catch it as an Exception and go on."""


class Opaque:
    """A stand-in for texts that are not empty and begin and end without white space.

    A template can add it to others and put it out, which tells where it places the texts. All else
    that depends on the texts raises Looked.

    .parts   the texts in order: a number for each that is not known, Traced for the others
    """

    def __init__(self, parts):
        self.parts = [*parts]

    def __bool__(self):
        return True

    def __add__(self, other):
        return joined([self, other]) if type(other) in (Traced, Opaque) else self.look()

    def __radd__(self, other):
        return joined([other, self]) if type(other) in (Traced, Opaque) else self.look()

    def strip(self, chars=None):
        return self if chars is None and len(self.parts) == 1 else self.look()

    def look(self, *_):
        raise Looked

    __str__ = __repr__ = __eq__ = __hash__ = __len__ = __iter__ = __getitem__ = look
    __getattr__ = __index__ = __int__ = __float__ = look


def origin_of(text):
    return text.origin if isinstance(text, Traced) else UNKNOWN * len(text)


def joined(parts, kind=Traced):
    parts = [*parts]
    try:
        text = new_str(kind, "".join(parts))
    except TypeError:
        "".join([part for part in parts if type(part) is not Opaque])  # else raises
        return Opaque(chain.from_iterable(p.parts if type(p) is Opaque else [p] for p in parts))
    try:
        text.origin = "".join([part.origin for part in parts])
    except AttributeError:  # plain text
        text.origin = "".join(map(origin_of, parts))
    return text


def plus(a, b):
    if not isinstance(a, str) or not isinstance(b, str):
        return NotImplemented
    if isinstance(a, Safe) or isinstance(b, Safe):
        return joined([x if isinstance(x, Safe) else escaped(x) for x in (a, b)], Safe)
    return joined([a, b])


def escaped(text):
    parts = [ESCAPES.get(char, char) for char in text]
    origins = zip(parts, origin_of(text), strict=True)
    return Safe("".join(parts), "".join(origin * len(part) for part, origin in origins))


def dividing(name):
    """The method of str of that name. Its results are stretches of the string, in order."""

    def method(self, *args, **options):
        pieces = getattr(str, name)(self, *args, **options)
        separator = args[0] if "split" in name and args else options.get("sep")
        gap = len(separator) if isinstance(separator, str) else 0
        parts = []
        at = 0
        for piece in pieces:
            at = self.index(piece, at)
            parts.append(self[at : at + len(piece)])
            at += len(piece) + gap
        return type(pieces)(parts)

    return method


def recased(name):
    """The method of str of that name. It keeps the origins where it keeps the length."""

    def method(self):
        text = getattr(str, name)(self)
        return type(self)(text, self.origin) if len(text) == len(self) else text

    return method


for name in ("split", "rsplit", "splitlines", "partition", "rpartition"):
    setattr(Traced, name, dividing(name))
for name in ("lower", "upper", "capitalize", "title", "swapcase"):
    setattr(Traced, name, recased(name))


def traced(value, origin):
    """`value` with all of its strings Traced to one origin."""
    if isinstance(value, str):
        text = new_str(Traced, value)
        text.origin = origin * len(value)
        return text
    if isinstance(value, dict):
        return {traced(key, origin): traced(item, origin) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [traced(item, origin) for item in value]
    return value


@functools.cache
def literal(text):
    return Traced(text, TEMPLATE * len(text))


# ------------------------------------------------------------------------------------------- Jinja


class Literals(CodeGenerator):
    """Jinja's compiler, except that the literals of a template are Traced.

    The compiler's methods are no public interface. check_jinja tests that they do what we expect.
    """

    def visit_Const(self, node, frame):
        text = isinstance(node.value, str)
        self.write(self.constant(node.value) if text else repr(node.value))

    def _output_const_repr(self, group):
        return self.constant("".join(group))

    def visit_Concat(self, node, frame):  # a ~ b
        self.write("concat(map(str, (")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write(")))")

    def visit_Add(self, node, frame):  # a + b + c at once, since each sum copies its parts
        terms = []
        while isinstance(node, jinja2.nodes.Add):
            terms.append(node.right)
            node = node.left
        self.write("environment.add((")
        for term in [node, *reversed(terms)]:
            self.visit(term, frame)
            self.write(", ")
        self.write("))")

    def constant(self, text):
        self.environment.literals.append(literal(text))
        return f"environment.literals[{len(self.environment.literals) - 1}]"


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' sandbox, with short ways to a field of a message and to the state of a loop."""

    def getattr(self, obj, attribute):
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        if type(obj) is jinja2.runtime.LoopContext and attribute in LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


LOOP = ("first", "last", "index", "index0")


class Generation(jinja2.ext.Extension):
    """{% generation %} marks targets for programs that need it. Here it prints what is in it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

    def text(self, caller):
        return caller()


def add(terms):
    if {*map(type, terms)} == {Traced}:
        return joined(terms)
    return functools.reduce(operator.add, terms)


def refuse(reason):
    raise jinja2.TemplateError(reason)


def join_filter(items, d="", attribute=None):
    if attribute is not None:
        items = [item[attribute] for item in items]
    return Traced(d).join(map(str, items))


def trim(value, chars=None):
    return text_of(value).strip(chars)


def text_of(value):
    return value if type(value) in (Traced, Opaque) else str(value)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """transformers' filter. The origin is that of the one message whose strings `value` holds.

    It is never the template, although the keys may be.
    """
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    origins = {*leaves(value)} - {TEMPLATE, UNKNOWN}
    return traced(text, origins.pop() if len(origins) == 1 else UNKNOWN)


def leaves(value):
    """The origins of the strings in a value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return chain.from_iterable(map(leaves, value))
    return origin_of(value) if isinstance(value, str) else ""


def jinja(source):
    """The compiled template, set up as in transformers. jinja2.TemplateError for bad syntax.

    A template that prints today's date prints the same day in July 2024 for ever.
    """
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimizer makes plain lists of lists of literals
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.code_generator_class = Literals
    environment.literals = []
    environment.concat = joined
    environment.add = add
    environment.filters |= {"tojson": tojson, "join": join_filter, "safe": Safe, "trim": trim}
    environment.tests["string"] = lambda value: isinstance(value, (str, Opaque))
    environment.globals |= {"raise_exception": refuse, "strftime_now": DAY.strftime}
    template = environment.from_string(source)
    template.root_render_func.__globals__["str"] = text_of  # what is put out stays what it is
    return template


PROOF = (  # what check_jinja tests the compiler with
    "{% set a = ['a', 'b'] %}a{{ a[1] ~ m.x | trim + 'b' }}{{ {'k': 'a'}['k'] }}"
    "{{ ['b'] | join }}{% macro f(x) %}a{{ x }}{% endmacro %}{{ f(m.x) }}"
    "{% set c %}b{{ m.x[1:2] }}{% endset %}{{ c }}"
)


@functools.cache
def check_jinja():
    """UserError where Jinja's compiler does not keep origins as we need it."""
    text = jinja(PROOF).render(m={"x": traced(" x ", "m")})
    if text != "abxbaba x bx" or origin_of(text).replace(TEMPLATE, "t") != "ttmttttmmmtm":
        raise UserError(
            f"jinja2 {jinja2.__version__} does not compile chat templates as is needed here: "
            "install jinja2 3.1"
        )
