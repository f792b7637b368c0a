#!/usr/bin/env bash
# Is a real language model of 135 million parameters better after RE-AdaptIR? The study, step by step, by `readapt` commands.
#   bash benchmarks/smollm/run.sh DATA WORK [STEP ...]
# DATA is the folder of the BEIR folders that the steps name, WORK gets models, vectors and runs. Steps, in this order:
#   model                fetch SmolLM2-135M-Instruct and lay the committed retriever beside it
#   domain:NAME[:SEED]   RE-adapt to DATA/NAME and compare with the retriever as it is, BM25 and their fusion
#   docs:PACKAGE[:SEED]  the same for the docstrings of an installed Python package, asked for by their first sentences
#   continuing:NAME      continue an adapter on half of DATA/NAME's passages, split by topic, against a new one on all
#   retriever            train the retriever again, from pairs of DATA/squad11, into WORK/made (README.md)
#   curve                its quality after each checkpoint on questions of squad11's dev split
#   results              gather what is done in benchmarks/results/smollm.json
# Without steps: model, domain:cranfield, docs:networkx, domain:nfcorpus, results. A killed step resumes when it is run
# again, and finished steps are skipped: `timeout 2h bash benchmarks/smollm/run.sh ...` does a part of the study. PYTHON names the interpreter;
# TRAIN_WORKERS are options of `readapt train`: one worker of one thread per core here; set it to "" where there are GPUs.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,14s/^# //p' "$0"; exit 2; }
cd "$(dirname "$0")/../.."
export DATA=$1 WORK=$2 PYTHON=${PYTHON:-python3} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRAIN_WORKERS=${TRAIN_WORKERS---num-workers $(nproc) --num-cpus-per-worker 1 --micro-batch-tokens 2048}
shift 2
[ $# -gt 0 ] || set -- model domain:cranfield docs:networkx domain:nfcorpus results
mkdir -p "$WORK"
for step in "$@"; do
  echo "== $step"
  case $step in
    model | retriever | curve) bash "benchmarks/smollm/$step.sh" ;;
    domain:*:*) bash benchmarks/smollm/domain.sh "$(cut -d: -f2 <<< "$step")" "$(cut -d: -f3 <<< "$step")" ;;
    domain:*) bash benchmarks/smollm/domain.sh "${step#domain:}" 0 ;;
    docs:*)
      IFS=: read -r _ package seed <<< "$step"
      "$PYTHON" benchmarks/smollm/texts.py docs --source "$package" --tokenizer "$WORK/pretrained" --output "$WORK/docs/$package"
      DATA=$WORK/docs bash benchmarks/smollm/domain.sh "$package" "${seed:-0}" ;;
    continuing:*) bash benchmarks/smollm/continuing.sh "${step#continuing:}" ;;
    results) "$PYTHON" benchmarks/smollm/results.py --work "$WORK" ;;
    *) echo "no step $step: model, domain:NAME[:SEED], docs:PACKAGE[:SEED], continuing:NAME, retriever, curve, results" && exit 2 ;;
  esac
done
