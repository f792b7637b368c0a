#!/usr/bin/env bash
# Quality on questions of SQuAD's dev split of the model as it is, and after the checkpoints of WORK/made/lora (every
# EVERY-th, the last one always).
set -euo pipefail
made=$WORK/made
run() { "$PYTHON" -m readapt_ray "$@"; }
echo '{"pooling": "mean", "add_bos": false, "add_eos": false, "max_query_tokens": 32, "max_passage_tokens": 128,
 "query_template": "query: {text}", "passage_template": "passage: {title} {text}"}' > "$made/encoding.json"
run ingest --source "$made/dev" --output "$made/corpus"
mapfile -t checkpoints < <(ls "$made"/lora/checkpoints/step-*.safetensors)
last=$((${#checkpoints[@]} - 1))
for at in "" "${!checkpoints[@]}"; do
  if [ -z "$at" ]; then
    name=step-000000000 model=$WORK/pretrained
  elif [ "$at" = "$last" ] || [ $(((at + 1) % ${EVERY:-1})) = 0 ]; then
    name=$(basename "${checkpoints[$at]}" .safetensors) model=$made/adapters/$name
    "$PYTHON" benchmarks/smollm/adapter.py --base "$WORK/pretrained" --from "${checkpoints[$at]}" --output "$model"
  else
    continue
  fi
  [ -f "$made/runs/$name.trec" ] && continue
  run embed --retriever "$model" --encoding "$made/encoding.json" --corpus "$made/corpus" \
    --output "$made/vectors/$name"
  run search --retriever "$model" --encoding "$made/encoding.json" --vectors "$made/vectors/$name" \
    --queries "$made/corpus/queries" --output "$made/runs/$name.trec"
done
runs=$(printf ',%s' "$made"/runs/step-*.trec)
run evaluate --overwrite --runs "${runs:1}" --qrels "$made/corpus/qrels/test.parquet" --output "$made/curve"
