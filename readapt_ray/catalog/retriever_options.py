"""Define the options that name a retriever: a model, or the factors of a domain and their base."""

from typing import ClassVar, Self

from pydantic import model_validator

from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.config import Config, OptionError
from readapt_ray.errors import ModelError


class RetrieverOptions(Config):
    """Options that name a retriever: a model, or the factors of a domain."""

    retriever: str = ""
    """Model that makes the vectors: a catalog name, a folder, a GGUF file, a URI or a hub id. Give this or domain."""
    domain: str | None = None
    """Factors of a domain, the output of `readapt merge --factors`: vectors and queries equal the merged model's. Give
    this or retriever."""
    base: str | None = None
    """Model before retrieval training that the domain was merged with. If omitted, the one that the factors name."""

    names_of_retriever: ClassVar[frozenset[str]] = frozenset({"retriever", "domain", "base"})

    @model_validator(mode="after")
    def _one_retriever(self) -> Self:
        if bool(self.retriever) == bool(self.domain):
            raise OptionError("give a {retriever} or the factors of a {domain}, one of the two")
        if self.base and not self.domain:
            raise OptionError("{base} is for a {domain}; give its factors, or leave it out")
        return self

    def open_retriever(self) -> OpenModel:
        """Open the model, or the factors with their base, and fetch it to this machine's disk if needed.

        Raises:
            ModelError: it does not exist, or `domain` is not a folder of factors.
        """
        model = open_model(self.domain or self.retriever, base=self.base)
        if self.domain and not model.is_factors:
            raise ModelError(
                f"domain = {self.domain!r} is not the output of `readapt merge --factors`; a whole model is given as retriever"
            )
        return model
