import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, Optional

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nano import config

# fmt: off


@dataclass
class Config:
    # data
    data: list[str] = field(
        default_factory=lambda: ["alpaca"])     # names of data sets
    out: Path = Path("out/run")                 # run folder
    # optimizer
    lr: float = 2e-5                            # peak learning rate
    steps: int = 100                            # optimizer steps, #1 knob
    warmup_ratio: float = 0.0                   # share of the steps
    betas: tuple[float, float] = (0.9, 0.95)    # AdamW
    batch_size: int = 8                         # rows
    # sampling
    top_k: int | None = 50                      # none: all
    prompt: str = ""                            # text
    system: Optional[str] = None                # system message
    sizes: tuple[str, ...] = ()                 # one a data set
    layers: tuple[int, ...] | None = None       # which
    folders: tuple[config.PathText, ...] = ()   # paths
    compile: bool = False                       # torch.compile
    schedule: Literal["cosine", "linear"] = "cosine"
    resume: bool | Literal["auto"] = "auto"     # true, false, auto

# fmt: on


def refused(capsys, *argv, Config=Config):
    """The one line on stderr with which `load` ends the program."""
    with pytest.raises(SystemExit) as e:
        config.load(Config, list(argv))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_defaults():
    assert config.load(Config, []) == Config()


