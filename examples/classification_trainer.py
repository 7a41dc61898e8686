"""Fine-tune a sequence classifier with transformers' Trainer, with a rank for every matrix.

Needs a model (a folder or a hub name) and JSON lines of {"text": ..., "label": ...} to train on and to test on:

    python examples/classification_trainer.py MODEL train.jsonl test.jsonl --output adapter

Prints the plan, how far the order of the matrices had drifted after each epoch (Kendall's tau, 1: not at all),
how long that took to measure, and the accuracy on the test rows. Leaves the adapter in PEFT's format.
"""

import argparse
import json
from pathlib import Path

import transformers
from torch.utils.data import DataLoader

import sensilora
from sensilora.integrations.transformers import SensitivityCallback
from sensilora.targets import outermost_heads

parser = argparse.ArgumentParser()
for name in ("model", "train", "test"):
    parser.add_argument(name)
parser.add_argument("--output", default="adapter")
parser.add_argument("--average-rank", type=int, default=4)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--learning-rate", type=float, default=5e-4)
options = parser.parse_args()

lines = [Path(path).read_text().splitlines() for path in (options.train, options.test)]
rows = [list(map(json.loads, part)) for part in lines]
labels = sorted({row["label"] for row in rows[0]})
tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
train, test = (
    [{**tokenizer(row["text"], truncation=True), "labels": labels.index(row["label"])} for row in part]
    for part in rows
)
collator = transformers.DataCollatorWithPadding(tokenizer)

# A few hundred rows tell the order. What is new in the model, its head, is trained in full.
batches = DataLoader(train[:256], batch_size=16, collate_fn=collator)
plan = sensilora.allocate(sensilora.calibrate(model, batches), average_rank=options.average_rank)
print(plan.summary())
sensilora.inject(model, plan, modules_to_save=outermost_heads(model))

# report_to may be "tensorboard" or "wandb": what the callback logs gets there.
settings = {"num_train_epochs": options.epochs, "learning_rate": options.learning_rate, "save_strategy": "no"}
arguments = transformers.TrainingArguments(options.output + "-trainer", report_to="none", **settings)
trainer = transformers.Trainer(model, arguments, data_collator=collator, train_dataset=train)
callback = SensitivityCallback(plan, batches, trainer)
trainer.add_callback(callback)
trainer.train()
for drift in callback.history:
    print(f"epoch {drift.epoch:g}: Kendall's tau {drift.kendall_tau:.3f} ({drift.seconds:.2f} s)")

found = trainer.predict(test)
print(f"accuracy: {(found.predictions.argmax(-1) == found.label_ids).mean():.3f}")
if trainer.is_world_process_zero():
    print(f"wrote {sensilora.save_adapter(model, options.output)}")
