#!/usr/bin/env bash
# Train on all workers of a Cloud TPU slice; from the root of the repository, on any machine with gcloud:
#
#   TPU_NAME=zipir TPU_ZONE=us-east5-a launch/tpu_pod.sh configs/small_dit.py [--field value ...]
#
# Sends the repository's tracked files to every worker, installs them there and starts the same command on all. If the
# slice is preempted it is made anew and training goes on from the newest checkpoint, as often as it takes; trainers that
# crash are started again, RESTARTS times at most. SIGTERM, Ctrl-C or the end of the terminal let them save and stop.
#
#   TPU_NAME, TPU_ZONE     of the slice
#   TPU_TYPE, TPU_VERSION  accelerator and software, such as v5p-64 and v2-alpha-tpuv5; only needed to make a slice
#   TPU_CREATE             more arguments for making it, such as "--spot"
#   TPU_SETUP              command that every worker runs before the installation: install Python 3.11 or newer, mount the
#                          disk that all workers share, with the photographs and the folder of the run
#   TPU_PYTHON             python3, of the workers
#   RESTARTS               3
#   RESTART_DELAY          30, seconds; also between two looks at a slice that is not ready
set -u

if [ $# -eq 0 ]; then
  echo "usage: TPU_NAME=NAME TPU_ZONE=ZONE launch/tpu_pod.sh CONFIG [--field value ...]" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "gcloud is missing: install the Google Cloud CLI" >&2
  exit 2
fi
for name in TPU_NAME TPU_ZONE; do
  if [ -z "${!name:-}" ]; then
    echo "$name is missing: set it to the name and zone of the TPU slice" >&2
    exit 2
  fi
done
config=$1
shift
restarts_left=${RESTARTS:-3}

tpu() { # COMMAND [ARGUMENT ...]
  gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$TPU_ZONE" "${@:2}"
}

pause() { # in short naps, since a trap waits for the command that is running
  local nap
  for ((nap = 0; nap < ${RESTART_DELAY:-30}; nap++)); do [ -n "$stopped" ] || sleep 1; done
}

# The slice's state, such as READY or PREEMPTED; empty where there is none of this name.
state() { tpu describe --format='value(state)' 2>/dev/null; }

make_slice() {
  local extra
  read -ra extra <<<"${TPU_CREATE:-}"
  tpu create --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" ${extra[@]+"${extra[@]}"}
}

# Returns once there is a slice or the script was told to stop; with 2 if there is none and none can be made.
await_slice() {
  local found
  while [ -z "$stopped" ]; do
    found=$(state)
    case $found in
      READY) return 0 ;;
      '' | PREEMPTED | TERMINATED)
        if [ -z "${TPU_TYPE:-}" ] || [ -z "${TPU_VERSION:-}" ]; then
          echo "$TPU_NAME is ${found:-not there}: TPU_TYPE and TPU_VERSION are needed to make it" >&2
          return 2
        fi
        [ -z "$found" ] || tpu delete --quiet
        make_slice && continue
        ;;
    esac
    echo "$TPU_NAME is ${found:-not there yet}" >&2
    pause
  done
  return 0
}

# Sends and installs the tracked files, as they are here.
set_up() {
  local archive status
  archive=$(mktemp) || return
  git ls-files -z | tar --create --gzip --file="$archive" --null --files-from=- &&
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:zipir_jax.tar.gz" --zone="$TPU_ZONE" --worker=all &&
    tpu ssh --worker=all --command="set -e
      ${TPU_SETUP:-}
      mkdir -p zipir_jax
      tar xzf zipir_jax.tar.gz -C zipir_jax
      cd zipir_jax
      ${TPU_PYTHON:-python3} -m venv .venv
      .venv/bin/python -m pip install --quiet -r requirements.txt -e '.[tpu]'"
  status=$?
  rm -f "$archive"
  return "$status"
}

# What stops a worker's trainer, and waits until it has saved. A number in the file that is by now another program's is
# told by the name.
# shellcheck disable=SC2016 # the worker's shell expands it
stop_trainer='cd zipir_jax
  pid=$(cat train.pid 2>/dev/null) && grep -qs zipir_jax.train "/proc/$pid/cmdline" &&
    kill -TERM "$pid" && tail --pid="$pid" -f /dev/null'

# One that outlived its connection holds the TPU: it is stopped first.
start_trainer="($stop_trainer)
  cd zipir_jax && echo \$\$ >train.pid &&
  exec .venv/bin/python -m zipir_jax.train $(printf ' %q' --config "$config" --resume auto "$@")"

workers=
stopped=
# shellcheck disable=SC2317 # `trap` calls it
stop() {
  stopped=yes
  [ -z "$workers" ] || tpu ssh --worker=all --command="$stop_trainer"
}
trap stop TERM INT HUP

status=0
installed=
while :; do
  await_slice || exit
  [ -z "$stopped" ] || break
  if [ -z "$installed" ]; then
    set_up && installed=yes
    status=$?
    [ -z "$stopped" ] || break
  fi
  if [ -n "$installed" ]; then
    # In a session of its own: Ctrl-C reaches this script alone, which stops the workers.
    setsid gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --worker=all --command="$start_trainer" \
      </dev/null &
    workers=$!
    # A signal ends `wait`, not the trainers. Of what has ended `wait` tells the status as often as it is asked.
    while kill -0 "$workers" 2>/dev/null; do wait "$workers"; done
    wait "$workers"
    status=$?
    workers=
    # 2 is the trainer's word for a setting that cannot work, and cannot work the next time.
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ]; then break; fi
  fi
  if [ "$(state)" != READY ]; then # the slice was taken away: nobody's fault
    installed=
    status=0
    continue
  fi
  if [ "$restarts_left" -le 0 ]; then
    echo "set-up or training ended with status $status; no restarts are left" >&2
    break
  fi
  echo "set-up or training ended with status $status; restarts left: $restarts_left" >&2
  restarts_left=$((restarts_left - 1))
  pause
  [ -z "$stopped" ] || break
done
exit "$status"
