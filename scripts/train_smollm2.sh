#!/usr/bin/env bash
# The drafters of the default target that come with this repository, from nothing: questions, the target's own answers,
# the feature drafter, the small draft model. On two CPU cores it takes hours; a run that was cut off goes on where it was.
#
#   GSM8K=path/to/gsm8k/train.jsonl bash scripts/train_smollm2.sh
#
# The questions have nothing to do with HumanEval, MT-bench, Spec-Bench, MGSM or the test set of GSM8K.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
questions=data/questions
mkdir -p "$questions"
python scripts/python_prompts.py 2200 > "$questions/python.jsonl"
python scripts/general_prompts.py 1600 > "$questions/general.jsonl"
head -n 1500 "${GSM8K:?set GSM8K to the training set, https://github.com/openai/grade-school-math}" > "$questions/gsm8k.jsonl"

python -m pearl extract --prompts "$questions"/{python,gsm8k,general}.jsonl --self-written 500 \
  --max-new-tokens 256 --shard 96 --output data/smollm2-135m
accelerate launch --num_processes 1 -m pearl train --config configs/feature/smollm2-135m.yaml
accelerate launch --num_processes 1 -m pearl distill --config configs/distill/smollm2-135m.yaml
python -m pearl diagnose --drafter results/feature-smollm2-135m --data data/smollm2-135m
