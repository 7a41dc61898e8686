"""Write a rank plan into an axolotl config: see axolotl.yml for the three commands it is one of.

Needs a plan that `sensilora plan` wrote, and the config without ranks:

    python examples/axolotl_ranks.py plan.json axolotl.yml --output ranks.yml

Prints how many matrices got a rank. Every matrix is named in full, with a pattern of its own, because PEFT, which
axolotl hands these fields to, takes a short name or pattern for the end of any name.
"""

import argparse
import sys
from pathlib import Path

import yaml

from sensilora import RankPlan

parser = argparse.ArgumentParser()
parser.add_argument("plan")
parser.add_argument("config")
parser.add_argument("--output", default="ranks.yml")
options = parser.parse_args()

lora = RankPlan.load(options.plan).to_lora_config()
ranks = {
    "lora_r": lora.r,
    "lora_alpha": lora.lora_alpha,
    "lora_target_modules": sorted(lora.target_modules),
    "lora_rank_pattern": lora.rank_pattern,
    "lora_alpha_pattern": lora.alpha_pattern,
    "peft_use_rslora": lora.use_rslora,
}
config = yaml.safe_load(Path(options.config).read_text())
if not all(isinstance(alpha, int) for alpha in (lora.lora_alpha, *lora.alpha_pattern.values())):
    sys.exit("axolotl takes whole alphas only: make the plan with a whole --scaling")
if lora.exclude_modules:
    sys.exit(f"axolotl cannot leave out {min(lora.exclude_modules)}: make the plan with --min-rank 1")
if given := sorted({*ranks, "lora_target_linear"} & set(config)):
    sys.exit(f"{options.config} sets {given[0]}, which follows from the plan: leave it out there")
Path(options.output).write_text(yaml.safe_dump({**config, **ranks}, sort_keys=False))
print(f"wrote {options.output}: {len(ranks['lora_target_modules'])} matrices, ranks up to {lora.r}")
