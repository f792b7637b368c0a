"""Ask a language model to write queries for passages, in pieces of 64 passages.

An endpoint is asked from this process; a local model runs in Ray tasks. Each piece has its file,
`answers/part-00000.parquet` and so on; a piece whose file exists is not asked again. If an endpoint fails or the budget
ends in the middle of a piece, its answers so far are in `answers/part-00000-partly.parquet`. A task holds one piece and
the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.cluster import autoscaling, bounded_tasks, connection, on_worker
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.retrieval.parquet_rows import ParquetRows, explain_damage
from readapt_ray.seeds import derive_seed, random_generator
from readapt_ray.storage import Location
from readapt_ray.synthesis.answers import Answer, Ask, Writer
from readapt_ray.synthesis.endpoint import EndpointWriter
from readapt_ray.synthesis.prompts import fill, passage_text
from readapt_ray.synthesis.query_filter import take_query
from readapt_ray.synthesis.token_budget import TokenBudget

PASSAGES_A_PIECE = 64
ANSWER_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("answer", pa.string()),
        ("query", pa.string()),
        ("reason", pa.string()),
        ("num_tokens", pa.int64()),
    ]
)
_PARTLY_SCHEMA = ANSWER_SCHEMA.append(pa.field("number", pa.int64()))
"""Columns of a file with some answers of a piece: those of all answers, and the number of the prompt."""
_HOPELESS = 256
"""Number of answers after which an endpoint is not asked again if none of them gave a query."""


@dataclass(frozen=True, kw_only=True)
class WritingJob:
    """Which passages a language model is asked about, with which prompt and options, and where answers are written."""

    passages: ParquetRows
    rows: NDArray[np.int64]
    """Row numbers of the passages to ask about, in this order."""
    answers: Location
    """Folder for the files of answers."""
    prompt: str
    """Template of the prompt, with a place for the passage."""
    queries_per_passage: int
    max_passage_chars: int
    temperature: float
    max_query_tokens: int
    seed: int

    @property
    def num_pieces(self) -> int:
        """Return the number of files of answers."""
        return -(-len(self.rows) // PASSAGES_A_PIECE)

    def file(self, number: int) -> Location:
        """Return the path of a piece's file, `part-00000.parquet` for piece 0; it may not exist yet."""
        return self.answers / f"part-{number:05d}.parquet"

    def partly(self, number: int) -> Location:
        """Return the path of the file with some answers of a piece, `part-00000-partly.parquet`; it may not exist."""
        return self.answers / f"part-{number:05d}-partly.parquet"

    def missing(self) -> list[int]:
        """Return the numbers of the pieces that have no file yet, ascending; the folder is listed at each call."""
        there = {name for name, _ in self.answers.listing(".parquet")}
        return [number for number in range(self.num_pieces) if self.file(number).name not in there]

    def missing_in_random_order(self) -> list[int]:
        """Return the missing pieces in a random order, so that a job that ends early covers all parts of the corpus.

        The seed of the job decides the order, so a resumed job keeps to it.
        """
        missing = set(self.missing())
        order = random_generator(self.seed, "order of synthesized pieces").permutation(self.num_pieces).tolist()
        return [number for number in order if number in missing]


def ask_here(
    job: WritingJob, writer: EndpointWriter, *, budget_tokens: int | None, report: Callable[[int], None]
) -> bool:
    """Have an endpoint answer the missing pieces, in a random order, and write their files.

    Args:
        job: the passages and the prompt.
        writer: the endpoint.
        budget_tokens: limit on tokens, including those of earlier answers; None for no limit. A request is sent only if
            it fits, by an estimate of its tokens.
        report: called with the number of passages done, of all pieces.

    Returns:
        True if every piece has its file; False if the budget ran out before, or none of the first answers gave a query.

    Raises:
        InputError, WorkerError: the endpoint refuses, or cannot be reached. Answers that arrived are kept.
    """
    before = read_answers(job)
    budget = TokenBudget(budget_tokens, spent=int(np.sum(before["num_tokens"].to_numpy())))
    num_answers, has_query = len(before), "" in before["reason"].to_pylist()
    missing = job.missing_in_random_order()
    for place, number in enumerate(missing):
        if num_answers >= _HOPELESS and not has_query:
            return False
        new = _ask_piece(job, number, writer, budget)
        num_answers, has_query = num_answers + len(new), has_query or "" in new
        if budget.is_exhausted:
            return not job.missing()
        report(_num_done(job, len(missing) - place - 1))
    return True


