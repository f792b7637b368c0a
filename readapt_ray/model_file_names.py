"""Names of the files in a model or adapter folder, as transformers, PEFT and sentence-transformers call them."""

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
"""All weights, where one file holds them."""
INDEX_NAME = "model.safetensors.index.json"
"""Which file holds which tensor, where there are several."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
"""PEFT's file: a folder that holds it is an adapter."""
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
"""All that a tokenizer may be read from."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
MODULES_NAME = "modules.json"
"""The modules of sentence-transformers in their order."""
POOLING_CONFIG_NAME = "1_Pooling/config.json"
LENGTH_NAME = "sentence_bert_config.json"
"""The maximum length, as sentence-transformers reads it."""
PROMPTS_NAME = "config_sentence_transformers.json"
"""Prompts and the similarity, as sentence-transformers reads them."""
CONTRACT_NAME = "readapt.json"
"""Ours: how the model encodes text."""
BUNDLE_NAME = "bundle.json"
"""Ours: a folder that holds it is the factors of a model."""
