#!/usr/bin/env bash
# REPLICAS servers on this machine, each a target and a drafter on GPUS_EACH GPUs of its own, or on its share of the CPUs
# where there are none; behind one address where haproxy is installed. SIGTERM lets running texts finish, then all end.
#   REPLICAS=4 PAIR=llama3-1b-8b PORT=8000 OPTIONS="--max-sequences 16" bash scripts/serve_replicas.sh
# READY=1: everything is installed, don't look.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${READY:-} ]]; then source scripts/environment.sh run; fi
replicas=${REPLICAS:-2} each=${GPUS_EACH:-2} port=${PORT:-8000} host=${HOST:-127.0.0.1}
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -r -a cards <<< "${CUDA_VISIBLE_DEVICES#-1}" # -1 hides them all
else
  count=${SLURM_GPUS_ON_NODE:-$( (nvidia-smi -L 2>/dev/null || true) | wc -l)} cards=()
  for ((n = 0; n < count; n++)); do cards+=("$n"); done
fi
gpus=${#cards[@]}
there=$(python -c 'import os; print(*sorted(os.sched_getaffinity(0)))')
read -r -a cpus <<< "$there"
if ((gpus && replicas * each > gpus)); then
  echo "error: $replicas replicas of $each GPUs need $((replicas * each)), and there are $gpus: set REPLICAS or GPUS_EACH." >&2
  exit 2
fi
balancer=$(command -v haproxy || true)
servers="" pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT
for ((n = 0; n < replicas; n++)); do
  place=(env)
  if ((gpus)); then
    mine=("${cards[@]:$((n * each)):each}")
    place+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")")
  elif ((replicas <= ${#cpus[@]})); then
    share=("${cpus[@]:$((n * ${#cpus[@]} / replicas)):$(((n + 1) * ${#cpus[@]} / replicas - n * ${#cpus[@]} / replicas))}")
    place+=(taskset -c "$(IFS=,; echo "${share[*]}")")
  fi
  at=$((port + 1 + n)) listen=127.0.0.1
  [[ $balancer ]] || listen=$host
  # shellcheck disable=SC2086
  "${place[@]}" pearl serve ${PAIR:+--pair "$PAIR"} --host "$listen" --port "$at" ${OPTIONS:-} &
  pids+=($!)
  servers+="    server replica$((n + 1)) 127.0.0.1:$at check"$'\n'
done
front=""
if [[ $balancer ]]; then
  config=$(mktemp)
  trap 'rm -f "$config"' EXIT
  sed "/^    server /d; s/bind 127.0.0.1:8000/bind $host:$port/" configs/balancer/haproxy.cfg > "$config"
  printf '%s' "$servers" >> "$config"
  "$balancer" -f "$config" &
  front=$!
  sleep 1
  if ! kill -0 "$front" 2>/dev/null; then # it has said why, such as a port that is taken
    stop
    wait
    exit 1
  fi
  echo "$replicas replicas are served at http://$host:$port as soon as they are loaded"
else
  echo "haproxy is not installed: the replicas are at the ports from $((port + 1)) to $((port + replicas))"
fi
code=0
for pid in "${pids[@]}"; do
  status=0
  wait "$pid" || status=$?
  if ((status > 128)); then # a signal has ended the wait, not the replica
    status=0
    wait "$pid" || status=$?
  fi
  ((status == 0)) || code=$status
done
[[ $front ]] && kill "$front" 2>/dev/null || true
exit "$code"
