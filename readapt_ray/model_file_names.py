"""Names of the files in a model or adapter folder, as transformers, PEFT and sentence-transformers call them."""

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
"""All weights of a model that is saved in one file."""
INDEX_NAME = "model.safetensors.index.json"
"""Maps each tensor to its file, for a model that is saved in several files."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
"""PEFT's config. A folder with this file is an adapter."""
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
"""All files from which a tokenizer may be loaded."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
MODULES_NAME = "modules.json"
"""The list of modules of a sentence-transformers model, in order."""
POOLING_CONFIG_NAME = "1_Pooling/config.json"
LENGTH_NAME = "sentence_bert_config.json"
"""sentence-transformers' file with the maximum length in tokens."""
PROMPTS_NAME = "config_sentence_transformers.json"
"""sentence-transformers' file with prompts and the similarity function."""
CONTRACT_NAME = "readapt.json"
"""readapt_ray's file with the encoding of the model: pooling, prompts, special tokens, maximum length."""
BUNDLE_NAME = "bundle.json"
"""readapt_ray's file. A folder with this file holds a model as factors: a base model and low-rank weight changes."""
