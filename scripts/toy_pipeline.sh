#!/usr/bin/env bash
# The whole way of a trained drafter in under a minute, on a tiny random target: record, train, diagnose, decode.
# Every text must be the target's own; the drafters are too small and too little trained to be fast.
#
#   bash scripts/toy_pipeline.sh [FOLDER]
set -euo pipefail
folder=$(realpath -ms "${1:-$(mktemp -d)}") # before the folder changes
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
mkdir -p "$folder"

python scripts/toy_target.py "$folder/target"
for i in $(seq 24); do echo "{\"prompt\": \"question $i\"}"; done > "$folder/questions.jsonl"
python -m pearl extract --target "$folder/target" --prompts "$folder/questions.jsonl" --self-written 8 \
  --max-new-tokens 24 --max-length 256 --batch 8 --shard 8 --top-k 8 --workers 1 --output "$folder/data"

cat > "$folder/feature.yaml" <<YAML
{target: $folder/target, data: $folder/data, output: $folder/feature, vocabulary: 100, depths: 4, epochs: 3, batch: 4}
YAML
cat > "$folder/distill.yaml" <<YAML
{target: $folder/target, data: $folder/data, output: $folder/small, vocabulary: 100, layers: [0, 5], epochs: 3, batch: 4}
YAML
accelerate launch --num_processes 1 -m pearl train --config "$folder/feature.yaml"
python -m pearl distill --config "$folder/distill.yaml"
python -m pearl diagnose --drafter "$folder/feature" --target "$folder/target" --data "$folder/data"

for draft in "$folder/feature" "$folder/small"; do
  python eval/humaneval.py --target "$folder/target" --draft "$draft" --mode ar sd pearl tree --limit 1 \
    --max-new-tokens 16 --max-length 2048 --no-score --output "$folder/run-$(basename "$draft")" --resume
done
python - "$folder" <<'PY'
import json, pathlib, sys
for summary in pathlib.Path(sys.argv[1]).glob("run-*/summary.json"):
    modes = json.loads(summary.read_text())["modes"]
    assert all(figures["identical_to_ar"] == 1.0 for figures in modes.values()), summary
print("all texts are the target's own")
PY
