"""Fine-tune a causal language model in a plain PyTorch loop, with a rank for every matrix.

Needs a model (a folder or a hub name) and a text file, one text a line:

    python examples/plain_loop.py MODEL train.txt --output adapter

Prints the plan, the mean loss of each epoch, and how the order of the matrices in the trained model compares with the
order that the ranks were allotted by. Leaves the adapter in PEFT's format.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import sensilora

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("--output", default="adapter")
parser.add_argument("--average-rank", type=int, default=8)
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
lines = [line for line in Path(options.train).read_text().splitlines() if line.strip()]
texts = [tokenizer(line, truncation=True, max_length=512) for line in lines]
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # makes labels, -100 on padding
calibration = DataLoader(texts[:256], batch_size=8, collate_fn=collator)

report = sensilora.calibrate(model, calibration)
plan = sensilora.allocate(report, average_rank=options.average_rank)
print(plan.summary())
sensilora.inject(model, plan, dropout=0.05)  # freezes all else

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
model.train()
for epoch in range(options.epochs):
    losses = []
    for batch in DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collator):
        loss = model(**batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}")

print(f"wrote {sensilora.save_adapter(model, options.output)}")
sensilora.unload(sensilora.merge(model))
print(report.compare(sensilora.calibrate(model, calibration)))
