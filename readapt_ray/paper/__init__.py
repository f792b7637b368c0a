"""The paper's experiments, each one command: `readapt paper --experiments table1 --retriever e5-mistral`."""
