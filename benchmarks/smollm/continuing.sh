#!/usr/bin/env bash
# continuing.sh NAME: train an adapter on one half of DATA/NAME's passages, split by topic; then the other half comes. Continue that
# adapter on the new passages only (`continued`), and train one on all passages (`anew`). Measured are the language-model loss of
# withheld passages of both halves, and the search of the retriever RE-adapted with each, at scales (1.0, 0.5).
set -euo pipefail
root=$WORK/$1 out=$WORK/$1/continuing
run() { "$PYTHON" -m readapt_ray "$@"; }
[ -f "$out/withheld.json" ] || "$PYTHON" benchmarks/smollm/continuing.py split --source "$root/source" --output "$out"
for part in old all; do run ingest --source "$out/$part" --output "$out/corpus-$part"; done
train() {  # NAME OPTION ...
  local arm=$1
  shift
  # shellcheck disable=SC2086  # TRAIN_WORKERS is several words
  run train --pretrained "$WORK/pretrained" --output "$out/adapter-$arm" --block-tokens 128 $TRAIN_WORKERS --checkpoint-every-s 120 "$@"
}
train old --corpus "$out/corpus-old"
train continued --corpus "$out/corpus-all" --new-since "$out/corpus-old" --continue-from "$out/adapter-old"
train anew --corpus "$out/corpus-all"
"$PYTHON" benchmarks/smollm/continuing.py losses --output "$out" --pretrained "$WORK/pretrained" --adapters old,continued,anew
queries=$root/corpus/queries qrels=$root/corpus/qrels/test.parquet runs=$root/runs/retriever.trec
for arm in old continued anew; do
  run merge --pretrained "$WORK/pretrained" --retriever "$WORK/retriever" --adapter "$out/adapter-$arm" \
    --readapter-scale 1.0 --knowledge-scale 0.5 --output "$out/adapted-$arm"
  run embed --retriever "$out/adapted-$arm" --corpus "$root/corpus" --output "$out/vectors-$arm"
  run index --vectors "$out/vectors-$arm" --output "$out/index-$arm"
  run search --retriever "$out/adapted-$arm" --index "$out/index-$arm" --queries "$queries" --qrels "$qrels" --output "$out/$arm.trec"
  runs=$runs,$out/$arm.trec
done
run evaluate --runs "$runs" --qrels "$qrels" --queries "$queries" --corpus "$root/corpus" --output "$out/report"
