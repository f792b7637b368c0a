"""The versions that are served and how requests find theirs: one state, replaced as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving import schema
from readapt_ray.serving.batching import Batcher
from readapt_ray.serving.request_tokens import InputTokenizer
from readapt_ray.serving.routing import Routing
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.versions import Version


@dataclass(frozen=True)
class Served:
    """A version with what a gateway needs to ask it."""

    version: Version
    tokenizer: InputTokenizer
    batcher: Batcher
    store: PassageStore | None
    """Titles and texts of its corpus."""


@dataclass(frozen=True)
class Registry:
    """Versions by name, and the routing among them."""

    served: Mapping[str, Served] = field(default_factory=dict)
    routing: Routing = field(default_factory=lambda: Routing(default=""))

    def models(self) -> schema.ModelList:
        """What is served, the default first."""
        listed = [
            schema.ServedModel(
                id=name,
                created=info.created,
                default=name == self.routing.default,
                dimension=info.dimension,
                fingerprint=info.fingerprint,
                encoder_fingerprint=info.encoder_fingerprint,
                num_vectors=info.num_vectors,
                max_query_tokens=info.encoding.max_query_tokens,
                max_passage_tokens=info.encoding.max_passage_tokens,
                query_template=info.encoding.query_template,
                passage_template=info.encoding.passage_template,
            )
            for name, info in ((name, each.version.info) for name, each in self.served.items())
        ]
        return schema.ModelList(data=sorted(listed, key=lambda model: not model.default))

    def named(self, model: str | None) -> tuple[str, Served]:
        """The version of this name; the default for none, or for `default`.

        Raises:
            RequestError: there is none.
        """
        is_default = model is None or (model == schema.DEFAULT_MODEL and model not in self.served)
        name = self.routing.default if is_default or model is None else model
        if name in self.served:
            return name, self.served[name]
        if not self.served:
            raise RequestError("no version is up yet; try again soon", status=503, retry_after_s=1)
        known = ", ".join(map(repr, self.served))
        raise RequestError(
            f"no model {name[:200]!r} here; this server has {known}",
            status=404,
            param="model",
            code="model_not_found",
        )

    def for_search(self, body: schema.SearchRequest) -> tuple[str, Served]:
        """The version that is named, or that made the vectors, or whose turn it is.

        Raises:
            RequestError: there is none, or its encoder did not make the vectors.
        """
        if body.vector is None:
            if body.model and body.model != schema.DEFAULT_MODEL:
                return self.named(body.model)
            return self.named(self.routing.of_search(body.user) or None)
        made_by = [
            name for name, each in self.served.items() if each.version.info.encoder_fingerprint == body.fingerprint
        ]
        if body.model:
            name, _ = self.named(body.model)
            made_by = [each for each in made_by if each == name]
        if not made_by:
            raise RequestError(
                "the vectors were not made by this model: its 'encoder_fingerprint' in /v1/models is not the 'fingerprint' "
                "that came with them",
                param="fingerprint",
                code="fingerprint_mismatch",
            )
        return self.named(self.routing.default if self.routing.default in made_by else made_by[0])
