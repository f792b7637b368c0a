"""Make README.md of a merged model: what it was made from, how to use it, what the cast lost.

In: records of the merged models, the encoding, the scales. Out: Markdown with the metadata that the
Hugging Face hub reads. The same models and options give the same text.
"""

import json
from collections.abc import Mapping, Sequence

from readapt_ray.artifacts import read_manifest
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import InputError
from readapt_ray.storage import Location
from readapt_ray.weights.low_rank import FactorRecord
from readapt_ray.weights.model_files import prompts
from readapt_ray.weights.provenance import MergeInput

CARD_NAME = "README.md"
NAME_IN_CARD = "PATH_OF_THIS_FOLDER"
"""Placeholder for the model's name in the card; a push replaces it by the repository's name."""

Share = float | None


def model_card(
    *,
    encoding: Encoding,
    scales: str,
    command: str,
    sources: Sequence[MergeInput],
    survives: Mapping[str, Mapping[str, Share]],
    dtype: str,
    measures: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the text of a merged model's README.md, in which NAME_IN_CARD stands for the model's name.

    Args:
        encoding: how text becomes a vector.
        scales: the scales of the merge, in words, such as "readapter 1.0, knowledge 0.5".
        command: the command that makes the same model again.
        sources: the models that it was made from.
        survives: shares of the update and of the knowledge that survived the cast, by kind of tensor; see `CastLoss`.
        dtype: name of the type that the weights were cast to.
        measures: lines of Markdown with measures of retrieval quality; empty if none are known.
        notes: more notes for the reader, each shown as a list item.
    """
    return "\n".join(
        [
            *_metadata(sources),
            "# Readapted retriever",
            "",
            "Made by readapt_ray: `pretrained + readapter_scale * (retriever - pretrained) + knowledge_scale * "
            "(tuned - pretrained)`, summed in float32 and cast once.",
            "",
            f"Scales: {scales}.",
            "",
            f"    {command}",
            "",
            *_provenance(sources),
            *(["## Measures", "", *measures, ""] if measures else []),
            *_usage(encoding),
            *_loss(survives, dtype),
            *[f"- {note}" for note in [*_limits(encoding), *notes]],
            "",
        ]
    )


def _metadata(sources: Sequence[MergeInput]) -> list[str]:
    hub_ids = [each.name for each in sources if each.revision and each.role in ("pretrained", "retriever")]
    return [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: feature-extraction",
        "tags: [sentence-transformers, feature-extraction, retrieval, readapt-ray]",
        *([f"base_model: [{', '.join(hub_ids)}]", "base_model_relation: merge"] if hub_ids else []),
        "---",
        "",
    ]


def _provenance(sources: Sequence[MergeInput]) -> list[str]:
    files = [
        f"| {each.role} | `{name}` | `{digest}` |" for each in sources for name, digest in each.weight_files.items()
    ]
    return [
        "| ingredient | name | revision | fingerprint |",
        "|---|---|---|---|",
        *[f"| {each.role} | `{each.name}` | {each.revision or '-'} | `{each.fingerprint}` |" for each in sources],
        "",
        "| ingredient | file of weights | SHA-256 |",
        "|---|---|---|",
        *files,
        "",
    ]


def _usage(encoding: Encoding) -> list[str]:
    prefixes = prompts(encoding)
    cut = f", truncate_dim={encoding.dimensions}" * (encoding.dimensions is not None)
    # sentence-transformers truncates after its Normalize module, so vectors have to be normalised again.
    again = ", normalize_embeddings=True" * (encoding.dimensions is not None and encoding.normalize)
    return [
        "## Encoding",
        "",
        f"Pooling {encoding.pooling}, {'normalised' if encoding.normalize else 'not normalised'}, BOS {encoding.add_bos}, "
        f"EOS {encoding.add_eos}, at most {encoding.max_query_tokens} tokens a query and {encoding.max_passage_tokens} a "
        "passage.",
        "",
        f"- query: `{json.dumps(encoding.query_template, ensure_ascii=False)}`",
        f"- passage: `{json.dumps(encoding.passage_template, ensure_ascii=False)}`",
        *([f"- task: `{encoding.task}`"] if encoding.task else []),
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{NAME_IN_CARD}"{cut})',
        *([f'queries = model.encode(["..."], prompt_name="query"{again})'] if "query" in prefixes else []),
        *(
            [f'passages = model.encode(["title text"], prompt_name="document"{again})']
            if "document" in prefixes
            else []
        ),
        "```",
        "",
        "Other servers pool as this folder says; the client writes what comes before a text, or an option:",
        "",
        f"    vllm serve {NAME_IN_CARD} --runner pooling",
        f"    text-embeddings-router --model-id {NAME_IN_CARD}{' --default-prompt-name query' * ('query' in prefixes)}",
        "",
    ]


def _loss(survives: Mapping[str, Mapping[str, Share]], dtype: str) -> list[str]:
    rows = [
        f"| `{kind}` | {_percent(shares['update'])} | {_percent(shares['knowledge'])} |"
        for kind, shares in survives.items()
    ]
    return [
        f"## What the cast to {dtype} left",
        "",
        "Share of the squared update that survives the cast: of all that was added to the pretrained weights, and of what "
        "the knowledge adapters added.",
        "",
        "| tensors | update | knowledge |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _percent(share: Share) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _limits(encoding: Encoding) -> list[str]:
    """Return notes on limits and prompts that users of other libraries must know."""
    notes = []
    if encoding.max_query_tokens != encoding.max_passage_tokens:
        notes.append(
            f"sentence-transformers has one limit for both ({max(encoding.max_query_tokens, encoding.max_passage_tokens)} "
            f"tokens here); to cut longer queries as readapt_ray does, set model.max_seq_length = "
            f"{encoding.max_query_tokens} before they are encoded."
        )
    if encoding.dimensions is not None:
        notes.append(
            f"Vectors are the first {encoding.dimensions} numbers of the model's. No file of a model says so to other "
            f"libraries and servers: cut theirs, then normalise, as above."
        )
    for kind in sorted({"query", "document"} - prompts(encoding).keys()):
        notes.append(
            f"The template of a {kind} has words behind the text, which no prompt can hold: write them yourself."
        )
    return notes


def truncation_note(stored: Sequence[FactorRecord]) -> list[str]:
    """Return a note on how much of the retriever's difference its truncated SVD holds, as a list of one sentence.

    Args:
        stored: the records from `write_difference`; the list is empty if none of them is of factors.
    """
    factored = [each for each in stored if each.rank]
    if not factored:
        return []
    least = min(each.variance for each in factored)
    ranks = sorted(each.rank or 0 for each in factored)
    return [
        f"The retriever's difference is its truncated SVD in {len(factored)} matrices (rank {ranks[0]} to {ranks[-1]}, at "
        f"least {least:.4f} of its variance), and whole in {sum(each.rank is None for each in stored)} tensors."
    ]


def measures_of(uri: str) -> list[str]:
    """Read the measures in an output of `readapt tune` or `readapt evaluate`, as lines of Markdown.

    These are one line about the chosen scales (tune), or the whole report.md (evaluate).

    Raises:
        InputError: the URI is no such output.
    """
    manifest = read_manifest(uri)
    if manifest is None or manifest.stage not in ("tune", "evaluate"):
        raise InputError(f"measures = {uri!r} is no output of `readapt tune` or `readapt evaluate`; give one's folder")
    if manifest.stage == "evaluate":
        return (Location(uri) / "report.md").read_text().strip().splitlines()
    best, reported = manifest.details["best"], manifest.details["reported"]
    low, high = reported["interval"] or (reported["difference"], reported["difference"])
    layers = manifest.details.get("layer_scales")
    by_layer = f" with layer_scales {','.join(layers)}" if layers else ""
    return [
        f"The scales were chosen by `readapt tune` ({manifest.details['queries']}): readapter {best['readapter_scale']}, "
        f"knowledge {best['knowledge_scale']}{by_layer}. On the withheld half, {reported['num_queries']:,} queries: {reported['measure']} "
        f"{reported['mean']:.4f}, {reported['difference']:+.4f} from the retriever as it was (95% interval {low:+.4f} to {high:+.4f})."
    ]
