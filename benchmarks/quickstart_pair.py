"""Make the quickstart's pretrained model and retriever (readapt_ray/data/quickstart).

    python -m venv /tmp/pair && /tmp/pair/bin/pip install -c constraints.txt -c benchmarks/quickstart_pair.txt -e . \\
        -r benchmarks/quickstart_pair.txt
    /tmp/pair/bin/python benchmarks/quickstart_pair.py --work /tmp/pair-work --output readapt_ray/data/quickstart

From the docstrings of the source packages alone, by the stages of the package: `ingest`, once with whole
docstrings for the language model and once with the summary sentences as queries; a byte-level BPE of
8,192 tokens; `train --method full` of a fresh 5-million-parameter Llama (4 layers, 256 wide); `finetune`
with InfoNCE on (summary sentence, rest of the docstring). The target packages (ray, torch and what
belongs to them) are in none of it. Killed, it resumes where it stopped.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import readapt_ray as ra
from readapt_ray.catalog import retrievers
from readapt_ray.sources.python_docs import read_docstrings

SOURCE_PACKAGES = (
    "stdlib,numpy,pandas,scipy,sympy,networkx,sklearn,matplotlib,django,sqlalchemy,statsmodels,xarray,skimage,nltk,gensim,"
    "Bio,astropy,docutils,sphinx,twisted,hypothesis,mypy,babel,pygments,jinja2,mpmath,setuptools,pip"
)
VOCABULARY = 8192
LAYERS, WIDTH, INNER, HEADS, POSITIONS = 4, 256, 704, 4, 512
SPECIALS = ["<s>", "</s>"]


def main() -> None:
    """Make both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the intermediate artifacts")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets pretrained/ and retriever/")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    started_s = time.monotonic()
    work = options.work
    corpus = ra.ingest(ra.IngestConfig(source=f"python-docs:{SOURCE_PACKAGES}", output=str(work / "corpus")))
    whole = work / "whole.jsonl"
    if not whole.is_file():
        write_whole_docstrings(whole)
    text = ra.ingest(ra.IngestConfig(source=str(whole), output=str(work / "text")))
    fresh = work / "fresh"
    if not (fresh / "tokenizer.json").is_file():
        make_fresh_model(Path(text.location.path), fresh)
    pretrained = ra.train(
        ra.TrainConfig(
            pretrained=str(fresh),
            corpus=text.uri,
            output=str(work / "pretrained"),
            method="full",
            mode="packed",
            block_tokens=256,
            batch_size=32,
            num_epochs=1,
            learning_rate=2e-3,
            weight_decay=0.1,
            warmup_fraction=0.03,
            dtype="bfloat16",
            micro_batch_tokens=2048,
            num_workers=2,
            num_cpus_per_worker=1,
            checkpoint_every_s=60,
        )
    )
    encoding = retrievers.retriever("quickstart-retriever").encoding
    retriever = ra.finetune(
        ra.FinetuneConfig(
            model=pretrained.uri,
            corpus=corpus.uri,
            split="test",
            output=str(work / "retriever"),
            encoding=encoding,
            batch_size=128,
            num_epochs=1,
            dtype="bfloat16",
            learning_rate=1e-3,
            both_directions=True,
            num_workers=2,
            num_cpus_per_worker=1,
            checkpoint_every_s=60,
        )
    )
    export(Path(pretrained.location.path), Path(retriever.location.path), options.output)
    seconds = {name: each.manifest.seconds for name, each in (("pretrained", pretrained), ("retriever", retriever))}
    print(json.dumps({"wall_s": round(time.monotonic() - started_s), **seconds}))


def write_whole_docstrings(file: Path, packages: str = SOURCE_PACKAGES) -> None:
    """One line a docstring, summary and rest together."""
    seen: dict[str, int] = {}
    with file.with_suffix(".tmp").open("w") as lines:
        for package in packages.split(","):
            for each in read_docstrings(package):
                seen[each.name] = seen.get(each.name, 0) + 1
                row = {
                    "_id": f"{each.name}#{seen[each.name]}",
                    "title": each.name,
                    "text": f"{each.summary}\n{each.rest}",
                }
                lines.write(json.dumps(row) + "\n")
    file.with_suffix(".tmp").rename(file)


def make_fresh_model(
    corpus: Path, folder: Path, *, layers: int = LAYERS, width: int = WIDTH, inner: int = INNER, heads: int = HEADS
) -> None:
    """A tokenizer trained on the passages, and a model of random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rows = pq.read_table(corpus / "passages", columns=["title", "text"]).to_pylist()
    tokenizer.train_from_iterator((f"{row['title']} {row['text']}" for row in rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, index) for index, token in enumerate(SPECIALS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=POSITIONS
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def export(pretrained: Path, retriever: Path, output: Path) -> None:
    """Both as package data: the pretrained weights and the adapter in float16, without what only training needs."""
    LlamaForCausalLM.from_pretrained(pretrained, dtype=torch.float16).save_pretrained(output / "pretrained")
    PreTrainedTokenizerFast.from_pretrained(pretrained).save_pretrained(output / "pretrained")
    from safetensors.torch import load_file, save_file

    target = output / "retriever"
    target.mkdir(parents=True, exist_ok=True)
    factors = load_file(retriever / "adapter_model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in factors.items()},
        target / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((retriever / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "quickstart-pretrained"
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (target / "readapt.json").write_text((retriever / "readapt.json").read_text())


if __name__ == "__main__":
    main()
