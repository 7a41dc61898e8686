"""Fine-tune a causal language model with TRL's SFTTrainer and PEFT, with a rank for every matrix.

Needs `pip install trl`, a model (a folder or a hub name) and JSON lines of {"text": ...}:

    python examples/sft_trainer.py MODEL train.jsonl --output adapter

Prints the plan, how far the order of the matrices had drifted after each epoch (Kendall's tau, 1: not at all),
and how long that took to measure. Leaves the adapter as PEFT saves it.
"""

import argparse

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

import sensilora
from sensilora.integrations.peft import use_fused
from sensilora.integrations.transformers import SensitivityCallback

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("--output", default="adapter")
parser.add_argument("--average-rank", type=int, default=8)
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

data = load_dataset("json", data_files=options.train, split="train")
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")

# A few hundred texts tell the order. "activation", the default, reads inputs alone; estimator="fisher" labels too.
texts = [tokenizer(text, truncation=True, max_length=512) for text in data["text"][:256]]
batches = DataLoader(texts, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
plan = sensilora.allocate(sensilora.calibrate(model, batches), average_rank=options.average_rank)
print(plan.summary())

settings = {"num_train_epochs": options.epochs, "learning_rate": 2e-4, "bf16": torch.cuda.is_available()}
trainer = SFTTrainer(
    model,
    SFTConfig(options.output, report_to="none", **settings),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=use_fused(plan.to_lora_config(task_type="CAUSAL_LM")),
)
callback = SensitivityCallback(plan, batches, trainer)
trainer.add_callback(callback)
trainer.train()
for drift in callback.history:
    print(f"epoch {drift.epoch:g}: Kendall's tau {drift.kendall_tau:.3f} ({drift.seconds:.2f} s)")
trainer.save_model()
print(f"wrote {options.output}")
