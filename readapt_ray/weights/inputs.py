"""The inputs of a merge: from the names of models to a `Readapter`, with all that can be checked before a weight is read.

In: names of models, as the user gave them. Out: the models, and what they make together. Headers,
configs and tokenizers are read: kilobytes, besides the tokenizers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from readapt_ray.catalog.models import Model, encoding_of, find_model
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import ModelError
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.agreement import check_bases, check_configs, check_knowledge, check_tokenizers
from readapt_ray.weights.bundle import check_base, open_bundle
from readapt_ray.weights.checkpoint import Checkpoint
from readapt_ray.weights.provenance import Ingredient
from readapt_ray.weights.readapter import Readapter, Scales, open_retriever


@dataclass(frozen=True, kw_only=True)
class MergeNames:
    """What the user calls the models of a merge, and how they are to be taken. It can be sent to another machine."""

    pretrained: str | None
    retriever: str | None
    adapters: tuple[str, ...]
    bundle: str | None
    accept: tuple[str, ...]
    """Differences that are meant: config, tokenizer, vocabulary, base."""
    encoding: Encoding | None
    """How the retriever wants its text; what its folder or the catalog says unless given."""

    def find(self) -> "Roles":
        """Bring the models onto this machine's disk.

        Raises:
            ModelError: one cannot be found or is unfinished, or `pretrained` is an adapter.
        """
        if self.bundle is not None:
            return _find_bundle(self.bundle, self.pretrained)
        return _find_models(str(self.pretrained), str(self.retriever), self.adapters)

    def open(self, roles: "Roles") -> "MergeInputs":
        """Open what was found, and check that all fit together.

        Raises:
            WeightMismatchError: the models do not fit each other; what differs is listed.
            ModelError: one cannot be read, or nothing says how the retriever encodes.
        """
        if self.bundle is not None:
            return _open_bundled(roles, encoding=self.encoding)
        return _open_models(roles, accept=self.accept, encoding=self.encoding)

    def check(self, roles: "Roles", sources: Sequence[Ingredient]) -> None:
        """Compare the pretrained model with the one that each of the others was made on.

        Raises:
            WeightMismatchError: it is another.
            ModelError: what is given as knowledge is a retriever.
        """
        if self.bundle is not None:
            check_base(roles[1][1], sources[0])
        else:
            check_knowledge(
                sources[1], [(model, source) for (_, model), source in zip(roles[2:], sources[2:], strict=True)]
            )
        check_bases(sources[0], [model for _, model in roles[1:]], accept="base" in self.accept)


Roles = tuple[tuple[str, Model], ...]
"""Role and model of each input, the pretrained one first."""


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Models that fit together."""

    readapter: Readapter
    encoding: Encoding
    """How the retriever wants its text."""
    config_of: Model
    """The model whose config.json is the result's."""
    tokenizer_of: Model
    """The model whose tokenizer is the result's."""
    scales: Scales | None = None
    """Those of a bundle, to be taken unless others are given."""
    left_out: tuple[str, ...] = ()
    """What an earlier merge left out, with the model that held it."""


def _find_models(pretrained: str, retriever: str, adapters: Sequence[str]) -> Roles:
    found = [("pretrained", _find("pretrained", pretrained)), ("retriever", _find("retriever", retriever))]
    for number, name in enumerate(adapters, start=1):
        found.append((f"adapter {number}" if len(adapters) > 1 else "adapter", _find("adapter", name)))
    return tuple(found)


def _find_bundle(bundle: str, pretrained: str | None) -> Roles:
    """The bundle says what its base is, unless `pretrained` does."""
    model = _find("bundle", bundle)
    return (("pretrained", _find("pretrained", pretrained or open_bundle(model).base_name)), ("bundle", model))


def _find(option: str, name: str) -> Model:
    model = find_model(name)
    if option == "pretrained" and model.is_adapter:
        raise ModelError(f"pretrained = {name!r} is an adapter; give the full model that it was trained on")
    return model


def _open_models(roles: Roles, *, accept: Collection[str], encoding: Encoding | None) -> MergeInputs:
    pretrained, retriever, *adapters = (model for _, model in roles)
    before = Checkpoint(pretrained.folder, name=pretrained.name)
    knowledge = [open_retriever(adapter.folder, before, name=adapter.name) for adapter in adapters]
    after = open_retriever(retriever.folder, before, name=retriever.name)
    accept_vocabulary = "vocabulary" in accept
    readapter = Readapter(before, after, knowledge, accept_vocabulary=accept_vocabulary)
    for model, source in [(retriever, after), *zip(adapters, knowledge, strict=True)]:
        if not isinstance(source, Adapter) and not (model is retriever and "config" in accept):
            check_configs(pretrained, model)
    if "tokenizer" not in accept:
        check_tokenizers(pretrained, retriever, accept_vocabulary=accept_vocabulary)
    return MergeInputs(
        readapter=readapter,
        encoding=encoding or encoding_of(retriever),
        config_of=pretrained if retriever.is_adapter else retriever,
        tokenizer_of=retriever if _has_tokenizer(retriever) or not retriever.is_adapter else pretrained,
    )


def _has_tokenizer(model: Model) -> bool:
    return any((model.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _open_bundled(roles: Roles, *, encoding: Encoding | None) -> MergeInputs:
    pretrained, model = (model for _, model in roles)
    bundle = open_bundle(model)
    return MergeInputs(
        readapter=bundle.readapter(Checkpoint(pretrained.folder, name=pretrained.name)),
        encoding=encoding or bundle.encoding,
        config_of=model,
        tokenizer_of=model,
        scales=bundle.scales,
        left_out=bundle.left_out,
    )
