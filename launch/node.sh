#!/usr/bin/env bash
# Train on all NVIDIA GPUs of this machine, with one process:
#
#   launch/node.sh configs/small_dit.py [--field value ...]
#
# It goes on from the run's newest checkpoint, if there is one. A trainer that crashes is started again, RESTARTS times
# at most. SIGTERM, Ctrl-C or the end of the terminal let it save a checkpoint and end with status 0; a second signal
# ends it at once.
#
#   PYTHON          .venv/bin/python where there is one, else python
#   RESTARTS        3
#   RESTART_DELAY   10, seconds
set -u

if [ $# -eq 0 ]; then
  echo "usage: launch/node.sh CONFIG [--field value ...], such as launch/node.sh configs/small_dit.py" >&2
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

trainer=
stopped=
# shellcheck disable=SC2317 # `trap` calls it
stop() {
  stopped=yes
  [ -z "$trainer" ] || kill -TERM "$trainer"
}
trap stop TERM INT HUP

while :; do
  # In a session of its own: Ctrl-C reaches this script alone, which passes it on once. The trainer takes the second
  # signal that it gets for impatience.
  setsid "$PYTHON" -m zipir_jax.train --config "$config" --resume auto "$@" </dev/null &
  trainer=$!
  # A signal ends `wait`, not the trainer. Of one that has ended `wait` tells the status as often as it is asked.
  while kill -0 "$trainer" 2>/dev/null; do wait "$trainer"; done
  wait "$trainer"
  status=$?
  trainer=

  # 2 is the trainer's word for a setting that cannot work, and cannot work the next time.
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ]; then break; fi
  if [ "$restarts_left" -le 0 ]; then
    echo "the trainer ended with status $status; no restarts are left" >&2
    break
  fi
  echo "the trainer ended with status $status; restarts left: $restarts_left" >&2
  restarts_left=$((restarts_left - 1))
  # In short naps: a trap waits for the command that is running.
  for ((nap = 0; nap < ${RESTART_DELAY:-10}; nap++)); do [ -n "$stopped" ] || sleep 1; done
  [ -z "$stopped" ] || break
done
exit "$status"
