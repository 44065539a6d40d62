#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in order of value: the CUDA tests, then measurements.
#
#   bash bench/gpu.sh             # each step's output also goes to out/gpu/STEP.txt
#   DATA=alpaca.json MODEL=DIR NANOGPT=../nanoGPT PYTHON=.venv/bin/python bash bench/gpu.sh OUT
#
# DATA: instruction records, LLaMA-Factory's alpaca_en_demo.json if left out. MODEL: the model to
# fine-tune, of about 1B parameters; models/smollm2 if left out. NANOGPT: a checkout of nanoGPT to
# measure beside; without it pretraining is measured alone. A step that fails does not keep the next
# from running, and the script then ends with status 1.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
out=${1:-out/gpu}
failed=""
mkdir -p "$out"

step() {
    local name=$1
    shift
    echo "=== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt" || failed="$failed $name"
}

step cuda "$python" -m pytest -q tests/test_cuda.py
step sft "$python" -m bench.sft data="${DATA:-alpaca_en_demo.json}" \
    model="${MODEL:-models/smollm2}" device=cuda micro_batch=16 max_length=1024 trl_batch=80 \
    "sides=[ours,compiled,trl,trl-packed]" steps=10 repeats=1 threads=8
step infer-1b "$python" -m bench.infer model=random-1b device=cuda 'batches=[1,64]' prompt=512 \
    new=256 mixed=256 'sides=[ours,transformers,static]' threads=8
step infer-8b "$python" -m bench.infer model=random-8b device=cuda 'batches=[1,64]' prompt=512 \
    new=256 mixed=256 unequal=0 'sides=[ours,static]' threads=8
step pretrain "$python" -m bench.pretrain nanogpt="${NANOGPT:-}" device=cuda micro_batch=32 \
    max_length=1024 rounds=1 steps=20 "compile=[true]" "malloc=[tuned]" threads=8

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
