"""The commands of the README, bench/README.md, the recipes and the scripts' docstrings: each has a
script that exists, and keys and values that the script takes."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from nano import config

COMMAND = re.compile(
    r"(?:python|torchrun)(?:3\.11)? [^`\n]*?(?:(\w+)\.py|-m ((?:prepare|bench)\.\w+))( [^`\n]*|$)"
)
SOURCES = [
    "README.md",
    "bench/README.md",
    "demo.sh",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("recipes/**/*.cfg"))),
    *(
        str(p.relative_to(ROOT))
        for folder in ("", "prepare", "bench")
        for p in sorted((ROOT / folder).glob("*.py"))
    ),
]


def find_commands():
    for source in SOURCES:
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\\+\n#?", " ", text)  # a command that goes on in the next line
        for number, line in enumerate(text.split("\n"), 1):
            line = re.sub(r"^run ", "python ", line.strip().lstrip("#").strip())
            if "`" in line:
                lines = re.findall(r"`([^`]*)`", line)
            else:
                lines = [line] if re.match(r"(\w+=\S+ )*(python|torchrun)", line) else []
            for part in lines:
                if found := COMMAND.search(part):
                    script = found[1] or found[2]
                    if script.endswith(".NAME"):  # any of them
                        continue
                    yield pytest.param(script, found[3], part, id=f"{source}:{number}:{script}")


COMMANDS = list(find_commands())


def test_there_are_commands():
    assert len(COMMANDS) > 80


@pytest.mark.parametrize("script, arguments, line", COMMANDS)
def test_a_documented_command_works_in_zsh(script, arguments, line):
    """Which reads [a,b] as a pattern of file names, in the comment behind a command too."""
    if line.count('"') % 2:  # a value that goes on in the next line
        line += '"'
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
    assert not re.search(r"[][*?(){}<>|;&!^~'\"$`]", unquoted.replace("&&", ""))


@pytest.mark.parametrize("script, arguments, line", COMMANDS)
def test_a_documented_command_is_taken_by_its_script(script, arguments, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    Config = importlib.import_module(script).Config
    if (
        arguments.count('"') % 2
    ):  # a value that goes on in the next line, or the end of a remote command
        arguments += '"' if "=" in arguments.rpartition('"')[0][-9:] else ""
        arguments = arguments.removesuffix('"') if arguments.count('"') % 2 else arguments
    arguments = arguments.partition(" && ")[0]  # another command follows
    shown = ("...", "help")  # no arguments
    arguments = [a for a in shlex.split(arguments, comments=True) if a not in shown]
    cfg = None
    try:
        cfg = config.parse(Config, arguments)
    except config.UserError as e:
        assert "has no default" in str(e)  # a command that is shown without its other keys
    if cfg:
        config.check(cfg)
