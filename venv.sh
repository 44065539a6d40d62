# What demo.sh and test.sh share: a virtual environment of Python 3.11 or newer, with pip.

fail() {
    echo "error: $*" >&2
    exit 2
}

is_new() {
    "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
}

# make_venv FOLDER makes the environment if there is none, and sets $venv and $python to it.
make_venv() {
    venv=$1
    python=$venv/bin/python
    if [ -x "$python" ]; then
        is_new "$python" ||
            fail "$venv has no Python 3.11 or newer: remove it, or name another folder in NANOINSTRUCT_VENV"
        return
    fi
    # Each one is tried, because a shim of pyenv may stand for a version that is not active.
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if is_new "$candidate"; then
            "$candidate" -m venv "$venv" && return
            fail "$candidate makes no virtual environment, see above: install what it lacks, or put one into $venv"
        fi
    done
    fail "there is no Python 3.11 or newer: install one, or put a virtual environment of one into $venv"
}

# need_pip makes sure that the environment has pip. Those that uv makes come without.
need_pip() {
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        fail "$venv has no pip and no ensurepip: remove it, or install pip into it (uv pip install --python $python pip)"
}
