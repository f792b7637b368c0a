"""Take optimizer steps with DeepSpeed on any number of workers, and save and load their state.

The loss of a step is a sum over all its units, divided by their number over *all* workers. Gradients are summed over
workers, so one worker and many take the same step. At ZeRO stage 0 gradients.py sums them. At other stages DeepSpeed
averages them, so each worker multiplies its loss by the number of workers. If gradients or parameters are partitioned,
passes are collective. So all workers run the same number: a worker with fewer repeats a micro-batch at weight zero.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from readapt_ray.errors import TrainingDivergedError
from readapt_ray.seeds import derive_seed
from readapt_ray.training import dora, gradients
from readapt_ray.training.partitioned import gathered

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The settings of the optimizer and of checkpoints, for every objective."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    weight_decay: float
    """Weight decay of AdamW."""
    warmup_fraction: float
    """Share of the steps in which the learning rate rises to its peak."""
    max_gradient_norm: float
    """Gradients are clipped to this norm; 0 does not clip."""
    zero_stage: int
    """What DeepSpeed partitions over workers: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    seed: int
    checkpoint_every_s: float
    """Seconds between checkpoints; 0 makes one after each step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""


def deepspeed_config(*, zero_stage: int, max_gradient_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's settings. We make batches and accumulate gradients, so DeepSpeed sees one batch per step.

    `zero_stage` and `max_gradient_norm` are as in `Optimization`.

    Communication overlaps with computation: the sum of gradients with the backward pass, and at stage 3 also the
    fetching of weights. Buckets are small, since DeepSpeed's default puts all gradients of an adapter into one bucket,
    which is sent at the end and takes a buffer of 2 GB.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": zero_stage > 0,
            "reduce_bucket_size": gradients.BUCKET_BYTES // 4,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def prepare_deepspeed() -> None:
    """Silence DeepSpeed's log, and keep it from compiling a C++ extension, which takes minutes on a CPU.

    It changes this process only, and may be called again.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def linear_schedule(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step (from 0) as a share of the peak: linear warmup, then linear decay.

    Neither end is 0: the first step of a warmup has 1 / warmup_steps, the last step of the run
    1 / (num_steps - warmup_steps).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


def seed_dropout(seed: int, *, step: int, worker_rank: int, part: int) -> None:
    """Seed torch for one micro-batch, so that running it again gives the same dropout.

    Args:
        seed: seed of the whole run.
        step: optimizer steps before this one.
        worker_rank: rank of the worker that runs the micro-batch.
        part: index of the micro-batch in the worker's part of the step.
    """
    torch.manual_seed(derive_seed(seed, "dropout", step, worker_rank, part))


@dataclass(frozen=True)
class StepOutcome:
    """The loss and the gradient norm of one step. `loss` is the mean over all workers' units that count in the loss."""

    loss: float
    gradient_norm: float
    """Norm of the gradient over all trained parameters, before clipping."""


class DeepSpeedEngine:
    """A model under DeepSpeed with AdamW on its trainable parameters.

    Args:
        model: a model on the worker's device; parameters without gradients are not trained.
        optimization: learning rate, ZeRO stage and the like.
    """

    def __init__(self, model: nn.Module, optimization: Optimization) -> None:
        import deepspeed

        prepare_deepspeed()
        self._max_gradient_norm = optimization.max_gradient_norm or float("inf")
        self._learning_rate = optimization.learning_rate
        self._zero_stage = optimization.zero_stage
        self._seed = optimization.seed
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        optimizer = torch.optim.AdamW(
            list(self.trained.values()),
            lr=optimization.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=optimization.weight_decay,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(
                zero_stage=optimization.zero_stage,
                max_gradient_norm=optimization.max_gradient_norm if optimization.zero_stage else 0.0,
            ),
            dist_init_required=False,
        )
        self._buckets = None
        if optimization.zero_stage == 0:
            self._engine.enable_backward_allreduce = False
            self._buckets = gradients.GradientBuckets(list(self.trained.values()))
        self.model = model
        self.device = torch.device(self._engine.device)
        self.num_workers = torch.distributed.get_world_size()
        self.worker_rank = torch.distributed.get_rank()

    def step(
        self, parts: Sequence[tuple[T, float]], *, loss_of: Callable[[T], Tensor], rate: float, step: int
    ) -> StepOutcome:
        """Take one optimizer step: all micro-batches, clipping, AdamW, DoRA's norms. Collective: all workers call it.

        Args:
            parts: this worker's micro-batches with their weights (0 for one that only fills up); every worker has the
                same number.
            loss_of: a function from a micro-batch to its share of the loss; all shares add up to the mean loss.
            rate: learning rate as a share of the peak.
            step: optimizer steps before this one; it seeds dropout.

        Raises:
            TrainingDivergedError: the loss or the gradient is NaN or infinite. The weights may hold NaN then; load a
                checkpoint.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._learning_rate
        total = torch.zeros((), device=self.device)
        if self._buckets is not None:
            self._buckets.clear()
        for index, (part, weight) in enumerate(parts):
            self._engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            seed_dropout(self._seed, step=step, worker_rank=self.worker_rank, part=index)
            loss = loss_of(part) * weight
            total += loss.detach()
            self._backward(loss, is_last=index == len(parts) - 1)
        torch.distributed.all_reduce(total)
        # At stage 0 DeepSpeed would clip but not return the norm, so we clip. `tolist` is the only wait for the device.
        norms = [self._clipped_norm()] if self._zero_stage == 0 else []
        loss, *told = torch.stack([total, *norms]).tolist()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss became {loss}")
        if all(map(math.isfinite, told)):
            self._engine.step()
        norm = told[0] if told else float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the gradient's norm became {norm}")
        dora.refresh(self.model)
        return StepOutcome(loss=loss, gradient_norm=norm)

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        if self._buckets is None:
            # DeepSpeed's forward would call this, but our loss does not use it. Without the call, stage 3 forgets all
            # passes of a step except the last.
            self._optimizer.clear_backward_seen_flag()
            self._engine.backward(loss * self.num_workers)
            return
        with self._buckets.summed() if is_last else contextlib.nullcontext():
            self._engine.backward(loss)

    def _clipped_norm(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.trained.values(), self._max_gradient_norm)

    def agree(self, answer: bool) -> bool:
        """Return worker 0's answer on every worker if ZeRO partitions (then collective), else this worker's own."""
        if not self.is_partitioned:
            return answer
        told = torch.tensor(int(answer), device=self.device)
        torch.distributed.broadcast(told, src=0)
        return bool(told)

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO partitions the state over workers, so that all of them must call `state`."""
        return self._zero_stage > 0

    def state(self) -> dict[str, Tensor]:
        """Copy trained tensors and Adam's moments to the CPU, as whole tensors. Collective if ZeRO partitions them.

        Keys are the parameters' names, and NAME@exp_avg and NAME@exp_avg_sq; moments before the first step are zeros.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, tensor in self.trained.items():
            with gathered([tensor]):
                state[name] = tensor.detach().cpu().clone()
            for moment in _MOMENTS:
                if self._zero_stage == 0:
                    value = self._optimizer.state.get(tensor, {}).get(moment)
                else:
                    value = safe_get_full_optimizer_state(tensor, moment)
                state[f"{name}@{moment}"] = (
                    torch.zeros_like(state[name])
                    if value is None
                    else value.detach().cpu().clone().view_as(state[name])
                )
        return state

    def load_state(self, state: dict[str, Tensor], *, step: int) -> None:
        """Load a state that `state` returned after `step` steps, for any number of workers. Collective under ZeRO."""
        if self._zero_stage:
            self._allocate_moments(step)
        for name, tensor in self.trained.items():
            moments = {moment: state[f"{name}@{moment}"].to(self.device) for moment in _MOMENTS}
            self._set(tensor, state[name].to(self.device), moments, step)
        dora.refresh(self.model)

    @torch.no_grad()
    def _set(self, tensor: Tensor, value: Tensor, moments: dict[str, Tensor], step: int) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._zero_stage == 3:
            with gathered([tensor], changed_by_rank=0):
                tensor.copy_(value)
            safe_set_local_fp32_param(tensor, self._partition(value))
            for moment, each in moments.items():
                safe_set_local_optimizer_state(tensor, self._partition(each), moment)
            return
        tensor.copy_(value)
        if self._zero_stage == 0:
            self._optimizer.state[tensor] = {"step": torch.tensor(float(step), device=tensor.device), **moments}
            return
        safe_set_full_fp32_param(tensor, value)
        for moment, each in moments.items():
            safe_set_full_optimizer_state(tensor, each, moment)

    def _partition(self, whole: Tensor) -> Tensor:
        """Return this worker's part of a tensor under ZeRO-3: one of equal pieces of the flattened, padded tensor."""
        size = -(-whole.numel() // self.num_workers)
        padded = nn.functional.pad(whole.flatten(), (0, size * self.num_workers - whole.numel()))
        return padded[self.worker_rank * size : (self.worker_rank + 1) * size]

    def _allocate_moments(self, step: int) -> None:
        """Allocate DeepSpeed's partitioned moments now instead of in the first step, so that they can be set."""
        optimizer = self._optimizer
        is_whole = self._zero_stage < 3
        partitions = optimizer.single_partition_of_fp32_groups if is_whole else optimizer.fp32_partitioned_groups_flat
        for partition in partitions:
            moments = {moment: torch.zeros_like(partition) for moment in _MOMENTS}
            optimizer.optimizer.state[partition] = {
                "step": torch.tensor(float(step), device=partition.device),
                **moments,
            }
        if is_whole:
            optimizer._lazy_init_hp_params_optimizer_state()
