#!/usr/bin/env bash
# Started by srun, once on every node of a job: PROCESSES processes in all, in the order of the nodes.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
  --num_processes "$PROCESSES" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$head" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" "$@"
