"""Fit maps for query vectors of a new model, so that they can search the passage vectors of an old model.

In: vectors of the same passages by both models. Out: several maps (Drift-Adapter, arXiv 2509.23471); the caller chooses
one by recall. The paper predicts old vectors from new ones. Here new passage vectors are predicted from old ones,
p_new = S p_old, and a query is multiplied by the transpose: q_new · (S p_old) = (S' q_new) · p_old. So the map fits the
scores of the new model, not the vector that the old model would have given the query. On Cranfield (1,118 passages to
fit; from a model of 256 dimensions to all-MiniLM-L6-v2) this finds 0.29 of the new model's ten best, and the paper's
direction 0.11. An orthogonal map is the same in both directions. 16,000 vectors of 4,096 numbers take 0.5 GB for both
models, and as much for their products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch.nn import functional

from readapt_ray.seeds import derive_seed

Matrix = NDArray[np.float32]

_RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridge strengths to try, as fractions of the mean variance of the old vectors. Small samples need a stronger ridge:
with as many passages as dimensions (SmolLM2 and its adapted form, Cranfield) 1e-3 finds .70 of the ten best, 1e-1
.79."""
_RANK_SHARES = (0.5, 0.25)
_HIDDEN = 256
_NUM_EPOCHS = 20
_BATCH, _POOL = 256, 4096
_LEARNING_RATE = 1e-3
_TEMPERATURE = 0.02
_LEAST_LENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class QueryMap:
    """A map of query vectors of the new model: x -> x matrix + gelu(x inward + bias) outward."""

    name: str
    """orthogonal, affine (with its ridge or rank) or residual."""
    matrix: Matrix
    """[D_new, D_old]."""
    inward: Matrix | None = None
    """[D_new, H]; None for a map without the residual network."""
    bias: Matrix | None = None
    """[H]."""
    outward: Matrix | None = None
    """[H, D_old]."""

    def __call__(self, queries: Matrix) -> Matrix:
        """Map queries [Q, D_new] to float32 [Q, D_old] of length 1; scores with normalised vectors are cosines."""
        mapped = queries @ self.matrix
        if self.inward is not None and self.bias is not None and self.outward is not None:
            mapped += functional.gelu(torch.from_numpy(queries @ self.inward + self.bias)).numpy() @ self.outward
        return functional.normalize(torch.from_numpy(mapped), dim=1, eps=_LEAST_LENGTH).numpy()

    def to_bytes(self) -> bytes:
        """Return the map, without its name, as the content of a safetensors file."""
        named = {name: getattr(self, name) for name in ("matrix", "inward", "bias", "outward")}
        return bytes(save({name: array for name, array in named.items() if array is not None}))

    @classmethod
    def from_bytes(cls, name: str, content: bytes) -> "QueryMap":
        """Read what `to_bytes` wrote, and give the map its name."""
        return cls(name, **load(content))


def fit_maps(new: Matrix, old: Matrix, *, seed: int, recall: Callable[[QueryMap], float]) -> Iterator[QueryMap]:
    """Fit candidate maps, and yield one after the other.

    They are an orthogonal map, affine maps that several ridges pull towards it, the best affine map at lower ranks, and
    a residual map, which adds a small network to the best of these.

    Args:
        new: [N, D_new], vectors of N passages by the new model.
        old: [N, D_old], vectors of the same passages by the old model.
        seed: of the residual map's training.
        recall: returns the recall of a map (higher is better) on passages that are not among the N. It chooses the
            ridge, the start of the residual map and its epoch. The maps come in no order of recall.
    """
    centred_new, centred_old = new - new.mean(axis=0), old - old.mean(axis=0)
    across = (centred_old.T @ centred_new).astype(np.float64)
    within = (centred_old.T @ centred_old).astype(np.float64)
    start = orthogonal(across)
    yield QueryMap("orthogonal", _as_matrix(start))
    by_ridge = {ridge: ridge_regression(across, within, start, ridge) for ridge in _RIDGES}
    affine = {
        QueryMap(f"affine with ridge {ridge:g}", _as_matrix(found)): (ridge, found) for ridge, found in by_ridge.items()
    }
    yield from affine
    ridge, whole = affine[max(affine, key=recall)]
    lower = [QueryMap(f"affine of rank {rank}", _as_matrix(found)) for rank, found in lower_ranks(within, whole, ridge)]
    yield from lower
    yield _residual(new, old, max([*affine, *lower], key=recall), seed=seed, recall=recall)


