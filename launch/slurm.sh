#!/usr/bin/env bash
#SBATCH --job-name=zipir
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#
# Train on N nodes of a SLURM cluster, with one process per GPU; from the root of the repository:
#
#   sbatch --nodes=4 launch/slurm.sh configs/small_dit.py [--field value ...]
#
# Options of sbatch override those above: a task per GPU of a node, 600 seconds before the end for the last checkpoint.
# Then the job goes back into the queue and on from that checkpoint, until the training is done. Trainers that crash are
# started again within the job, RESTARTS times at most. SIGTERM lets them save and ends the job for good.
#
#   PYTHON          .venv/bin/python where there is one, else python
#   RESTARTS        3
#   RESTART_DELAY   10, seconds
set -u

if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG [--field value ...]" >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "SLURM_JOB_ID is missing: start this script with sbatch, or use launch/node.sh" >&2
  exit 2
fi
config=$1
shift
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
restarts_left=${RESTARTS:-3}

# Each can be overridden from outside.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.9}
export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL-O1} # communication overlaps with computing
# On Hopper, kernels and communication start in the order in which they were queued; on others that only costs.
if [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)" = 9.0 ]; then
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1}
fi
# srun has not taken this over from sbatch since SLURM 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

step=
stopped=
requeue=
# shellcheck disable=SC2317 # `trap` calls it
stop() {
  # Once: the trainers take the second signal that they get for impatience. By scancel, since srun itself would answer
  # SIGTERM by killing them.
  local already=$stopped
  stopped=yes
  [ -n "$already" ] || [ -z "$step" ] || scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop TERM
trap 'requeue=yes; stop' USR1

while :; do
  # Every process sees all GPUs of its node and jax gives it one, by SLURM_LOCALID; so no --gpus-per-task. If one
  # process dies the others would wait for it for ever; so --kill-on-bad-exit.
  srun --kill-on-bad-exit=1 "$PYTHON" -m zipir_jax.train --config "$config" --resume auto "$@" &
  step=$!
  # A signal ends `wait`, not srun. Of one that has ended `wait` tells the status as often as it is asked.
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  status=$?
  step=

  # 2 is the trainer's word for a setting that cannot work, and cannot work the next time.
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ]; then break; fi
  if [ "$restarts_left" -le 0 ]; then
    echo "the trainers ended with status $status; no restarts are left" >&2
    break
  fi
  echo "the trainers ended with status $status; restarts left: $restarts_left" >&2
  restarts_left=$((restarts_left - 1))
  # In short naps: a trap waits for the command that is running.
  for ((nap = 0; nap < ${RESTART_DELAY:-10}; nap++)); do [ -n "$stopped" ] || sleep 1; done
  [ -z "$stopped" ] || break
done
if [ -n "$requeue" ]; then
  echo "the time is up: the job goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit
fi
exit "$status"
