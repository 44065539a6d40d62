"""Settings are the same in every script: numbers out of range are refused, and a run that goes on
says what has changed."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import typing

import pytest
import tiny
from conftest import ROOT, few

from nano import config, runtime

STAGES = ["pretrain", "sft", "reward", "dpo", "ppo"]
SCRIPTS = [
    *STAGES,
    "sample",
    *(f"prepare.{name}" for name in ("text", "instructions", "preferences", "weights", "toy")),
]
FREE = {
    "margin",
    "missing_eos_penalty",
    "truncate_penalty",
    "entropy_coef",
    "label_smoothing",
    "max_completions",
}
TABLE = {  # key: (values that are refused, values at the edge that are not)
    **dict.fromkeys(
        "lr weight_decay grad_clip epochs steps lora_rank seed top_k".split(), ([-1], [0])
    ),
    **dict.fromkeys(
        "batch_size micro_batch max_length max_new_tokens group minibatches".split(), ([0, -1], [1])
    ),
    **dict.fromkeys("beta lora_alpha rope_theta".split(), ([0, -0.1], [0.001])),
    **dict.fromkeys("beta1 beta2 lora_dropout".split(), ([-0.1, 1, 1.5], [0, 0.999])),
    **dict.fromkeys("warmup_ratio gamma lam".split(), ([-0.1, 1.1], [0, 1])),
    **dict.fromkeys("eval_every save_every sample_every".split(), ([-2], [-1, 0])),
    "top_p": ([0, -0.1, 1.1], [1]),
    "temperature": ([-1, 1e-38, 9e-7], [0, 1e-6]),
}


def needed(Config):
    return [
        f"{f.name}=x"
        for f in dataclasses.fields(Config)
        if config.default(f) is dataclasses.MISSING
    ]


VALUES = dict(
    lora_rank=4, prompts="x.txt", truncate_at="x", ptx_coef=1, ptx_data="x", text_field="text"
)


def beside(Config, key):
    """The arguments beside which a key has an effect."""
    others = [extra for extra in config.annotations(Config)[key][1] if type(extra) is config.With]
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    missing = [o for o in others if not (defaults[o.key] in o.values or defaults[o.key])]
    missing += [o for o in others if o.values and defaults[o.key] not in o.values]
    return [f"{o.key}={(o.values or [VALUES.get(o.key)])[0]}" for o in dict.fromkeys(missing)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range(script):
    Config = importlib.import_module(script).Config
    numbers = {f.name for f in dataclasses.fields(Config) if type(f.default) in (int, float)}
    kinds = typing.get_type_hints(Config, include_extras=True)
    ranged = {key for key, kind in kinds.items() if hasattr(kind, "__metadata__")}
    assert numbers <= ranged | FREE  # a new number has to be given its range
    for key in numbers & TABLE.keys():
        whole = type(next(f.default for f in dataclasses.fields(Config) if f.name == key)) is int
        bad, good = ([v for v in values if not whole or v == int(v)] for values in TABLE[key])
        for value in bad:
            with pytest.raises(config.UserError) as e:
                config.check(config.load(Config, [*needed(Config), f"{key}={value}"]))
            assert re.fullmatch(rf"{key}={value}(\.0)?: must be .*", str(e.value))
        for value in good:
            also = ["min_lr=0"] if key == "lr" and "min_lr" in numbers else []
            also += beside(Config, key)
            config.check(config.load(Config, [*needed(Config), f"{key}={value}", *also]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_silent_and_effects_name_real_keys(script):
    Config = importlib.import_module(script).Config
    keys = {f.name for f in dataclasses.fields(Config)}
    for key, (_, others) in config.annotations(Config).items():
        assert {other.key for other in others} <= keys - {key}
    config.check(config.load(Config, needed(Config)))


@pytest.mark.parametrize(
    "stage, args, sentence",
    [
        ("sft", ["lora_alpha=16"], "lora_alpha=16.0 has no effect with lora_rank=0: leave it out"),
        ("dpo", ["train=qv", "lora_rank=8"], "train=qv has no effect with lora_rank=8"),
        ("reward", ["freeze_layers=1", "lora_rank=8"], "freeze_layers=1 has no effect"),
        (
            "ppo",
            ["algo=grpo", "group=4", "gamma=0.9"],
            "gamma=0.9 has no effect with advantage=gro",
        ),
        ("ppo", ["algo=grpo", "group=4", "lam=0.9"], "lam=0.9 has no effect with advantage=group"),
        (
            "ppo",
            ["kl_coef=0", "kl_control=adaptive"],
            "kl_control=adaptive has no effect with kl_co",
        ),
        ("pretrain", ["model=m", "dim=64"], "dim=64 has no effect with model=m"),
        ("sample", ["top_p=0.5", "temperature=0"], "top_p=0.5 has no effect with temperature=0.0"),
        ("sample", ["out=x.json"], "out=x.json has no effect with prompts=none"),
        ("dpo", ["label_smoothing=0.1", "loss=ipo"], "label_smoothing=0.1 has no effect with loss"),
        ("dpo", ["lora_targets=[q_proj]"], "lora_targets=[q_proj] has no effect with lora_rank=0"),
        (
            "reward",
            ["norm_tokens=5", "norm_samples=0"],
            "norm_tokens=5 has no effect with norm_sam",
        ),
        ("ppo", ["ptx_data=x"], "ptx_data=[x] has no effect with ptx_coef=0.0"),
        ("ppo", ["ptx_coef=1"], "ptx_coef=1.0 has no effect with ptx_data=[]"),
        ("ppo", ["kl_in=none", "kl_coef=0.1"], "kl_coef=0.1 has no effect with kl_in=none"),
        ("ppo", ["kl_target=3"], "kl_target=3.0 has no effect with kl_control=fixed"),
        ("ppo", ["truncate_penalty=3"], "truncate_penalty=3.0 has no effect with truncate_at=[]"),
    ],
)
def test_sentences_of_keys_without_effect(stage, args, sentence):
    Config = importlib.import_module(stage).Config
    with pytest.raises(config.UserError, match=re.escape(sentence)):
        config.check(config.load(Config, args))


def test_help_says_beside_which_key_a_key_has_an_effect():
    text = config.help_text(importlib.import_module("ppo").Config)
    assert re.search(r"gamma=.*\(only with advantage=gae\)", text)
    assert re.search(r"train=.*\(not with lora_rank=\)", text)


@pytest.mark.parametrize("script", STAGES)
def test_the_lowest_learning_rate_is_not_above_the_first(script):
    Config = importlib.import_module(script).Config
    with pytest.raises(config.UserError, match="min_lr=2e-05 is above lr=1e-05"):
        config.check(config.load(Config, ["lr=1e-5", "min_lr=2e-5"]))
    with pytest.raises(config.UserError, match="min_lr=2e-05 has no effect with schedule=constant"):
        config.check(config.load(Config, ["lr=1e-5", "min_lr=2e-5", "schedule=constant"]))


@pytest.mark.parametrize("script", few(SCRIPTS, "ppo", "prepare.weights"))
def test_every_script_checks_its_numbers(script):
    key = "seed" if script != "prepare.weights" else "dtype"
    Config = importlib.import_module(script).Config
    done = subprocess.run(
        [sys.executable, "-m", script, *needed(Config), f"{key}=-1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"error: {key}=-1: ")
    )
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings")
    tiny.model_dir(path / "model")
    tiny.store(path / "rows", path / "model")
    tiny.preferences(path / "groups", path / "model")
    (path / "judge.py").write_text(
        "def length(prompt, response, finished):\n    return len(response)\n"
    )
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_names_what_has_changed(stage, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    module, rows = (
        importlib.import_module(stage),
        "groups" if stage in ("reward", "dpo") else "rows",
    )
    settings = [
        f"data={rows}",
        "model=model",
        f"out={tmp_path / 'out'}",
        "batch_size=2",
        "micro_batch=2",
        "dtype=float32",
    ]
    settings += ["device=cpu", "min_lr=0"]
    settings += {"ppo": ["reward=judge.py:length", "algo=grpo", "group=2", "max_new_tokens=4"]}.get(
        stage, ["max_length=256"]
    )
    quiet = dict(reward="norm_samples=0", pretrain="sample_tokens=0", ppo="sample_every=-1")
    settings.append(quiet.get(stage, "samples=0"))

    def run(*more):
        module.main(config.load(module.Config, [*settings, *more]))
        return [
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("note: the run goes on")
        ]

    assert run("steps=1", "lr=1e-4") == []
    text = (tmp_path / "out" / "config.cfg").read_text()
    assert run("steps=1", "lr=1e-4", "resume=true") == []  # the same settings
    assert run("steps=2", "lr=1e-5") == [
        "note: the run goes on with other settings: steps 1 -> 2, lr 0.0001 -> 1e-05"
    ]
    assert "lr=1e-05\n" in (tmp_path / "out" / "config.cfg").read_text() != text
    assert run("steps=2", "lr=1e-5") == []
    assert run("steps=1", "lr=1e-3", "resume=false") == []  # another run
    (tmp_path / "out" / "config.cfg").unlink()  # the state knows its settings
    assert run("steps=1", "lr=1e-4") == [
        "note: the run goes on with other settings: lr 0.001 -> 0.0001"
    ]


class Reads(ast.NodeVisitor):
    """The names that a source file reads of a `cfg`, or a Config of itself, and the file's texts,
    which getattr may be given."""

    def __init__(self, path):
        self.names = set()
        self.visit(ast.parse(path.read_text()))

    def visit_Attribute(self, node):
        owner = node.value
        if getattr(owner, "id", None) in ("cfg", "self") or getattr(owner, "attr", None) == "cfg":
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        if node.name == "Config":
            names = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
            self.names |= {n.attr for n in names if getattr(n.value, "id", None) == "self"}
        self.generic_visit(node)

    def visit_Constant(self, node):
        self.names.add(node.value)


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_read(stage):
    Config = importlib.import_module(stage).Config
    plumbing = ("run", "weights", "estimate", "evaluation", "functions", "quant")
    paths = [ROOT / f"{stage}.py", *(ROOT / "nano" / f"{name}.py" for name in plumbing)]
    reads = set(runtime.KEYS).union(*(Reads(path).names for path in paths if path.exists()))
    assert {f.name for f in dataclasses.fields(Config)} <= reads
