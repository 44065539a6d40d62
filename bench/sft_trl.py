"""The peer's half of the fine-tuning comparison: TRL's SFTTrainer on what sft.py takes.

    python -m bench.sft_trl model=models/smollm2 data=data/alpaca out=out/bench/trl lora_rank=0

Rows, learning rate, batch and epochs are those of sft.py. `data` is a prepared folder, whose
tokens and masks TRL takes as they are. TRL's defaults stay as a user finds them: rows padded to
the longest of the batch, chunked loss, autocast over fp32 weights. The result is a Hugging
Face directory, to be scored by `sft.py epochs=0`.
"""

import json
import os
import time
from dataclasses import dataclass
from typing import Annotated, Literal

from nano import config, store, tokenizer
from nano.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    With,
)


@dataclass
class Config:
    model: PathText = "models/smollm2"
    data: PathText = "data/alpaca"
    out: PathText = "out/bench/trl"
    epochs: NonNegativeFloat = 3.0
    steps: NonNegativeInt = 0  # stop earlier; 0: after `epochs`
    micro_batch: PositiveInt = 4  # rows of one forward
    accumulate: int = 4  # forwards of one optimizer step
    max_length: PositiveInt = 512
    lr: NonNegativeFloat = 2e-5
    lora_rank: NonNegativeInt = 0
    lora_alpha: PositiveFloat = 32
    quant: Annotated[Literal["none", "nf4", "fp4"], With("lora_rank")] = "none"  # by bitsandbytes
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the matrix work, by autocast
    packing: bool = False
    threads: int = 2
    seed: Seed = 0


def main(cfg):
    start = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import resource

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(cfg.threads)
    data = store.Store(cfg.data, "train")
    rows = [
        dict(input_ids=ids.tolist(), completion_mask=mask.tolist())
        for ids, mask in map(data.row, range(len(data)))
    ]
    steps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            steps.append((self.began, time.perf_counter()))

    args = SFTConfig(
        output_dir=cfg.out,
        per_device_train_batch_size=cfg.micro_batch,
        gradient_accumulation_steps=cfg.accumulate,
        max_length=cfg.max_length,
        packing=cfg.packing,
        completion_only_loss=True,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.steps or -1,
        learning_rate=cfg.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        bf16=cfg.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=cfg.seed,
    )
    lora = None
    if cfg.lora_rank:
        lora = LoraConfig(
            r=cfg.lora_rank,
            lora_alpha=cfg.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    how = {}
    if cfg.quant != "none":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=cfg.quant,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, cfg.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32, **how)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(cfg.model),
        callbacks=[Clock()],
        peft_config=lora,
    )
    counts, collate = [], trainer.data_collator

    def counted(features):
        batch = collate(features)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        counts.append(int(mask.sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    model = trainer.model
    if cfg.lora_rank and cfg.quant == "none":
        model = model.merge_and_unload()
    model.save_pretrained(cfg.out)  # an adapter on a quantised base stays one
    # save_pretrained would write the tokenizer anew, and sft.py would take it for another one.
    tokenizer.copy_files(cfg.model, cfg.out)
    timed = steps[1:]  # the first step warms up
    seconds = sum(end - began for began, end in timed)
    real = sum(counts[cfg.accumulate : len(steps) * cfg.accumulate])
    result = dict(
        steps=len(steps),
        first_step_s=round(steps[0][1] - start, 1),
        real_tokens_per_s=round(real / max(seconds, 1e-9), 1),
        peak_rss_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )
    if torch.cuda.is_available():
        result["peak_device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    config.run(main, Config)
