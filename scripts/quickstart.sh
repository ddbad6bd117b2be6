#!/usr/bin/env bash
# CEPE on real long documents, from nothing: the source files of Python's standard library.
# Trains a tokenizer, a small decoder, an encoder, the warm-up and the main stage; then measures what contexts buy.
# Usage: bash scripts/quickstart.sh [--out DIR]     (default out/quickstart)
# What is finished is not done again: an interrupted run goes on where it was.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
out=$PWD/out/quickstart
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a directory} && shift 2 ;;
    --out=*) out=${1#--out=} && shift ;;
    *) echo "quickstart.sh: unknown argument $1: only --out DIR" >&2 && exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "quickstart.sh: --out is empty: give a directory" >&2 && exit 2; }
case $out in /*) ;; *) out=$called_from/$out ;; esac

source scripts/environment.sh
install_into .venv .
export JAX_PLATFORMS=cpu
library=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mkdir -p "$out"

# stage NAME RESULT SCRIPT ARGUMENT...: runs the script unless its result exists, and notes the seconds it took
stage() {
    local name=$1 result=$2 begun=$SECONDS status=0
    shift 2
    if [ -e "$out/$result" ]; then echo "== $name: finished before" && return; fi
    echo "== $name"
    .venv/bin/python "scripts/$1" "${@:2}" || status=$?
    echo "$name $((SECONDS - begun))" >>"$out/seconds.txt"
    return $status
}

stage data data/documents/dataset_info.json prepare_data.py --config configs/quickstart_data.yaml \
    --input="$library" --out="$out/data/documents"
stage filtered data/filtered/dataset_info.json prepare_data.py sample --config configs/quickstart_filtered.yaml \
    --data="$out/data/documents" --out="$out/data/filtered"
stage packed data/packed/dataset_info.json prepare_data.py sample --config configs/quickstart_packed.yaml \
    --data="$out/data/documents" --out="$out/data/packed"
stage decoder decoder/model train.py --config configs/quickstart_decoder.yaml --data="$out/data" --out="$out/decoder"
stage encoder encoder/model train.py --config configs/quickstart_encoder.yaml --data="$out/data" --out="$out/encoder" \
    --decoder="$out/decoder/model"
stage warmup warmup/model train.py --config configs/quickstart_warmup.yaml --data="$out/data" --out="$out/warmup" \
    --decoder="$out/decoder/model" --encoder="$out/encoder/model"
stage cepe cepe/model train.py --config configs/quickstart_cepe.yaml --data="$out/data" --out="$out/cepe" \
    --cepe="$out/warmup/model"
# It keeps what is finished by itself: no file says that all of it is.
stage evaluate - evaluate.py perplexity --config configs/quickstart_evaluate.yaml --model.path="$out/cepe/model" \
    --data="$out/data/documents" --out="$out/evaluation"
echo "seconds:"
awk '{ if (!($1 in sum)) names[++n] = $1; sum[$1] += $2; all += $2 }
    END { for (i = 1; i <= n; i++) print "  " names[i], sum[names[i]]; print "  all", all }' "$out/seconds.txt"
echo "report: $out/evaluation/report.md, results.json and perplexity.png beside it"