def _as_matrix(predicting: NDArray[np.float64]) -> Matrix:
    """Transpose a map of passages [D_old, D_new] to the map of queries [D_new, D_old]."""
    return np.ascontiguousarray(predicting.T, dtype=np.float32)


def orthogonal(across: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve the orthogonal Procrustes problem. If the dimensions differ, rows or columns are orthonormal.

    Args:
        across: old'new [D_old, D_new], of centred vectors.

    Returns:
        float64 [D_old, D_new], the R of this kind for which old R is nearest to new (Schönemann, 1966).
    """
    left, _, right = np.linalg.svd(across, full_matrices=False)
    result: NDArray[np.float64] = left @ right
    return result


def ridge_regression(
    across: NDArray[np.float64], within: NDArray[np.float64], start: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Fit the ridge regression [D_old, D_new] of new vectors on old ones, pulled towards a given map.

    Args:
        across: old'new [D_old, D_new], of centred vectors.
        within: old'old [D_old, D_old].
        start: [D_old, D_new], the map that an infinite ridge would give.
        ridge: strength, as a fraction of the mean variance of the old vectors.
    """
    found: NDArray[np.float64] = start + np.linalg.solve(_with_ridge(within, ridge), across - within @ start)
    return found


def lower_ranks(
    within: NDArray[np.float64], whole: NDArray[np.float64], ridge: float
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Reduce a ridge regression to half and a quarter of its rank (reduced-rank regression; Izenman, 1975).

    Args:
        within: old'old [D_old, D_old], of centred vectors.
        whole: [D_old, D_new], the result of `ridge_regression`.
        ridge: the strength it was fitted with.

    Yields:
        The rank, and the map [D_old, D_new] of that rank.
    """
    directions = np.linalg.eigh(whole.T @ _with_ridge(within, ridge) @ whole)[1][:, ::-1]
    for share in _RANK_SHARES:
        rank = max(1, int(share * min(whole.shape)))
        kept = directions[:, :rank]
        yield rank, whole @ kept @ kept.T


def _with_ridge(within: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    size = len(within)
    result: NDArray[np.float64] = within + ridge * np.trace(within) / size * np.eye(size)
    return result


def _residual(new: Matrix, old: Matrix, start: QueryMap, *, seed: int, recall: Callable[[QueryMap], float]) -> QueryMap:
    """Train a small network beside a matrix, so that mapped queries score old vectors as queries score new ones.

    Each passage serves as a query; the loss is the Kullback-Leibler divergence of the softmax over other passages. The
    epoch of highest recall is returned, since many epochs overfit some thousand passages.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(derive_seed(seed, "residual map"))
    x, y = torch.from_numpy(new).to(device), torch.from_numpy(old).to(device)
    matrix = torch.from_numpy(start.matrix).to(device)
    probe = x[:_BATCH]
    matrix *= (probe @ x.T).std() / (probe @ matrix @ y.T).std()
    inward = torch.empty(x.shape[1], _HIDDEN)
    torch.nn.init.kaiming_uniform_(inward.T, generator=random)
    weights = [
        each.to(device).requires_grad_() for each in (inward, torch.zeros(_HIDDEN), torch.zeros(_HIDDEN, y.shape[1]))
    ]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE)
    num_steps = _NUM_EPOCHS * -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    best, best_recall = None, -1.0
    for _ in range(_NUM_EPOCHS):
        for batch in torch.split(torch.randperm(len(x), generator=random), _BATCH):
            pool = torch.randperm(len(x), generator=random)[:_POOL]
            mapped = x[batch] @ matrix + functional.gelu(x[batch] @ weights[0] + weights[1]) @ weights[2]
            itself = (batch[:, None] == pool).to(device)
            optimizer.zero_grad()
            torch.autograd.backward(_divergence(x[batch] @ x[pool].T, mapped @ y[pool].T, itself))
            optimizer.step()
            schedule.step()
        arrays = [each.detach().cpu().numpy().copy() for each in (matrix, *weights)]
        trained = QueryMap("residual", *arrays)
        if (found := recall(trained)) > best_recall:
            best, best_recall = trained, found
    assert best is not None
    return best


def _divergence(wanted: torch.Tensor, scores: torch.Tensor, itself: torch.Tensor) -> torch.Tensor:
    """Return the divergence of scores [Q, N] from the wanted ones, with each query's own passage masked."""
    found, target = (
        functional.log_softmax((each / _TEMPERATURE).masked_fill(itself, -1e9), dim=1) for each in (scores, wanted)
    )
    return functional.kl_div(found, target, log_target=True, reduction="batchmean")
