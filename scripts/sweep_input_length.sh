#!/usr/bin/env bash
# Prompts of 128 to 8,000 tokens of real text, as far as the model reads (MAX_LENGTH): speed-up and acceptance length.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
row input-length input_length --mode $MODES --skip-too-long --max-length "${MAX_LENGTH:-8192}" --no-score
sweep input_length "Input length" --by-category
