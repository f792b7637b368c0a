"""Ask a language model to write queries for passages, in pieces of 64 passages.

An endpoint is asked from this process; a local model runs in Ray tasks. Each piece has its file,
`answers/part-00000.parquet` and so on; a piece whose file exists is not asked again. A task holds one piece and the
model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from readapt_ray.synthesis.answers import Ask, Writer
from readapt_ray.synthesis.endpoint import EndpointWriter
from readapt_ray.synthesis.prompts import fill, passage_text
from readapt_ray.synthesis.query_filter import take_query

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
        budget_tokens: limit on tokens, including the pieces that are already written; None for no limit. It is looked
            at before each piece, so the last piece may exceed it.
        report: called with the number of passages done, of all pieces.

    Returns:
        True if every piece has its file; False if the budget ran out before.

    Raises:
        InputError, WorkerError: the endpoint refuses, or cannot be reached.
    """
    missing, spent = job.missing_in_random_order(), 0
    if budget_tokens is not None:
        spent = int(np.sum(read_answers(job)["num_tokens"].to_numpy()))
    for place, number in enumerate(missing):
        if budget_tokens is not None and spent >= budget_tokens:
            return False
        spent += _write(job, number, writer)
        report(_num_done(job, len(missing) - place - 1))
    return True


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

    A passage has `queries_per_passage` rows. Pieces without a file are left out; without any the table is empty.
    """
    there = set(range(job.num_pieces)).difference(job.missing())
    return pa.concat_tables([ANSWER_SCHEMA.empty_table(), *(_read(job.file(number)) for number in sorted(there))])


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
    first = number * PASSAGES_A_PIECE
    rows = job.rows[first : first + PASSAGES_A_PIECE]
    table = job.passages.take(rows, ("doc_id", "title", "text"))
    titles = table["title"].to_pylist() if "title" in table.column_names else [""] * len(rows)
    texts = [
        passage_text(title, text or "", job.max_passage_chars)
        for title, text in zip(titles, table["text"].to_pylist(), strict=True)
    ]
    asked = [(place, again) for place in range(len(texts)) for again in range(job.queries_per_passage)]
    asks = [
        Ask((first + place) * job.queries_per_passage + again, fill(job.prompt, texts[place])) for place, again in asked
    ]
    answers = writer.answer(
        asks,
        temperature=job.temperature,
        max_tokens=job.max_query_tokens,
        seed=derive_seed(job.seed, "synthesize") % 2**31,
    )
    taken = [take_query(answer.text, texts[place]) for answer, (place, _) in zip(answers, asked, strict=True)]
    doc_ids = table["doc_id"].to_pylist()
    columns = {
        "doc_id": [doc_ids[place] for place, _ in asked],
        "answer": [answer.text for answer in answers],
        "query": [each.query for each in taken],
        "reason": [each.reason for each in taken],
        "num_tokens": [answer.num_tokens for answer in answers],
    }
    with job.file(number).open_output() as stream:
        pq.write_table(pa.table(columns, schema=ANSWER_SCHEMA), stream, compression="zstd")
    return sum(answer.num_tokens for answer in answers)
