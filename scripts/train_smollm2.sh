#!/usr/bin/env bash
# The drafters of the default target that come with this repository, from nothing. Stages, and hours on two CPU cores:
#
#   questions  of templates, lists, Python's library and GSM8K's training set       a minute
#   answers    the target's own, of which one in three is drawn at temperature 1    5
#   overlap    leaves out what has 13 words in a row in common with an evaluation   a few minutes
#   feature    the head over the target's hidden states, of one layer, then of two  3
#   draft      the small draft model, 21,000 steps on all texts                     over 10
#   more       that one trained on, and mixed with what it was                      4
#   pard       that one trained to guess five tokens a forward                      5
#   diagnose   what each of them reaches along the last texts
#
#   DATA=folder bash scripts/train_smollm2.sh                    all of them
#   DATA=folder bash scripts/train_smollm2.sh questions answers  these stages
#   DATA=folder SECONDS_AT_MOST=10000 bash scripts/train_smollm2.sh
#
# The last one ends after so many seconds with the shard or the step at hand, in a checkpoint, and with code 124. The same
# call goes on there, as it does after Ctrl-C; what is finished is not made again.
#
# DATA holds gsm8k/train.jsonl (https://github.com/openai/grade-school-math). What lies there for the evaluations,
# gsm8k/test.jsonl, mgsm/*.jsonl, mt_bench/question.jsonl and spec_bench/question.jsonl, is compared with the questions
# and with the answers, as HumanEval is.
set -euo pipefail
refused() {
  echo "error: $1" >&2
  exit 2
}
[[ -d ${DATA:-} ]] || refused "set DATA to the folder that holds gsm8k/train.jsonl: '${DATA:-}' is none."
DATA=$(realpath "$DATA") # before the folder changes
[[ ${SECONDS_AT_MOST:-0} =~ ^(0|[1-9][0-9]*)$ ]] || refused "SECONDS_AT_MOST must be a whole number."
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
questions=data/questions texts=data/smollm2-135m stages="questions answers overlap feature draft more pard diagnose"

over() {
  echo "the time is over: the same call goes on there" >&2
  exit 124
}
limited() { # ends a command when the time of this call is over; one that is deaf to Ctrl-C hears of it too
  local left=0 ended=0
  if ((${SECONDS_AT_MOST:-0})); then
    left=$((SECONDS_AT_MOST - SECONDS))
    ((left > 0)) || over
  fi
  timeout --foreground --signal=INT "$left" env --default-signal=INT "$@" || ended=$?
  ((ended != 124)) || over
  return "$ended"
}
without_evaluations() { # leaves out of files or a recording what they have in common with the evaluations
  local against=() one
  for one in "$DATA"/gsm8k/test.jsonl "$DATA"/mgsm/*.jsonl "$DATA"/{mt_bench,spec_bench}/question.jsonl; do
    [[ ! -e $one ]] || against+=("$one")
  done
  python scripts/overlap.py "$@" --drop --against "${against[@]}"
}

questions() {
  [[ -f $DATA/gsm8k/train.jsonl ]] || refused "$DATA has no gsm8k/train.jsonl: get it, or set DATA to a folder with it."
  mkdir -p "$questions"
  python scripts/python_prompts.py 2600 > "$questions/python.jsonl"
  python scripts/general_prompts.py 2400 > "$questions/general.jsonl"
  python scripts/prose_prompts.py 7000 > "$questions/prose.jsonl"
  head -n 2400 "$DATA/gsm8k/train.jsonl" > "$questions/gsm8k.jsonl"
  without_evaluations "$questions"/*.jsonl
}
answers() { # to 17,900 prompts, some with a second turn: about 21,600 answers with 4 million tokens
  limited pearl extract --prompts "$questions"/{python,general,prose,gsm8k}.jsonl --self-written 3500 \
    --max-new-tokens 256 --max-length 1024 --temperature 0 0 1 --dtype bfloat16 --shard 192 --batch 96 --output "$texts"
}
overlap() { without_evaluations "$texts"; } # also questions that the target wrote itself, second turns and the answers
feature() { # of one layer, then of two
  limited pearl train --config configs/feature/smollm2-135m.yaml --markov-rank 32 --borrow
  limited pearl train --config configs/feature/smollm2-135m-more.yaml
}
draft() { limited pearl distill --config configs/distill/smollm2-135m.yaml; }
more() {
  limited pearl distill --config configs/distill/smollm2-135m-more.yaml --start results/distill-smollm2-135m
  python scripts/mix_weights.py results/distill-smollm2-135m results/distill-smollm2-135m-more --share 0.75 \
    --output results/distill-smollm2-135m-mixed
}
pard() {
  limited pearl distill --config configs/distill/smollm2-135m-pard.yaml --start results/distill-smollm2-135m-mixed
}
diagnose() { # those that are trained
  local one found=""
  for one in results/{feature-smollm2-135m-more,distill-smollm2-135m-mixed,pard-smollm2-135m}; do
    [[ -e $one ]] || continue
    pearl diagnose --drafter "$one" --data "$texts"
    found=$one
  done
  [[ $found ]] || refused "results has no drafter to diagnose: the stages feature, more and pard train some."
}

for one in ${*:-$stages}; do
  [[ " $stages " == *" $one "* ]] || refused "there is no stage $one: name some of $stages."
done
for one in ${*:-$stages}; do "$one"; done
