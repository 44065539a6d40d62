#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in order of value: the CUDA tests, then measurements.
#
#   bash bench/gpu.sh             # each step's output also goes to out/gpu/STEP.txt
#   DATA=alpaca.json MODEL=DIR NANOGPT=../nanoGPT PYTHON=.venv/bin/python bash bench/gpu.sh OUT
#
# DATA: instruction records, LLaMA-Factory's alpaca_en_demo.json if left out. MODEL: the model to
# fine-tune, of about 1B parameters; models/smollm2 if left out. NANOGPT: a checkout of nanoGPT to
# measure beside; without it pretraining is measured alone. LARGE: a model of about 8B parameters,
# for QLoRA beside LoRA and for PPO on one nf4 trunk; without it they are left out. A step that fails
# does not keep the next from running, and the script then ends with status 1.
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
if [ -n "${LARGE:-}" ]; then
    step qlora "$python" -m bench.sft data="${DATA:-alpaca_en_demo.json}" model="$LARGE" \
        device=cuda micro_batch=1 max_length=2048 trl_batch=10 "methods=[lora,qlora]" \
        "sides=[ours,compiled,trl]" steps=10 repeats=1 threads=8 out="$out/qlora"
    for kernel in torch bitsandbytes; do
        step "qlora-$kernel" "$python" sft.py model="$LARGE" data="$out/qlora/data" quant=nf4 \
            quant_kernel=$kernel lora_rank=16 batch_size=1 micro_batch=1 max_length=2048 steps=10 \
            log_every=1 samples=0 save_every=-1 grad_checkpoint=true out="$out/qlora-$kernel"
    done
    step ppo-qlora "$python" ppo.py model="$LARGE" data="$out/qlora/data" quant=nf4 lora_rank=16 \
        reward=prepare/toy.py:gold batch_size=32 micro_batch=1 max_new_tokens=256 \
        grad_checkpoint=true steps=2 sample_every=-1 save_every=-1 out="$out/ppo-qlora"
fi
step pretrain "$python" -m bench.pretrain nanogpt="${NANOGPT:-}" device=cuda micro_batch=32 \
    max_length=1024 rounds=1 steps=20 "compile=[true]" "malloc=[tuned]" threads=8

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