@pytest.mark.parametrize(
    "argument, key, value",
    [
        ("steps=1_000", "steps", 1000),
        ("--steps=-3", "steps", -3),
        ("lr=1", "lr", 1.0),
        ("lr=2e-5", "lr", 2e-5),
        ("out=2024", "out", Path("2024")),
        ("top_k=none", "top_k", None),
        ("top_k=7", "top_k", 7),
        ("prompt=b=c # d", "prompt", "b=c # d"),
        ("prompt=", "prompt", ""),
        ("prompt= none", "prompt", " none"),
        ('prompt="hi"', "prompt", '"hi"'),
        ("system=None", "system", None),
        ("data=[arc,mmlu]", "data", ["arc", "mmlu"]),
        ("data=arc", "data", ["arc"]),
        ('data=[ "a, b" , c d]', "data", ["a, b", "c d"]),
        ("sizes=[all,10%]", "sizes", ("all", "10%")),
        ("sizes=all,10%", "sizes", ("all", "10%")),
        ("sizes=[]", "sizes", ()),
        ("betas=0.8,0.9", "betas", (0.8, 0.9)),
        ("layers=[1,2]", "layers", (1, 2)),
        ("layers=none", "layers", None),
        ("compile=YES", "compile", True),
        ("compile=0", "compile", False),
        ("schedule=linear", "schedule", "linear"),
        ("resume=auto", "resume", "auto"),
        ("resume=no", "resume", False),
        # white space stays as it was typed, except around the elements in brackets
        ("sizes=\n", "sizes", ("\n",)),
        ("sizes= ", "sizes", (" ",)),
        ("sizes=\n\nHuman:", "sizes", ("\n\nHuman:",)),
        ("sizes= a, b\t", "sizes", (" a", " b\t")),
        ("sizes=[ \n, b ]", "sizes", ("\n", "b")),
        ("sizes=[\n\nHuman:]", "sizes", ("\n\nHuman:",)),
        ("sizes=\n[INST]", "sizes", ("\n[INST]",)),
        ('sizes="a, b\n"', "sizes", ("a, b\n",)),
        ('sizes=[" ","\\n"]', "sizes", (" ", "\n")),
        ("sizes=[ ]", "sizes", ()),
        # the home directory, for paths alone
        ("out=~", "out", Path("/home/me")),
        ("out=~/run", "out", Path("/home/me/run")),
        ("out=./~", "out", Path("./~")),
        ("out=~nobody.of.that.name/x", "out", Path("~nobody.of.that.name/x")),
        ("folders=[~/a,b/~,~]", "folders", ("/home/me/a", "b/~", "/home/me")),
        ('folders="~/a"', "folders", ("~/a",)),
        ("prompt=~/run", "prompt", "~/run"),
        ("sizes=~/run", "sizes", ("~/run",)),
    ],
)
def test_casts(monkeypatch, argument, key, value):
    monkeypatch.setenv("HOME", "/home/me")
    got = getattr(config.load(Config, [argument]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argument, says",
    [
        ("learnig_rate=1", "unknown key 'learnig_rate'; did you mean 'lr'?"),
        ("bs=1", "did you mean 'batch_size'?"),
        ("--stps=1", "did you mean 'steps'?"),
        ("--warmup-ratio=1", "did you mean 'warmup_ratio'?"),
        ("learning-rate=1", "did you mean 'lr'?"),
        ("a=b=c", "unknown key 'a'; `help` lists every key"),
        ("__name__=x", "unknown key '__name__'"),
        ("=3", "unknown key ''"),
        ("steps=abc", "steps=abc: expected int"),
        ("steps=1.5", "expected int"),
        ("steps=none", "expected int"),
        ("steps=", "expected int"),
        ("lr=fast", "lr=fast: expected float"),
        ("lr=nan", "expected float"),
        ("lr=inf", "expected float"),
        ("lr=1e39", "expected float"),  # beyond float32, in which all of it is computed
        ("lr=__import__('os')", "expected float"),
        ("compile=maybe", "expected true or false"),
        ("betas=0.9", "expected 2 values [float,float]"),
        ("sizes=[a", "expected list of str"),
        ("sizes=a,,b", "expected list of str"),
        ("layers=[1,x]", "expected list of int or none"),
        ("schedule=cosin", "expected one of cosine, linear"),
        ("resume=maybe", "expected true or false or one of auto"),
        ("steps", "'steps' is not key=value; write steps=VALUE"),
        ("--compile", "write compile=VALUE"),
        ("", "'' is not key=value"),
    ],
)
def test_mistakes(capsys, argument, says):
    assert says in refused(capsys, argument)


def test_a_comment_that_the_shell_passes_on():
    """As zsh does with a line of the README that is pasted into it."""
    cfg = config.load(Config, ["steps=3", "prompt=#", "#", "steps=4", "or", "help"])
    assert (cfg.steps, cfg.prompt) == (3, "#")


def test_twice_on_the_command_line(capsys):
    assert "'steps' is given twice" in refused(capsys, "steps=1", "lr=1", "--steps=1")


def test_presets(tmp_path):
    (tmp_path / "a.cfg").write_text(
        textwrap.dedent("""\
        # a recipe
            # indented comment

        steps = 5   # five
        prompt=C# is = fine  # comment
        system="a # b\\n\\u00e9"  # "quoted" comment
        data=["x # y",z]
        lr=1
        lr=2
        """)
    )
    (tmp_path / "b=1").mkdir()
    (tmp_path / "b=1" / "config.cfg").write_bytes("\ufeffsteps=6\r\nsystem=none\r\n".encode())
    a, b = str(tmp_path / "a.cfg"), str(tmp_path / "b=1" / "config.cfg")
    want = Config(steps=5, prompt="C# is = fine", system="a # b\né", data=["x # y", "z"], lr=2.0)
    assert config.load(Config, [a]) == want
    assert config.load(Config, [a, "steps=7"]).steps == 7
    assert config.load(Config, ["steps=7", a]).steps == 5  # the later one wins
    both = config.load(Config, [a, b])
    assert (both.steps, both.system, both.lr) == (6, None, 2.0)


def test_white_space_and_home_in_a_preset(tmp_path, monkeypatch):
    """White space needs quotes there. ~ in quotes is a character, as it is in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.cfg").write_text(
        'sizes = "\\n\\nHuman:"\ndata= a , b \nfolders=[~/x,"~/y"]\nout=~/run\n'
    )
    cfg = config.load(Config, ["~/p.cfg"])
    assert (cfg.sizes, cfg.data) == (("\n\nHuman:",), ["a", "b"])
    assert (cfg.folders, cfg.out) == ((f"{tmp_path}/x", "~/y"), tmp_path / "run")
    (tmp_path / "q.cfg").write_text(config.to_cfg(cfg))
    assert config.load(Config, [str(tmp_path / "q.cfg")]) == cfg


@pytest.mark.parametrize(
    "text, says",
    [
        ("\n\nlearnig_rate=1", "p.cfg:3: unknown key 'learnig_rate'; did you mean 'lr'?"),
        ("steps=abc", "p.cfg:1: steps=abc: expected int"),
        ("lr=1\nsteps 5", "p.cfg:2: 'steps 5' is not key=value"),
        ("import os", "p.cfg:1: 'import os' is not key=value"),
        ('prompt="\\x"', "p.cfg:1: "),
        (b"prompt=\xff", "cannot be read as UTF-8 text"),
        (None, "does not exist"),
    ],
)
def test_preset_mistakes(capsys, tmp_path, text, says):
    path = tmp_path / "p.cfg"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert says in refused(capsys, str(path))


def test_required_key(capsys):
    @dataclass
    class Required:
        source: str
        n: int = 1

    assert config.load(Required, ["source=x"]) == Required("x")
    assert "'source' has no default: give source=VALUE" in refused(capsys, "n=2", Config=Required)


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help(capsys, word):
    with pytest.raises(SystemExit) as e:
        config.load(Config, ["steps=3", word])
    out = capsys.readouterr().out
    assert e.value.code == 0
    lines = {line.split("=")[0].strip(): line for line in out.splitlines() if "=" in line}
    assert set(lines) == {f.name for f in fields(Config)}
    assert lines["steps"].split(maxsplit=2) == ["steps=100", "int", "optimizer steps, #1 knob"]
    assert (
        lines["data"].endswith("list of str    names of data sets")
        and "data=[alpaca] " in lines["data"]
    )
    assert "top_k=50" in lines["top_k"] and "int or none" in lines["top_k"]
    assert "\n\noptimizer\n  lr=2e-05" in out and "fmt" not in out


texts = st.text() | st.sampled_from(
    [
        "none",
        "true",
        "1",
        "a,b",
        "[a]",
        '"',
        '"a" # b',
        "a\nb",
        " a ",
        "#",
        "~/a",
        "\n",
        "a=b",
        "é\u2028",
        "\udc80",
    ]
)
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
configs = st.builds(
    Config,
    data=st.lists(texts),
    out=texts.map(Path),
    lr=floats,
    steps=st.integers(),
    betas=st.tuples(floats, floats),
    top_k=st.none() | st.integers(),
    prompt=texts,
    system=st.none() | texts,
    sizes=st.lists(texts).map(tuple),
    layers=st.none() | st.lists(st.integers()).map(tuple),
    folders=st.lists(texts).map(tuple),
    compile=st.booleans(),
    schedule=st.sampled_from(["cosine", "linear"]),
    resume=st.sampled_from([True, False, "auto"]),
)


@given(configs)
def test_round_trip(tmp_path_factory, cfg):
    path = tmp_path_factory.getbasetemp() / "round.cfg"
    path.write_text(config.to_cfg(cfg), encoding="utf-8")
    assert config.load(Config, [str(path)]) == cfg
    path.write_text("\n".join(config.diff(cfg)), encoding="utf-8")
    assert config.load(Config, [str(path)]) == cfg


def test_diff():
    assert config.diff(Config()) == []
    assert config.diff(Config(lr=1e-4, steps=7, prompt="a b")) == [
        "lr=0.0001",
        "steps=7",
        'prompt="a b"',
    ]


SCRIPT = """
'''A script.'''
import sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {root!r})
from nano import config