def _ask_piece(job: WritingJob, number: int, writer: EndpointWriter, budget: TokenBudget) -> list[str]:
    """Have an endpoint answer the rest of a piece, and write its file; return the reason of each new answer.

    If it fails, or the budget ends, the answers so far are written, and a later call asks only for the others.
    """
    piece, kept = _piece(job, number), _partly_answered(job, number)
    answers = dict(kept)
    asks = [ask for ask in piece.asks if ask.number not in kept]
    try:
        for ask, answer in writer.answers(asks, budget, **_options(job)):
            answers[ask.number] = answer
    finally:
        if len(answers) == len(piece.asks):
            _write_file(job.file(number), piece.table(answers).select(ANSWER_SCHEMA.names))
            job.partly(number).delete()
        elif len(answers) > len(kept):
            _write_file(job.partly(number), piece.table(answers))
    new = {each: answer for each, answer in answers.items() if each not in kept}
    return [str(reason) for reason in piece.table(new)["reason"].to_pylist()]


def _options(job: WritingJob) -> dict[str, Any]:
    """Return the options of a writer's answers."""
    seed = derive_seed(job.seed, "synthesize") % 2**31
    return {"temperature": job.temperature, "max_tokens": job.max_query_tokens, "seed": seed}


def _partly_answered(job: WritingJob, number: int) -> dict[int, Answer]:
    """Read the answers of a piece that was not finished, by the number of the prompt; empty if there are none."""
    if not job.partly(number).is_file():
        return {}
    rows = _read(job.partly(number)).to_pylist()
    return {row["number"]: Answer(row["answer"], row["num_tokens"]) for row in rows}


def ask_on_ray(job: WritingJob, model: OpenModel, *, dtype: str, report: Callable[[int], None]) -> None:
    """Have a language model answer the missing pieces in Ray tasks, one per GPU; without GPUs one per node.

    Args:
        job: the passages and the prompt.
        model: the language model.
        dtype: data type that it computes in.
        report: called with the number of passages done, of all pieces.

    Raises:
        ModelError: the model cannot generate text.
        PlacementError: the cluster has no CPU, or no GPU node came up in time.
        WorkerError: a task died after all of Ray's retries.
    """
    import ray

    missing = job.missing()
    if not missing:
        return
    total = connection.connect()
    num_cpus = 1 if total.num_gpus else max(1, total.num_cpus // total.num_nodes)
    num_tasks, num_cpus, num_gpus = place_actors(Placement(None, num_cpus), len(missing))
    connection.check_seen_by_all(job.answers)
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, num_returns="streaming")(_write_pieces)
    writer = on_worker.model_name(model), model.fingerprint
    options = {"dtype": dtype, "driver_node": on_worker.this_node(), "num_threads": num_cpus}
    with autoscaling.requested(num_tasks, {"CPU": num_cpus, "GPU": num_gpus}, least=1):
        streams = [task.remote(job, missing[number::num_tasks], writer, **options) for number in range(num_tasks)]
        try:
            for place in range(len(missing)):
                ray.get(next(streams[place % num_tasks]))
                report(_num_done(job, len(missing) - place - 1))
        except BaseException as error:
            bounded_tasks.cancel(streams)
            if isinstance(error, ray.exceptions.RayError):
                raise connection.cause_of(error) from None
            raise


