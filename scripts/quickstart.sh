#!/usr/bin/env bash
# CEPE on real long documents, from nothing: the source files of Python's standard library.
# Trains a tokenizer, a small decoder, an encoder, the warm-up and the main stage; then measures what contexts buy.
# Usage: bash scripts/quickstart.sh [--out DIR] [--seeds N] [--longer]     (default out/quickstart, 1 seed)
# Seeds share decoder and encoder; the warm-up and the main stage are drawn anew. --longer: 3 seeds, twice the main steps.
# What is finished is not done again: an interrupted run goes on where it was.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
out='' seeds='' more=()
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a directory} && shift 2 ;;
    --out=?*) out=${1#--out=} && shift ;;
    --seeds) seeds=${2:?--seeds needs a number} && shift 2 ;;
    --seeds=?*) seeds=${1#--seeds=} && shift ;;
    --out= | --seeds=) echo "quickstart.sh: $1 is empty: give a value" >&2 && exit 2 ;;
    --longer) more=(--steps=800) && shift ;;
    *) echo "quickstart.sh: unknown argument $1: only --out DIR, --seeds N and --longer" >&2 && exit 2 ;;
    esac
done
if [ ${#more[@]} -gt 0 ]; then seeds=${seeds:-3} out=${out:-$PWD/out/quickstart_longer}; fi
seeds=${seeds:-1} out=${out:-$PWD/out/quickstart}
case $seeds in *[!0-9]* | 0*) echo "quickstart.sh: --seeds is $seeds: give a number above 0" >&2 && exit 2 ;; esac
case $out in /*) ;; *) out=$called_from/$out ;; esac

source scripts/environment.sh
install_into .venv .
export JAX_PLATFORMS=cpu
# Pages of 2 MB: what a step stores is taken from the system anew each time, and page by page it costs a third of the time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
library=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mkdir -p "$out"

# stage NAME RESULT SCRIPT ARGUMENT...: runs the script unless its result exists, and notes the seconds it took
stage() {
    local name=$1 result=$2 begun=$SECONDS status=0
    shift 2
    if [ -e "$out/$result" ]; then echo "== $name: finished before" >&2 && return; fi
    echo "== $name" >&2
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
runs=()
for ((seed = 0; seed < seeds; seed++)); do
    at=$([ $seed -eq 0 ] || echo "seed_$seed/") && mkdir -p "$out/$at"
    stage "${at}warmup" "${at}warmup/model" train.py --config configs/quickstart_warmup.yaml --data="$out/data" \
        --out="$out/${at}warmup" --decoder="$out/decoder/model" --encoder="$out/encoder/model" --seed=$seed
    stage "${at}cepe" "${at}cepe/model" train.py --config configs/quickstart_cepe.yaml --data="$out/data" \
        --out="$out/${at}cepe" --cepe="$out/${at}warmup/model" --seed=$seed "${more[@]}"
    # It keeps what is finished by itself: no file says that all of it is.
    stage "${at}evaluate" - evaluate.py perplexity --config configs/quickstart_evaluate.yaml \
        --model.path="$out/${at}cepe/model" --data="$out/data/documents" --out="$out/${at}evaluation" >/dev/null
    runs+=("\"$out/${at}evaluation\"")
done
echo "seconds:"
awk '{ if (!($1 in sum)) names[++n] = $1; sum[$1] += $2; all += $2 }
    END { for (i = 1; i <= n; i++) print "  " names[i], sum[names[i]]; print "  all", all }' "$out/seconds.txt"
echo
.venv/bin/python scripts/evaluate.py gains --runs="[$(IFS=, && echo "${runs[*]}")]" --trained=4 --out="$out/gains"
echo "report: $out/gains/gains.md, gains.png and gains.json beside it; all numbers: $out/evaluation/report.md"
echo "model: $out/cepe/model; to try it:"
echo "  .venv/bin/python scripts/generate.py --model=$out/cepe/model --chunk_length=64 --max_new_tokens=32 \\"
echo "      --context-file=$library/heapq.py --prompt='def heappush(heap, item):'"
