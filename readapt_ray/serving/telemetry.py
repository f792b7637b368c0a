"""Measure serving with Ray's Prometheus metrics: `ray_readapt_...` at the metrics port of each node.

`GET /metrics` of a gateway gathers them from all nodes, so one scrape of any gateway sees all replicas. New values
appear after about ten seconds.
"""

from dataclasses import dataclass, field

from ray.util.metrics import Counter, Histogram

from readapt_ray.serving.batching import Timing
from readapt_ray.serving.doc_filter import DocFilter

PREFIX = "ray_readapt_"

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
_DIFFERENCES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]


@dataclass(kw_only=True)
class Trace:
    """Facts about a request, for the log, the metrics and the `Server-Timing` header."""

    request_id: str = ""
    key: str = ""
    """Name of the API key, never the key itself; empty without one."""
    within: DocFilter | None = None
    """Filter of the API key, which restricts every search of the request; None for no restriction."""
    domains: frozenset[str] | None = None
    """Names of the domains or versions that the API key may use; None for all."""
    version: str = ""
    """Name of the version or domain that answers; empty before it is chosen."""
    num_items: int = 0
    """Number of texts or queries."""
    num_tokens: int = 0
    """Number of tokens that were encoded for them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each part of the work took: queue, encode, search."""


class Telemetry:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        by_version = ("version",)
        self._requests = Counter("readapt_requests", "Requests answered.", ("path", "status", "version", "key"))
        self._seconds = Histogram("readapt_request_seconds", "From request to answer.", _SECONDS, ("path", "version"))
        self._tokens = Counter("readapt_tokens", "Tokens of texts.", by_version)
        self._queue = Histogram("readapt_queue_seconds", "Wait for the encoder.", _SECONDS, by_version)
        self._encode = Histogram("readapt_encode_seconds", "Encoding of a request's texts.", _SECONDS, by_version)
        self._search = Histogram("readapt_search_seconds", "Search of a request's queries.", _SECONDS, by_version)
        self._batch_rows = Histogram("readapt_batch_rows", "Texts in a batch.", _ROWS, by_version)
        self._batch_tokens = Counter("readapt_batch_tokens", "Tokens in batches.", by_version)
        self._batch_budget = Counter("readapt_batch_budget", "Tokens that batches had room for.", by_version)
        self._batch_seconds = Histogram("readapt_batch_seconds", "Encoding of a batch.", _SECONDS, by_version)
        self._partial = Counter("readapt_partial_searches", "Searches without a part of the index.", by_version)
        self._not_finite = Counter("readapt_not_finite", "Texts whose vectors had NaN or infinity.", by_version)
        self._recall_found = Counter(
            "readapt_recall_found", "Passages of the 10 best that the index found.", by_version
        )
        self._recall_expected = Counter("readapt_recall_due", "Passages of the 10 best.", by_version)
        both = ("version", "shadow")
        self._shadow_shared = Counter("readapt_shadow_shared", "Passages of the first 10 that both found.", both)
        self._shadow_expected = Counter("readapt_shadow_due", "Passages of the first 10.", both)
        self._difference = Histogram(
            "readapt_shadow_score_difference", "Between the best scores of the two, without sign.", _DIFFERENCES, both
        )

    def request(self, path: str, status: int, version: str, key: str, seconds: float) -> None:
        """Count a request that was answered, or whose client went away (status 499)."""
        self._requests.inc(1, {"path": path, "status": str(status), "version": version, "key": key})
        self._seconds.observe(seconds, {"path": path, "version": version})

    def tokens(self, version: str, num_tokens: int) -> None:
        """Count the tokens of a request's texts."""
        if num_tokens:
            self._tokens.inc(num_tokens, {"version": version})

    def encoded(self, version: str, timing: Timing) -> None:
        """Record the time that the texts of a request waited, and took to encode."""
        self._queue.observe(timing.queue_s, {"version": version})
        self._encode.observe(timing.encode_s, {"version": version})

    def searched(self, version: str, seconds: float) -> None:
        """Record the time that the search for a request took."""
        self._search.observe(seconds, {"version": version})

    def batch(self, version: str, budget: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Record the rows, the tokens and the seconds of a batch; `budget` is the maximum number of its tokens."""
        tags = {"version": version}
        self._batch_rows.observe(num_rows, tags)
        self._batch_tokens.inc(num_tokens, tags)
        self._batch_budget.inc(max(budget, num_tokens), tags)
        self._batch_seconds.observe(seconds, tags)

    def not_finite(self, version: str, num_texts: int) -> None:
        """Count texts whose vectors have NaN or infinity."""
        self._not_finite.inc(num_texts, {"version": version})

    def partial(self, version: str) -> None:
        """Count a search that was answered without a part of the index."""
        self._partial.inc(1, {"version": version})

    def probed(self, version: str, num_found: int, num_expected: int) -> None:
        """Count a query that was repeated exactly: how many of the (up to 10) best passages the index had found."""
        _add(self._recall_found, num_found, {"version": version})
        _add(self._recall_expected, num_expected, {"version": version})

    def compared(self, version: str, shadow: str, num_shared: int, num_expected: int, score_difference: float) -> None:
        """Count a query that a shadow version repeated.

        Args:
            version: name of the version that answered.
            shadow: name of the shadow version.
            num_shared: number of passages that both have among their first 10.
            num_expected: number of passages that both could share: 10, or fewer if fewer were asked for or found.
            score_difference: difference of their best scores; only its size is recorded.
        """
        tags = {"version": version, "shadow": shadow}
        _add(self._shadow_shared, num_shared, tags)
        _add(self._shadow_expected, num_expected, tags)
        self._difference.observe(abs(score_difference), tags)


def _add(counter: Counter, number: int, tags: dict[str, str]) -> None:
    """Add to a counter. A share is kept as two counters, since Ray's sums of histograms are inexact."""
    if number:
        counter.inc(number, tags)
