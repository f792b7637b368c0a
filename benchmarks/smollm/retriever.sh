#!/usr/bin/env bash
# WORK/made: the training pairs and the LoRA that `readapt finetune` makes of them (NUM_PAIRS, 4,000 if it is not set).
set -euo pipefail
made=$WORK/made
"$PYTHON" benchmarks/smollm/texts.py pairs --source "$DATA/squad11" --tokenizer "$WORK/pretrained" --output "$made" \
  --num-pairs "${NUM_PAIRS:-4000}" --num-dev 150
# Training reads 64 tokens of a passage, which is where its words of the question are.
cat > "$made/training.json" <<'JSON'
{"pooling": "mean", "add_bos": false, "add_eos": false, "max_query_tokens": 32, "max_passage_tokens": 64,
 "query_template": "query: {text}", "passage_template": "passage: {title} {text}"}
JSON
# shellcheck disable=SC2086  # TRAIN_WORKERS is several words
"$PYTHON" -m readapt_ray finetune --model "$WORK/pretrained" --corpus "$made/pairs.jsonl" --output "$made/lora" \
  --encoding "$made/training.json" --lora-rank 8 --lora-alpha 16 --batch-size 16 --temperature 0.05 --both-directions \
  --learning-rate 1e-3 --warmup-fraction 0.1 $TRAIN_WORKERS --checkpoint-every-s 120 --keep-checkpoints 1000
