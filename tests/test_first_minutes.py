"""What a newcomer's machine may lack: another Python first on the path, a virtual environment without
pip, a script that is run by its path."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

NEW = 'exec "{python}" "$@"'
OLD = "case $1 in -c) exit 1;; *) echo Python 3.10 >&2; exit 3;; esac"  # no 3.11: see is_new
SHIM = "echo pyenv: version not installed >&2; exit 127"


def write_programs(folder, programs):
    """Programs of a shell, {name: text}. {python} stands for this test's Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/sh\n" + text.format(python=sys.executable) + "\n")
        (folder / name).chmod(0o755)


def bash(command, path):
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {ROOT}/venv.sh; {command}"],
        env=dict(PATH=f"{path}:/usr/bin:/bin"),
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout.strip(), result.stderr.strip()


# What stands for `python -m venv FOLDER`: it makes a folder with itself in it.
MAKES = 'case $1 in -m) mkdir -p "$3/bin"; echo "$0" > "$3/by";; *) exec "{python}" "$@";; esac'
NAMES = ["python3.11", "python3.12", "python3.13", "python3.14", "python3", "python"]


@pytest.mark.parametrize(
    "programs, chosen",
    [
        ({"python3.11": MAKES, "python3": OLD}, "python3.11"),
        ({"python3.11": SHIM, "python3.12": MAKES}, "python3.12"),
        ({"python3.11": SHIM, "python3": OLD, "python": MAKES}, "python"),
        ({"python3.11": SHIM, "python3.13": SHIM, "python3": MAKES}, "python3"),
    ],
)
def test_the_python_that_works_is_taken(tmp_path, programs, chosen):
    write_programs(tmp_path / "bin", dict.fromkeys(NAMES, SHIM) | programs)
    venv = tmp_path / "new venv"
    assert bash(f"make_venv '{venv}'; echo $python", tmp_path / "bin") == (
        0,
        f"{venv}/bin/python",
        "",
    )
    assert (venv / "by").read_text().strip() == str(tmp_path / "bin" / chosen)


def test_no_python_is_new_enough(tmp_path):
    write_programs(tmp_path / "bin", dict.fromkeys(NAMES, SHIM) | {"python3": OLD})
    status, _, err = bash(f"make_venv {tmp_path}/venv", tmp_path / "bin")
    assert status == 2 and err.startswith("error: there is no Python 3.11 or newer: install one")
    assert not (tmp_path / "venv").exists()


def test_a_python_that_makes_no_environments(tmp_path):
    """As Debian's without the package python3-venv."""
    fails = 'case $1 in -m) echo "ensurepip is not available"; exit 1;; *) exec "{python}" "$@";; esac'
    write_programs(tmp_path / "bin", dict.fromkeys(NAMES, fails))
    status, out, err = bash(f"make_venv {tmp_path}/venv", tmp_path / "bin")
    assert status == 2 and "ensurepip is not available" in out
    assert err.startswith("error: python3.11 makes no virtual environment, see above")


NO_PIP = 'case "$1 $2" in "-m pip"|"-m ensurepip") exit 1;; *) exec "{python}" "$@";; esac'
ENSURES = """case "$1 $2" in
"-m pip") test -e "$0.pip";;
"-m ensurepip") [ $# = 2 ] && touch "$0.pip";;
*) exec "{python}" "$@";; esac"""


@pytest.mark.parametrize(
    "python, status, says",
    [
        (NEW, 0, ""),
        (ENSURES, 0, ""),
        (OLD, 2, "has no Python 3.11 or newer: remove it, or name another folder"),
        (NO_PIP, 2, "has no pip and no ensurepip: remove it, or install pip into it (uv pip"),
    ],
)
def test_an_environment_that_is_there(tmp_path, python, status, says):
    write_programs(tmp_path / "venv" / "bin", {"python": python})
    got, _, err = bash(f"make_venv {tmp_path}/venv; need_pip; need_pip", "/nowhere")
    assert got == status and says in err and err.count("\n") == 0
    assert err.startswith(f"error: {tmp_path}/venv") or not err


def test_both_scripts_use_it():
    for name in ("demo.sh", "test.sh"):
        text = (ROOT / name).read_text()
        assert "source venv.sh" in text and "command -v" not in text and "need_pip" in text
        assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0


LOCAL = {"nano", "prepare", "bench", "tests"} | {path.stem for path in ROOT.glob("*.py")}
SCRIPTS = [
    path
    for folder in ("prepare", "bench")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_of_a_folder_imports_nano_first(path):
    """nano.py beside it then finds the other modules when the script is run by its path."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.partition(".")[0])
    assert next(name for name in names if name in LOCAL) == "nano"


@pytest.mark.parametrize("name", ["prepare/toy.py", "prepare/weights.py"])
def test_a_script_is_run_by_its_path(tmp_path, name):
    result = subprocess.run(
        [sys.executable, ROOT / name, "help"],
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "out=" in result.stdout and not result.stderr
