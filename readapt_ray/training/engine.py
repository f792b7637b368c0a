"""One optimizer step under DeepSpeed, whatever the number of workers, and its state as one file.

DeepSpeed averages gradients over workers. A step's loss is a sum over all its tokens divided by
their number over *all* workers, so each worker scales its part by the number of workers; then one
worker and many take the same step. Workers run the same number of backward passes, since those are
collective where gradients are partitioned: a worker short of one repeats its first at weight zero.

A checkpoint is one safetensors file with the trained tensors and Adam's moments under the parameters'
names, so it does not depend on the number of workers and is either whole or not there.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from readapt_ray.errors import CorruptFileError, TrainingDivergedError
from readapt_ray.storage import Location
from readapt_ray.training.dora import refresh_norms

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEPT_CHECKPOINTS = 2


def deepspeed_config(*, zero_stage: int, max_gradient_norm: float) -> dict[str, Any]:
    """DeepSpeed's settings. Batches and accumulation are ours, so DeepSpeed is told of one a step."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def linear_schedule(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step (from 0): a linear rise, then a linear fall to 0 after the last."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


@dataclass(frozen=True)
class StepOutcome:
    """What one step gave. `loss` is the mean over all workers' loss-bearing units."""

    loss: float
    gradient_norm: float


class Engine:
    """A model under DeepSpeed with AdamW on its trainable parameters.

    Args:
        model: on the worker's device; frozen parameters stay as they are.
        learning_rate: peak rate.
        weight_decay: AdamW's.
        zero_stage: what DeepSpeed partitions over workers: 0 nothing, 1 optimizer state, 2 also gradients.
        max_gradient_norm: gradients are clipped to this norm; 0 leaves them.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float, zero_stage: int, max_gradient_norm: float
    ) -> None:
        import deepspeed

        # Else DeepSpeed compiles a C++ extension on a CPU's first use, for minutes, where there is a compiler at all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._learning_rate = learning_rate
        self._zero_stage = zero_stage
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        optimizer = torch.optim.AdamW(
            list(self.trained.values()), lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(zero_stage=zero_stage, max_gradient_norm=max_gradient_norm),
            dist_init_required=False,
        )
        self.model = model
        self.device = torch.device(self._engine.device)
        self.device_type = self.device.type
        self.num_workers = torch.distributed.get_world_size()
        self.worker_rank = torch.distributed.get_rank()

    def step(
        self, parts: Sequence[T], *, num_parts: int, loss_of: Callable[[T], Tensor], rate: float, seed: int
    ) -> StepOutcome:
        """Take one optimizer step.

        Args:
            parts: this worker's micro-batches; may be empty where `num_parts` is 0.
            num_parts: the largest number of micro-batches of any worker.
            loss_of: a part's share of the step's loss; the shares of all workers add up to the mean loss.
            rate: share of the peak learning rate.
            seed: of dropout in this step; each worker adds its rank.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite; no parameter was changed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._learning_rate
        torch.manual_seed(seed * 1_000_003 + self.worker_rank)
        total = torch.zeros((), device=self.device)
        for index in range(num_parts):
            self._engine.set_gradient_accumulation_boundary(index == num_parts - 1)
            loss = loss_of(parts[index]) if index < len(parts) else self._no_loss()
            total += loss.detach()
            self._engine.backward(loss * self.num_workers)
        torch.distributed.all_reduce(total)
        if not torch.isfinite(total):
            raise TrainingDivergedError(
                f"the loss became {total.item()}; lower the learning rate, or look for broken passages"
            )
        self._engine.step()
        refresh_norms(self.model)
        return StepOutcome(loss=float(total), gradient_norm=float(self._engine.get_global_grad_norm() or 0.0))

    def _no_loss(self) -> Tensor:
        return sum((tensor.sum() * 0.0 for tensor in self.trained.values()), torch.zeros((), device=self.device))

    def state(self) -> dict[str, Tensor]:
        """Trained tensors and Adam's moments, whole, on the CPU. Collective where ZeRO partitions."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, tensor in self.trained.items():
            state[name] = tensor.detach().cpu().clone()
            for moment in _MOMENTS:
                if self._zero_stage == 0:
                    value = self._optimizer.state.get(tensor, {}).get(moment)
                else:
                    value = safe_get_full_optimizer_state(tensor, moment)
                state[f"{name}@{moment}"] = (
                    torch.zeros_like(tensor).cpu() if value is None else value.detach().cpu().clone()
                )
        return state

    def load_state(self, state: dict[str, Tensor], *, step: int) -> None:
        """Go on from a state after `step` steps. Collective where ZeRO partitions."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._zero_stage:
            self._allocate_moments(step)
        for name, tensor in self.trained.items():
            with torch.no_grad():
                tensor.copy_(state[name])
            moments = {moment: state[f"{name}@{moment}"].to(tensor.device) for moment in _MOMENTS}
            if self._zero_stage == 0:
                self._optimizer.state[tensor] = {"step": torch.tensor(float(step)), **moments}
                continue
            safe_set_full_fp32_param(tensor, state[name].to(tensor.device))
            for moment, value in moments.items():
                safe_set_full_optimizer_state(tensor, value, moment)
        refresh_norms(self.model)

    def _allocate_moments(self, step: int) -> None:
        """Make DeepSpeed's partitioned moments, which it otherwise makes in the first step, so that they can be set."""
        optimizer = self._optimizer
        for partition in optimizer.single_partition_of_fp32_groups:
            moments = {moment: torch.zeros_like(partition) for moment in _MOMENTS}
            optimizer.optimizer.state[partition] = {"step": torch.tensor(float(step)), **moments}
        optimizer._lazy_init_hp_params_optimizer_state()


def save_checkpoint(folder: Location, step: int, state: dict[str, Tensor]) -> None:
    """Write the state after `step` steps as one file, then remove all but the newest."""
    data = to_safetensors(
        {name: tensor.contiguous() for name, tensor in state.items()}, metadata={"step": json.dumps(step)}
    )
    (folder / f"step-{step:09d}.safetensors").write_bytes(data)
    for old in folder.files(".safetensors")[:-_KEPT_CHECKPOINTS]:
        old.delete()


def newest_checkpoint(folder: Location) -> tuple[int, dict[str, Tensor]] | None:
    """The step and state of the newest whole checkpoint; None where there is none.

    Raises:
        CorruptFileError: checkpoints are there and none can be read.
    """
    files = folder.files(".safetensors")
    problems = []
    for file in reversed(files):
        try:
            return _read_checkpoint(file)
        except (SafetensorError, KeyError, ValueError) as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise CorruptFileError(
            "no checkpoint can be read: " + "; ".join(problems) + "; remove them to start from the beginning"
        )
    return None


def _read_checkpoint(file: Location) -> tuple[int, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        path = file.local_path if file.is_local else Path(folder) / file.name
        if not file.is_local:
            path.write_bytes(file.read_bytes())
        with safe_open(str(path), framework="pt") as opened:
            names = list(opened.keys())
            return int(json.loads(opened.metadata()["step"])), {name: opened.get_tensor(name) for name in names}