@dataclass
class Config:
    way: str = "end"  # how to end
    batch_size: int = 1

def main(cfg):
    if cfg.way == "user":
        raise config.UserError("data/train.json:3: no field 'output'; name it with fields=")
    if cfg.way == "disk":
        raise OSError(28, "No space left on device", "out/model.safetensors")
    if cfg.way == "denied":
        raise PermissionError(13, "Permission denied", "out/model.safetensors")
    if cfg.way.startswith("/"):
        Path(cfg.way).mkdir()
    if cfg.way == "loop":
        Path("a").symlink_to("a")
        Path("a/b").resolve()
        Path("a/b").mkdir()
    if cfg.way == "memory":
        error = type("OutOfMemoryError", (RuntimeError,), {{}})
        raise error("CUDA out of memory. Tried to allocate 9 GiB.\\nSee the manual")
    if cfg.way == "wrapped":
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    if cfg.way == "interrupt":
        raise KeyboardInterrupt
    if cfg.way == "kill":
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
    if cfg.way.startswith("SIG"):
        return cfg.way
    if cfg.way.startswith("bye"):
        import atexit
        atexit.register(print, "last")
    if cfg.way == "byebye":
        raise config.UserError("no")
    if cfg.way == "words":
        sys.exit("words")
    if cfg.way == "name":
        print("caf\\u00e9 \\ud83d")
        return
    if cfg.way == "bug":
        raise KeyError("x")
    for _ in range(100_000 if cfg.way == "pipe" else 1):
        print(cfg.way)

config.run(main, Config)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return path


