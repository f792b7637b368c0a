"""Run alone, where readapt_ray cannot be imported: what plain libraries make of a model folder.

Arguments: a JSON file with {"folders": [...], "texts": {"query": [...], "document": [...]}} and one to write.
"""

import json
import sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "readapt_ray":
            raise ImportError("readapt_ray is not installed here")


def by_transformers(folder, texts, prompt):
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pooling = json.loads(Path(folder, "1_Pooling/config.json").read_text())
    ids, vectors = [], []
    for text in texts:
        batch = tokenizer([prompt + text], return_tensors="pt", truncation=True)
        ids.append(batch["input_ids"][0].tolist())
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0]
        vector = hidden[-1] if pooling["pooling_mode_lasttoken"] else hidden.mean(0)
        vectors.append((vector / vector.norm()).tolist())
    left = [name for name in (*report["missing_keys"], *report["unexpected_keys"]) if "pooler" not in name]
    return {
        "class": type(model).__name__,
        "dtype": str(model.config.dtype),
        "left": left,
        "ids": ids,
        "vectors": vectors,
    }


def main():
    sys.meta_path.insert(0, Blocked())
    try:
        import readapt_ray  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("readapt_ray could be imported")
    from sentence_transformers import SentenceTransformer

    asked = json.loads(Path(sys.argv[1]).read_text())
    answer = {}
    for folder in asked["folders"]:
        model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
        answer[folder] = {"max_seq_length": model.max_seq_length}
        for kind, texts in asked["texts"].items():
            answer[folder][kind] = by_transformers(folder, texts, model.prompts[kind])
            answer[folder][kind]["sentence_transformers"] = model.encode(texts, prompt_name=kind).tolist()
    Path(sys.argv[2]).write_text(json.dumps(answer))


main()
