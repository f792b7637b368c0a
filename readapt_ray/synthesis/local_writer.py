"""Answer prompts in batches with a causal language model on this machine."""

from collections.abc import Sequence
from typing import Any

import torch

from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError
from readapt_ray.synthesis.answers import Answer, Ask

_BATCH = {"cpu": 8, "cuda": 64}
_WANTED = "give a causal language model with its head, such as an instruct model"


class LocalWriter:
    """A causal language model of transformers, with its tokenizer."""

    def __init__(self, source: OpenModel, *, dtype: torch.dtype, device: str) -> None:
        """Load the model. Only safetensors are read, and no code of the folder runs.

        Args:
            source: full weights of a causal language model, with its tokenizer.
            dtype: data type of weights and computation.
            device: torch device, such as "cpu" or "cuda".

        Raises:
            ModelError: the folder holds no causal language model, or some of its weights are missing.
        """
        from transformers import AutoModelForCausalLM

        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(source.folder), dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{source.name!r} is no language model that can write: {error}; {_WANTED}") from error
        if loading["missing_keys"]:
            raise ModelError(
                f"{source.name!r} cannot write: it lacks the weights {sorted(loading['missing_keys'])[:3]}; {_WANTED}"
            )
        self._model: Any = model.to(device)
        self._model.eval()
        self._device = device
        self._tokenizer = source.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token_id = self._tokenizer.eos_token_id or 0
        self._room = getattr(self._model.config, "max_position_embeddings", None) or 1 << 20

    @torch.no_grad()
    def answer(self, asks: Sequence[Ask], *, temperature: float, max_tokens: int, seed: int) -> list[Answer]:
        """Return an answer to each prompt, in their order.

        A model with a chat template gets each prompt as a message of the user; another gets it with "Question:" at the
        end. Prompts of similar length share a batch. Sampling depends on the seed and the number of a batch's first
        prompt, so a prompt may be answered otherwise in other company. The global seed of torch is changed.

        Args:
            asks: the prompts.
            temperature: sampling temperature; 0 takes the likeliest token.
            max_tokens: maximum number of tokens per answer.
            seed: seed of the sampling.

        Raises:
            ModelError: a prompt and `max_tokens` more exceed the maximum length of the model; none is answered.
        """
        encoded = [self._encoded(ask.prompt, max_tokens) for ask in asks]
        order = sorted(range(len(asks)), key=lambda place: (len(encoded[place]), place))
        answers: dict[int, Answer] = {}
        size = _BATCH["cuda" if self._device.startswith("cuda") else "cpu"]
        for first in range(0, len(order), size):
            places = order[first : first + size]
            torch.manual_seed((seed + asks[places[0]].number) % 2**63)
            batch = self._tokenizer.pad({"input_ids": [encoded[place] for place in places]}, return_tensors="pt").to(
                self._device
            )
            sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            width = batch["input_ids"].shape[1]
            written = self._model.generate(
                **batch, max_new_tokens=max_tokens, pad_token_id=self._tokenizer.pad_token_id, **sampling
            )[:, width:]
            for place, ids in zip(places, written.tolist(), strict=True):
                own = [each for each in ids if each != self._tokenizer.pad_token_id]
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                answers[place] = Answer(text, len(encoded[place]) + len(own))
        return [answers[place] for place in range(len(asks))]

    def _encoded(self, prompt: str, max_tokens: int) -> list[int]:
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # an option of templates such as Qwen3's; others ignore it
            )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(f"{prompt}\n\nQuestion:")["input_ids"]
        if len(ids) + max_tokens > self._room:
            raise ModelError(
                f"a prompt of {len(ids):,} tokens and an answer of {max_tokens} are longer than the model's {self._room:,} positions; "
                f"lower max_passage_chars"
            )
        return list(ids)