@pytest.mark.parametrize(
    "argument, status, out, err",
    [
        ("way=end", 0, "end\n", ""),
        ("wya=end", 2, "", "error: unknown key 'wya'; did you mean 'way'?\n"),
        ("way=user", 2, "", "error: data/train.json:3: no field 'output'; name it with fields=\n"),
        ("way=disk", 2, "", "error: the disk is full ("),
        ("way=denied", 2, "", "error: out/model.safetensors: Permission denied\n"),
        ("way=wrapped", 2, "", "error: the disk is full ("),
        ("way=/nowhere/x", 2, "", "error: /nowhere/x: No such file or directory\n"),
        (f"way=/{'x' * 300}", 2, "", f"error: /{'x' * 300}: File name too long\n"),
        ("way=loop", 2, "", "error: "),  # one sentence, which Python's version words
        (
            "way=memory",
            2,
            "",
            "error: CUDA out of memory. Tried to allocate 9 GiB. - lower batch_size=\n",
        ),
        ("way=kill", 143, "", ""),
        ("way=interrupt", 130, "", "interrupted\n"),
        ("way=SIGTERM", 143, "", ""),  # a run that was stopped, and has saved
        ("way=SIGINT", 130, "", ""),
        ("way=SIGUSR1", 138, "", ""),
    ],
)
def test_run(script, tmp_path, argument, status, out, err):
    done = subprocess.run(
        [sys.executable, str(script), argument], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.startswith(err) and done.stderr.count("\n") == bool(err)


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", "caf\\xe9 \\ud83d\n"), ("utf-8", "café \\ud83d\n")]
)
def test_what_a_terminal_cannot_show(script, encoding, shown):
    environment = os.environ | dict(PYTHONIOENCODING=encoding)
    done = subprocess.run(
        [sys.executable, str(script), "way=name"],
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


def test_run_names_the_rank(script):
    done = subprocess.run(
        [sys.executable, str(script), "x=1"], capture_output=True, text=True, env={"RANK": "3"}
    )
    assert done.returncode == 2 and done.stderr.startswith("[rank 3] error: unknown key 'x'")


@pytest.mark.parametrize("rank, last", [({}, "last\n"), ({"RANK": "0"}, "")])
def test_a_rank_ends_before_the_interpreter_is_taken_down(script, rank, last):
    """Or a thread of gloo that still holds a tensor aborts it, now and then."""
    for argument, status, out in (("way=bye", 0, "bye\n"), ("way=byebye", 2, "")):
        done = subprocess.run(
            [sys.executable, str(script), argument], capture_output=True, text=True, env=rank
        )
        assert (done.returncode, done.stdout) == (status, out + last)


def test_a_user_s_own_exit_keeps_its_words(script):
    done = subprocess.run(
        [sys.executable, str(script), "way=words"],
        capture_output=True,
        text=True,
        env={"RANK": "0"},
    )
    assert (done.returncode, done.stderr) == (1, "words\n")


def test_run_leaves_bugs_their_traceback(script):
    done = subprocess.run([sys.executable, str(script), "way=bug"], capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError: 'x'" in done.stderr


def test_run_is_quiet_when_the_reader_leaves(script):
    with subprocess.Popen(
        [sys.executable, str(script), "way=pipe"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as p:
        assert p.stdout.readline() == "pipe\n"
        p.stdout.close()
        assert p.stderr.read() == ""
    assert p.returncode == 141


def test_a_closed_stdout(script, tmp_path):
    """Else a file that the script opens would become its stdout."""
    code = f"exec {sys.executable} {script} way=end >&-"
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True)
    said = "note: stdout is closed: what goes there is lost\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


def test_an_empty_rank_is_not_named(script):
    done = subprocess.run(
        [sys.executable, str(script), "x=1"], capture_output=True, text=True, env={"RANK": ""}
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unknown key 'x'")


@dataclass
class Preset:
    PRESETS: ClassVar = {"algo": {"ppo": dict(kind="gae"), "grpo": dict(kind="std", coef=0.1)}}
    kind: str = "gae"
    coef: config.NonNegativeFloat = 0.5


def test_a_built_in_preset_expands_where_it_stands(capsys):
    assert config.load(Preset, ["algo=grpo"]) == Preset("std", 0.1)
    assert config.load(Preset, ["algo=grpo", "coef=0.3"]) == Preset("std", 0.3)
    assert config.load(Preset, ["coef=0.3", "algo=grpo"]) == Preset("std", 0.1)
    assert "algo" not in config.to_cfg(config.load(Preset, ["algo=grpo"]))
    with pytest.raises(SystemExit):
        config.load(Preset, ["algo=dpo"])
    assert "algo=dpo: expected one of ppo, grpo" in capsys.readouterr().err
    assert "algo=grpo" in config.help_text(Preset)
