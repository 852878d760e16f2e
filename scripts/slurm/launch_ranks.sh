#!/usr/bin/env bash
# Started by srun, once on every node of a job: PROCESSES processes in all, as many a node as it has GPUs (or PER_NODE),
# and on the last node those that are left. They may differ in number, which accelerate launch can't; torchrun can.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
each=${PER_NODE:-$SLURM_GPUS_ON_NODE} before=$((SLURM_NODEID * ${PER_NODE:-$SLURM_GPUS_ON_NODE}))
here=$((SLURM_NODEID < SLURM_NNODES - 1 ? each : PROCESSES - before))
if ((before + here > PROCESSES || here < 1)); then
  echo "error: $PROCESSES processes, $each a node, do not reach the last of $SLURM_NNODES nodes: ask for fewer." >&2
  exit 2
fi
exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$here" \
  --master_addr "$head" --master_port "$((20000 + SLURM_JOB_ID % 20000))" "$@"
