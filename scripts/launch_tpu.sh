#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU slice: the committed state of this checkout is copied there and
# installed, then the command runs in it. Where it fails it is run again, and training goes on from its checkpoint.
# Usage: bash scripts/launch_tpu.sh TPU ZONE COMMAND...
#   bash scripts/launch_tpu.sh pod us-west4-a python scripts/train.py --config configs/train_cepe.yaml --out=/mnt/runs/cepe
# `python` is the installed one. --out must be a directory that all workers share. A command that fails within
# MINUTES (default 5) of its start would fail again, and ends the launch; RESTARTS (default 100) bounds the others.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '4,5s/^# //p' scripts/launch_tpu.sh >&2 && exit 2; }
tpu=$1 zone=$2
command=$(printf ' %q' "${@:3}")

on_all() { gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$1"; }

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$tpu:cepe_jax.tar.gz" --zone="$zone" --worker=all
# The images' own Python may be older than 3.11: uv then brings one.
on_all 'set -eu; mkdir -p cepe_jax; tar -xzf cepe_jax.tar.gz -C cepe_jax; cd cepe_jax; source scripts/environment.sh
PYTHON=$(command -v python3.12 || command -v python3.11) || {
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
}
install_into .venv ".[tpu]"'

for ((restart = 0; ; restart++)); do
    begun=$SECONDS
    # A worker whose connection broke may still run the command before this one: it ends once its peers are gone.
    on_all "cd cepe_jax; source .venv/bin/activate; exec flock -w 600 ~/cepe_jax.lock$command" && exit
    if ((SECONDS - begun < 60 * ${MINUTES:-5} || restart >= ${RESTARTS:-100})); then
        echo "launch_tpu.sh: failed $((SECONDS - begun)) s after its start; what it printed says why" >&2
        exit 1
    fi
    echo "launch_tpu.sh: failed after $((SECONDS - begun)) s; restart $((restart + 1))"
    sleep "${PAUSE:-30}"
done
