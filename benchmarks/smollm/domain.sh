#!/usr/bin/env bash
# domain.sh NAME SEED: the retriever as it is and RE-adapted to the passages of DATA/NAME at scales (1.0, 0.5), BM25, and both
# fused with BM25 by reciprocal rank; each compared with the retriever as it is by paired randomisation over the queries.
set -euo pipefail
name=$1 seed=$2 root=$WORK/$1
run() { "$PYTHON" -m readapt_ray "$@"; }
queries=$root/corpus/queries qrels=$root/corpus/qrels/test.parquet
search() {  # NAME MODE MODEL ARM
  run search --retriever "$3" --index "$root/index/$4" --mode "$2" --queries "$queries" --qrels "$qrels" --output "$root/runs/$1.trec"
}
measured() {  # OUTPUT RUN ...
  local output=$root/$1 runs
  shift
  runs=$(printf ",$root/runs/%s.trec" "$@")
  run evaluate --runs "${runs:1}" --qrels "$qrels" --queries "$queries" --corpus "$root/corpus" --output "$output"
}
vectors() {  # MODEL ARM
  run embed --retriever "$1" --corpus "$root/corpus" --output "$root/vectors/$2"
  run index --vectors "$root/vectors/$2" --bm25 --output "$root/index/$2"
  search "$2" dense "$1" "$2"
  search "$2-bm25" hybrid "$1" "$2"
}
"$PYTHON" benchmarks/smollm/texts.py domain --source "$DATA/$name" --tokenizer "$WORK/pretrained" --output "$root/source"
run ingest --source "$root/source" --output "$root/corpus"
vectors "$WORK/retriever" retriever
search bm25 bm25 "$WORK/retriever" retriever
measured report-before retriever bm25 retriever-bm25
arm=adapted-seed$seed
# shellcheck disable=SC2086  # TRAIN_WORKERS is several words
run train --pretrained "$WORK/pretrained" --corpus "$root/corpus" --output "$root/adapter-seed$seed" --block-tokens 128 \
  --seed "$seed" $TRAIN_WORKERS --checkpoint-every-s 120
run merge --pretrained "$WORK/pretrained" --retriever "$WORK/retriever" --adapter "$root/adapter-seed$seed" \
  --readapter-scale 1.0 --knowledge-scale 0.5 --output "$root/$arm"
vectors "$root/$arm" "$arm"
measured "report-seed$seed" retriever "$arm" bm25 retriever-bm25 "$arm-bm25"
