#!/usr/bin/env bash
# Temperature 0 to 1.5: what is left of the speed-up where the text is harder to guess.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
for temperature in ${TEMPERATURES:-0 0.3 0.6 1 1.5}; do
  row "humaneval-temperature-$temperature" humaneval --mode $MODES --temperature "$temperature"
done
sweep temperature "Temperature"
