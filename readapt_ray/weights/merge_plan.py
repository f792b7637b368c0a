"""Plan a merge: turn names of models into a `Readapter`, with every check that needs no weights.

In: names of models, as the user gave them. Out: the opened models and what they are. Headers, configs and
tokenizers are read (kilobytes), and every file is hashed once, on all cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.catalog.query_models import refuse_query_model
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.bundle import Bundle, check_base, open_bundle
from readapt_ray.weights.compatibility import check_bases, check_configs, check_knowledge, check_tokenizers
from readapt_ray.weights.low_rank import check_shapes
from readapt_ray.weights.merging import Readapter, Scales, one_per_adapter, open_retriever
from readapt_ray.weights.provenance import MergeInput, hashed_in_background
from readapt_ray.weights.scale_options import check_layers
from readapt_ray.weights.scale_options import layer_scales as ranges_of
from readapt_ray.weights.weight_files import Checkpoint

Roles = tuple[tuple[str, OpenModel], ...]
"""Role and model of each input, the pretrained one first."""


@dataclass(frozen=True, kw_only=True)
class MergeModels:
    """The models of a merge as the user named them. It can be sent to another machine."""

    pretrained: str | None
    retriever: str | None
    adapters: tuple[str, ...]
    bundle: str | None
    accept: tuple[str, ...]
    """Mismatches to allow: config, tokenizer, vocabulary, base."""
    encoding: Encoding | None
    """How the retriever encodes text; by default what its folder or the catalog says."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Models that fit together, opened on this machine."""

    models: MergeModels
    readapter: Readapter
    encoding: Encoding
    """How the retriever encodes text."""
    config_of: OpenModel
    """The model whose config.json the result gets."""
    tokenizer_of: OpenModel
    """The model whose tokenizer the result gets."""
    dense_of: OpenModel
    """The model whose Dense modules the result gets."""
    sources: tuple[MergeInput, ...]
    """Name, fingerprint and file hashes of each input, the pretrained model first."""
    bundle: Bundle | None = None
    """The factors that the result is made of, if they are given."""
    left_out: tuple[str, ...] = ()
    """Tensors that an earlier merge left out, with the model that held them."""

    @property
    def made_of(self) -> list[tuple[str, str]]:
        """Return role and fingerprint of the models: of factors, of those that they were made of."""
        if self.bundle is not None:
            return [(role, each["fingerprint"]) for role, each in self.bundle.content["sources"].items()]
        return [(each.role, each.fingerprint) for each in self.sources]

    def scales(
        self,
        readapter_scale: float | None,
        knowledge_scale: float | Sequence[float] | None,
        layer_scales: Sequence[str] | None = (),
    ) -> Scales:
        """Return one knowledge scale per adapter, and their factors by layer. None takes the bundle's.

        Raises:
            InputError: there are neither one nor as many knowledge scales as adapters, or the model lacks layers of a range.
        """
        layers = None if layer_scales is None else ranges_of(layer_scales)
        if self.bundle is not None:
            readapter_scale = self.bundle.scales.readapter if readapter_scale is None else readapter_scale
            knowledge_scale = self.bundle.scales.knowledge if knowledge_scale is None else knowledge_scale
            layers = self.bundle.scales.layers if layers is None else layers
        if readapter_scale is None or knowledge_scale is None or layers is None:
            raise InputError("give readapter_scale and knowledge_scale; only a bundle brings its own")
        check_layers(layers, self.readapter.names())
        return Scales(readapter_scale, one_per_adapter(knowledge_scale, len(self.readapter.knowledge)), layers)


