"""Plan a merge: open the models that the user named and do every check that needs no weights.

In: names of models. Out: a `MergePlan` with the opened models, the encoding, and fingerprints of the inputs. Headers,
configs and tokenizers are read (kilobytes), and every file is hashed once, on all cores.
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
    """The models of a merge as the user named them, not opened yet. It can be sent to another machine."""

    pretrained: str | None
    """Model before tuning; with `bundle`, None takes the base that the bundle names."""
    retriever: str | None
    adapters: tuple[str, ...]
    """Knowledge adapters or tuned models."""
    bundle: str | None
    """Bundle (the output of `readapt merge --factors`), given instead of retriever and adapters; None without one."""
    accept: tuple[str, ...]
    """Mismatches to allow: config, tokenizer, vocabulary, base."""
    encoding: Encoding | None
    """How the retriever encodes text; None takes what its folder or the catalog says."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The models of a merge, opened on this machine and checked to fit each other."""

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
    """The bundle of factors that the result is made from; None if the merge starts from models."""
    left_out: tuple[str, ...] = ()
    """Tensors that were left out when the bundle was written, as `Bundle.left_out`; empty without a bundle."""

    @property
    def made_of(self) -> list[tuple[str, str]]:
        """Role and fingerprint of each model that the result, or its bundle (if there is one), is made from.

        Roles are pretrained, retriever, and adapter (adapter 1, adapter 2 ... if there are several).
        """
        if self.bundle is not None:
            return [(role, each["fingerprint"]) for role, each in self.bundle.content["sources"].items()]
        return [(each.role, each.fingerprint) for each in self.sources]

    def scales(
        self,
        readapter_scale: float | None,
        knowledge_scale: float | Sequence[float] | None,
        layer_scales: Sequence[str] | None = (),
    ) -> Scales:
        """Return the scales of this merge, with one knowledge scale per adapter.

        Args:
            readapter_scale: share of the retriever's change; None takes the bundle's.
            knowledge_scale: one number for all adapters or one each; None takes the bundle's.
            layer_scales: items FIRST-LAST=NUMBER, such as 0-11=0.8; empty for none; None takes the bundle's.

        Raises:
            InputError: an argument is None and there is no bundle; the number of knowledge scales is neither one nor
                the number of adapters; a scale is not finite; or the model lacks layers of a range.
            ValueError: an item of `layer_scales` cannot be parsed.
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
        models: the models as the user named them.
        as_factors: whether the retriever's difference will be stored as factors, which needs equal shapes.

    Raises:
        WeightMismatchError: the models do not fit each other; the message lists what differs.
        ModelError: a model cannot be found or read, is unfinished, or has no known encoding; or a retriever was given
            as knowledge.
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
    pretrained: OpenModel,
    retriever: OpenModel,
    *,
    accept: Sequence[str],
    layer_scales: Sequence[str] = (),
    adapters: Sequence[OpenModel] = (),
) -> None:
    """Check that a retriever was made from a pretrained model, and knowledge adapters, as far as there are any yet.

    Headers of weights, configs and tokenizers are read. The pretrained model is hashed only if an adapter was made by
    readapt.

    Args:
        pretrained: the model before retrieval training.
        retriever: the model after it.
        adapters: knowledge adapters or tuned models.
        accept: mismatches to allow: config, tokenizer, vocabulary, base.
        layer_scales: ranges of layers that a later merge will scale, such as 0-11=0.8; the models must have them.

    Raises:
        WeightMismatchError: the models do not fit each other; the message lists what differs.
        ModelError: a model cannot be read, or the retriever encodes only queries.
        InputError: the models lack layers of `layer_scales`.
    """
    refuse_query_model(retriever)
    check_layers(ranges_of(layer_scales), _open_pair(pretrained, retriever, adapters, accept).names())
    check_bases(pretrained, [retriever, *adapters], accept="base" in accept)


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
    """Open the base model and the bundle. The base is `pretrained`, or the one that the bundle names."""
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
