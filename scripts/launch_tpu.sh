#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU slice: the committed state of this checkout is copied there and
# installed, then the command runs in it. Where it fails it is run again, and training goes on from its checkpoint.
# Usage: bash scripts/launch_tpu.sh TPU ZONE COMMAND...
#   bash scripts/launch_tpu.sh pod us-west4-a python scripts/train.py --config configs/train_cepe.yaml --out=/mnt/runs/cepe
# `python` is the installed one. --out must be a directory that all workers share. A command that refuses its input
# (status 1), or fails within MINUTES (default 5) of its start, would fail again, and ends the launch; RESTARTS (default
# 100) bounds the other failures. A run that was stopped (status 75) goes on however often.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '4,5s/^# //p' scripts/launch_tpu.sh >&2 && exit 2; }
tpu=$1 zone=$2
port=${JAX_COORDINATOR_PORT:-8476}  # JAX takes 8482, which the firewall rule that comes with a v6e slice does not open
command=$(printf ' %q' "${@:3}")

on_all() { gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$1"; }
give_up() {
    echo "launch_tpu.sh: failed $((SECONDS - begun)) s after its start; what it printed says why" >&2
    exit 1
}

aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
git archive --format=tar.gz -o "$aside/archive" HEAD
gcloud compute tpus tpu-vm scp "$aside/archive" "$tpu:cepe_jax.tar.gz" --zone="$zone" --worker=all
# The images' own Python may be older than 3.11: uv then brings one.
on_all 'set -eu; mkdir -p cepe_jax; tar -xzf cepe_jax.tar.gz -C cepe_jax; cd cepe_jax; source scripts/environment.sh
PYTHON=$(command -v python3.12 || command -v python3.11) || {
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
}
install_into .venv ".[tpu]"'

failures=0
while true; do
    begun=$SECONDS
    # A worker whose connection broke may still run the command before this one: it ends once its peers are gone.
    # Each worker prints its status: gcloud's is at best the first failing worker's, and its own errors have 1 too.
    on_all "cd cepe_jax && source .venv/bin/activate && export JAX_COORDINATOR_PORT=$port && flock -E 70 -w 600 ~/cepe_jax.lock$command
status=\$?; echo \"launch_tpu.sh: a worker ended with status \$status\"; exit \$status" | tee "$aside/said" && all=1 || all=
    statuses=" $(sed -n 's/.*launch_tpu.sh: a worker ended with status //p' "$aside/said" | sort -u | tr '\n' ' ')"
    case $statuses in
    " 0 ") [ -z "$all" ] || exit 0 ;;  # else a worker's connection broke
    *" 1 "*) give_up ;;
    *" 75 "*)
        echo "launch_tpu.sh: stopped and saved after $((SECONDS - begun)) s; it goes on"
        sleep "${PAUSE:-30}"  # the machine may be going down
        continue
        ;;
    esac
    # Where no worker says a word none was reached, which may pass.
    if [ "$statuses" != " " ] && ((SECONDS - begun < 60 * ${MINUTES:-5})); then give_up; fi
    ((++failures <= ${RESTARTS:-100})) || give_up
    echo "launch_tpu.sh: failed after $((SECONDS - begun)) s; restart $failures"
    sleep "${PAUSE:-30}"
done