def plan_merge(models: MergeModels, *, as_factors: bool = False) -> MergePlan:
    """Find, open and check the models of a merge, while all cores hash their files.

    Args:
        models: what the user named.
        as_factors: the retriever's difference will be stored as factors, so its shapes must allow that.

    Raises:
        WeightMismatchError: the models do not fit each other; the message lists what differs.
        ModelError: a model cannot be found or read, is unfinished, or has no known encoding; or what is given as
            knowledge is a retriever.
    """
    if models.bundle is not None:
        roles = _find_bundle(models.bundle, models.pretrained)
    else:
        roles = _find_models(str(models.pretrained), str(models.retriever), models.adapters)
    with hashed_in_background(roles) as wait_for_hashes:
        opened = _open_bundled(roles, models) if models.bundle is not None else _open_models(roles, models)
        if as_factors:
            check_shapes(opened.readapter.pretrained, opened.readapter.retriever)
        plan = replace(opened, sources=tuple(wait_for_hashes()))
    _check_origins(roles, plan)
    return plan


def check_pair(
    pretrained: OpenModel, retriever: OpenModel, *, accept: Sequence[str], layer_scales: Sequence[str] = ()
) -> None:
    """Check that a retriever was made from a pretrained model, as far as a merge does without an adapter.

    Headers of weights, configs and tokenizers are read; the pretrained model is hashed only for an adapter of ours.

    Raises:
        WeightMismatchError: they do not fit each other; the message lists what differs.
        ModelError: a model cannot be read, or is for queries alone.
        InputError: they lack layers that have scales of their own.
    """
    refuse_query_model(retriever)
    check_layers(ranges_of(layer_scales), _open_pair(pretrained, retriever, (), accept).names())
    check_bases(pretrained, [retriever], accept="base" in accept)


def _check_origins(roles: Roles, plan: MergePlan) -> None:
    """Compare the pretrained model with the one that each other model was made from."""
    pretrained, second, *others = plan.sources
    if plan.models.bundle is not None:
        check_base(roles[1][1], pretrained)
    else:
        check_knowledge(second, [(model, source) for (_, model), source in zip(roles[2:], others, strict=True)])
    check_bases(pretrained, [model for _, model in roles[1:]], accept="base" in plan.models.accept)


def _find_models(pretrained: str, retriever: str, adapters: Sequence[str]) -> Roles:
    found = [("pretrained", _find("pretrained", pretrained)), ("retriever", _find("retriever", retriever))]
    for number, name in enumerate(adapters, start=1):
        found.append((f"adapter {number}" if len(adapters) > 1 else "adapter", _find("adapter", name)))
    return tuple(found)


def _find_bundle(bundle: str, pretrained: str | None) -> Roles:
    """Return the bundle and its base: the one it names, unless `pretrained` is given."""
    model = _find("bundle", bundle)
    return (("pretrained", _find("pretrained", pretrained or open_bundle(model).base_name)), ("bundle", model))


def _find(option: str, name: str) -> OpenModel:
    model = open_model(name)
    if option == "pretrained" and model.is_adapter:
        raise ModelError(f"pretrained = {name!r} is an adapter; give the full model that it was trained on")
    return model


def _open_models(roles: Roles, models: MergeModels) -> MergePlan:
    pretrained, retriever, *adapters = (model for _, model in roles)
    return MergePlan(
        models=models,
        readapter=_open_pair(pretrained, retriever, adapters, models.accept),
        encoding=models.encoding or retriever.encoding,
        config_of=pretrained if retriever.is_adapter else retriever,
        tokenizer_of=retriever if _has_tokenizer(retriever) or not retriever.is_adapter else pretrained,
        dense_of=retriever,
        sources=(),
    )


def _open_pair(
    pretrained: OpenModel, retriever: OpenModel, adapters: Sequence[OpenModel], accept: Sequence[str]
) -> Readapter:
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
    return readapter


def _has_tokenizer(model: OpenModel) -> bool:
    return any((model.folder / name).is_file() for name in (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME))


def _open_bundled(roles: Roles, models: MergeModels) -> MergePlan:
    pretrained, model = (model for _, model in roles)
    bundle = open_bundle(model)
    return MergePlan(
        models=models,
        readapter=bundle.readapter(Checkpoint(pretrained.folder, name=pretrained.name)),
        encoding=models.encoding or bundle.encoding,
        config_of=model,
        tokenizer_of=model,
        dense_of=model,
        sources=(),
        bundle=bundle,
        left_out=bundle.left_out,
    )