def read_answers(job: WritingJob) -> pa.Table:
    """Return the answers that are written so far, in the order of `job.rows`, with the columns of `ANSWER_SCHEMA`.

    A passage has `queries_per_passage` rows, or fewer if its piece is not finished. Without any answer the table is
    empty.
    """
    there = {name for name, _ in job.answers.listing(".parquet")}
    files = [
        next((each for each in (job.file(number), job.partly(number)) if each.name in there), None)
        for number in range(job.num_pieces)
    ]
    tables = [_read(each).select(ANSWER_SCHEMA.names) for each in files if each is not None]
    return pa.concat_tables([ANSWER_SCHEMA.empty_table(), *tables])


def _num_done(job: WritingJob, pieces_left: int) -> int:
    return max(0, len(job.rows) - pieces_left * PASSAGES_A_PIECE)


def _read(file: Location) -> pa.Table:
    with explain_damage(file), file.open_input() as stream:
        return pq.read_table(stream)


def _write_pieces(
    job: WritingJob,
    numbers: Sequence[int],
    writer_name: tuple[str, str],
    *,
    dtype: str,
    driver_node: str,
    num_threads: int,
) -> Iterator[int]:
    """Load the model and answer pieces, in a Ray task; yield the number of tokens of each piece."""
    import torch

    from readapt_ray.retrieval.encoder import DTYPES
    from readapt_ray.synthesis.local_writer import LocalWriter

    on_worker.check_node()
    torch.set_num_threads(num_threads)
    name, fingerprint = writer_name
    model = open_model(name)
    on_worker.check_same_model(name, lambda: model.fingerprint, {fingerprint}, driver_node=driver_node)
    writer = LocalWriter(model, dtype=DTYPES[dtype], device="cuda" if torch.cuda.is_available() else "cpu")
    for number in numbers:
        yield 0 if job.file(number).is_file() else _write(job, number, writer)


def _write(job: WritingJob, number: int, writer: Writer) -> int:
    """Answer a piece and write its file; return the number of tokens used."""
    piece = _piece(job, number)
    answers = writer.answer(piece.asks, **_options(job))
    numbered = {ask.number: answer for ask, answer in zip(piece.asks, answers, strict=True)}
    _write_file(job.file(number), piece.table(numbered).select(ANSWER_SCHEMA.names))
    return sum(answer.num_tokens for answer in answers)


@dataclass(frozen=True)
class _Piece:
    """The prompts of a piece, with the doc_id and the text of the passage of each."""

    asks: list[Ask]
    doc_ids: list[str]
    texts: list[str]

    def table(self, answers: Mapping[int, Answer]) -> pa.Table:
        """Return the rows of the prompts that have an answer, in their order, by `_PARTLY_SCHEMA`."""
        rows = []
        for ask, doc_id, text in zip(self.asks, self.doc_ids, self.texts, strict=True):
            if (answer := answers.get(ask.number)) is not None:
                taken = take_query(answer.text, text)
                rows.append((doc_id, answer.text, taken.query, taken.reason, answer.num_tokens, ask.number))
        columns = zip(*rows, strict=True) if rows else [()] * len(_PARTLY_SCHEMA)
        return pa.table(dict(zip(_PARTLY_SCHEMA.names, map(list, columns), strict=True)), schema=_PARTLY_SCHEMA)


def _piece(job: WritingJob, number: int) -> _Piece:
    """Read the passages of a piece and make the prompts; each passage has `queries_per_passage` of them."""
    first = number * PASSAGES_A_PIECE
    rows = job.rows[first : first + PASSAGES_A_PIECE]
    table = job.passages.take(rows, ("doc_id", "title", "text"))
    titles = table["title"].to_pylist() if "title" in table.column_names else [""] * len(rows)
    found = zip(table["doc_id"].to_pylist(), titles, table["text"].to_pylist(), strict=True)
    piece = _Piece([], [], [])
    for place, (doc_id, title, text) in enumerate(found, start=first):
        passage = passage_text(title, text or "", job.max_passage_chars)
        for again in range(job.queries_per_passage):
            piece.asks.append(Ask(place * job.queries_per_passage + again, fill(job.prompt, passage)))
            piece.doc_ids.append(doc_id)
            piece.texts.append(passage)
    return piece


def _write_file(file: Location, table: pa.Table) -> None:
    with file.open_output() as stream:
        pq.write_table(table, stream, compression="zstd")
