"""Run a function on Ray Train workers, and the part of train and finetune that is the same on each worker.

Checkpoints are our own files in the artifact (`training/checkpoints.py`), not Ray Train's: a step counts as done only
when its checkpoint is committed. Ray Train starts the workers, forms their process group, and restarts them after a
failure, with fewer workers if nodes were lost and `min_workers` allows it.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from readapt_ray import artifact_files
from readapt_ray.artifacts import Workspace, read_lease
from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster import autoscaling, connection, on_worker, placement, run_monitor, step_metrics
from readapt_ray.cluster.optimization import OptimizationConfig, adapter_shape, compiles, optimization, worker_setup
from readapt_ray.errors import PlacementError, ReadaptError
from readapt_ray.quick_imports import import_for_models
from readapt_ray.seeds import derive_seed
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.cluster.block_stream import BlockStream

logger = logging.getLogger("readapt_ray")

_ABORT_TIMEOUT_S = 20.0
_MEMORY_NAME = "memory.json"
_DTYPE_NAME = "dtype"


@dataclass(frozen=True)
class Outcome:
    """The result of a run on workers."""

    num_workers: int
    dtype: str
    """Data type that the workers computed in."""
    rows: list[dict[str, Any]]
    """Metrics of the steps, in order, each step once."""

    def details(self) -> dict[str, Any]:
        """Return num_workers, dtype, first_loss, last_loss (mean of the last 5% of the steps), peak_memory_bytes."""
        rows = self.rows
        tail = rows[-max(1, len(rows) // 20) :]
        return {
            "num_workers": self.num_workers,
            "dtype": self.dtype,
            "first_loss": rows[0]["loss"] if rows else None,
            "last_loss": sum(row["loss"] for row in tail) / len(tail) if tail else None,
            "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=None),
        }


def run_workers(
    stage: str,
    work: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    workspace: Workspace,
    config: OptimizationConfig,
    *,
    stream: "BlockStream | None" = None,
) -> Outcome:
    """Run `work(job)` on Ray Train workers until all of them end.

    Args:
        stage: name of the stage, for Ray's metrics.
        work: function that runs on every worker, inside a process group.
        job: plain values for `work`; the driver adds what a `TrainWorker` needs.
        workspace: receives the progress; step metrics go into its `metrics.jsonl`.
        config: number of workers, and how often they are restarted after one of them died.
        stream: training data through Ray Data; None if the workers read their data themselves.

    Raises:
        ReadaptError: what the workers raised; a WorkerError if they died; a PlacementError before they start.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    num_workers, resources, use_gpu = placement.place_training(config.num_workers, config.num_cpus_per_worker)
    connection.check_seen_by_all(on_worker.absolute(workspace.location))
    least = config.min_workers or num_workers
    if least > num_workers:
        raise PlacementError(f"min_workers = {least} is more than num_workers = {num_workers}; lower it")
    monitor = _start_monitor(stage)
    dtype = _dtype(config, workspace.location, on_gpus=use_gpu)
    inputs = (read_lease(workspace.location) or {}).get("inputs", {})
    job = {**job, "monitor": monitor, "dtype": dtype, "inputs": inputs, "driver_node": on_worker.this_node()}
    controllers: list[Any] = []
    scaling = _scaling(least, num_workers, resources, config.checkpoint_every_s)
    new_trainer = functools.partial(
        _new_trainer, {"work": work, "job": job}, workspace.location, scaling, controllers, stream=stream
    )
    try:
        with (
            autoscaling.requested(num_workers, resources, least=least, patience_s=autoscaling.PATIENCE_S),
            step_metrics.showing_metrics(monitor, workspace, config.trackers),
            placement.warn_while_too_small(least, resources, who="workers"),
        ):
            _fit(new_trainer, monitor, config.max_failures)
        if (ended := ray.get(monitor.error.remote())) is not None:
            raise ended
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise connection.cause_of(error) from None
    except KeyboardInterrupt:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([each.abort.remote() for each in controllers], timeout=_ABORT_TIMEOUT_S)
        raise
    finally:
        ray.kill(monitor)
    artifact_files.clear(workspace.location, artifact_files.RAY_TRAIN)
    return Outcome(num_workers, dtype, step_metrics.join(workspace.location))


def _scaling(least: int, num_workers: int, resources: dict[str, float], checkpoint_every_s: float) -> dict[str, Any]:
    """Return the options of Ray Train's ScalingConfig."""
    return {
        "num_workers": (least, num_workers) if least < num_workers else num_workers,
        "resources_per_worker": resources,
        "use_gpu": "GPU" in resources,
        # A resize restarts all workers from the last checkpoint. Leave each start enough time to write one.
        "elastic_resize_monitor_interval_s": 2 * checkpoint_every_s,
    }


def _start_monitor(stage: str) -> Any:
    """Start the monitor on the driver's node, so that the loss of another node does not end the run.

    If it crashes it restarts empty: it holds only progress, and an error that the workers would raise again.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**options)(run_monitor.RunMonitor).remote(stage)


def _new_trainer(
    loop: dict[str, Any],
    output: Location,
    scaling: dict[str, Any],
    controllers: list[Any],
    *,
    stream: "BlockStream | None",
) -> Any:
    """Return Ray's trainer for this work. Once it runs, `controllers` holds its controller and no other."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from readapt_ray.cluster.process_group import ProcessGroupConfig

    storage = str(output.local_path) if output.is_local else output.uri
    controllers.clear()
    made = TorchTrainer(
        _run_worker,
        train_loop_config=loop,
        datasets={} if stream is None else {stream.name: stream.no_dataset},
        dataset_config=stream,
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name="workers",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0),  # `_fit` counts
        ),
        torch_config=ProcessGroupConfig(
            backend="nccl" if scaling["use_gpu"] else "gloo", monitor=loop["job"]["monitor"]
        ),
    )
    # Keep Python's handler of Ctrl-C. Ray Train's ends the process with code 1, and is not removed after the run.
    made._register_sigint_handler = controllers.append
    return made


def _dtype(config: OptimizationConfig, output: Location, *, on_gpus: bool) -> str:
    """Return the workers' data type; auto is the type of an earlier start, else the one that suits the hardware."""
    if config.dtype != "auto":
        return config.dtype
    begun = output / _DTYPE_NAME
    if begun.is_file():
        return begun.read_text()
    return "bfloat16" if on_gpus or connection.all_have_bfloat16_units() else "float32"


def _fit(trainer: Callable[[], Any], monitor: Any, max_failures: int) -> None:
    """Train; restart lost workers, until they die more than `max_failures` times without a new checkpoint in between.

    Ray Train would count all failures of a run, but a run on spot instances has many.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    num_failures, step = 0, 0
    while True:
        try:
            trainer().fit()
            return
        except TrainingFailedError as error:
            if ray.get(monitor.error.remote()) is not None:
                return
            _release_failed_start(error, monitor)
            before, step = step, ray.get(monitor.kept_step.remote())
            num_failures = 1 if step > before else num_failures + 1
            if 0 <= max_failures < num_failures:
                raise
            reason = connection.reason_of(error)
            logger.warning("workers are started again from the checkpoint of step %d, for one failed: %s", step, reason)


def _release_failed_start(error: Exception, monitor: Any) -> None:
    """Release the resources of workers that were lost while they started.

    If a worker dies after the process group was formed and before `work` began, Ray Train (2.60) keeps the placement
    group until the driver ends. If the controller failed for another reason, raise its error.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import ControllerError
    from ray.util import remove_placement_group

    from readapt_ray.cluster.process_group import StartError

    if not isinstance(error, ControllerError):
        return
    if not isinstance(error.controller_failure, (RayActorError, StartError)):
        raise error
    if (held := ray.get(monitor.held.remote())) is not None:
        remove_placement_group(held)


def _run_worker(config: dict[str, Any]) -> None:
    """Use as many threads as the worker has CPUs, then run the work.

    A ReadaptError would return at every restart. So the monitor keeps it, and a worker that finds it ends at once.
    """
    import ray

    import_for_models(freeze=True)
    import torch

    monitor = config["job"]["monitor"]
    if ray.get(monitor.error.remote()) is not None:
        return
    logger.addHandler(run_monitor.WarningPoster(monitor))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    try:
        on_worker.check_node()
        config["work"](config["job"])
    except ReadaptError as error:
        ray.get(monitor.fail.remote(error))
        raise


def target_modules(config: OptimizationConfig, model: OpenModel) -> tuple[str, ...]:
    """Return the names of the layers that get an adapter: the option's, else the family's; empty with `method` full."""
    if config.target_modules or config.method == "full":
        return config.target_modules
    return retrievers.target_modules(str(model.config.get("model_type")))


class TrainWorker:
    """The model of one training worker: checks the memory, loads, trains and saves.

    Args:
        job: has `output`, and what `run_workers` adds.
        config: options of the stage.
        name: MODEL that is trained.
        objective: decides which head the model is loaded with; None loads it without a head.
        micro_batch_tokens: tokens of one forward pass, for the estimate of memory.

    Raises:
        FingerprintMismatchError, PlacementError: this node has other weights than the driver's; memory is too small.
    """

    def __init__(
        self,
        job: dict[str, Any],
        config: OptimizationConfig,
        name: str,
        *,
        objective: Objective | None,
        micro_batch_tokens: int,
    ) -> None:
        import torch

        from readapt_ray.training import trainable as trained_models

        self._config = config
        self._monitor = job["monitor"]
        self.output = Location(job["output"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype_name = job["dtype"]
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self._dtype_name]
        self.source = models.open_model(name)
        expected = job["inputs"].values()
        on_worker.check_same_model(name, lambda: self.source.fingerprint, expected, driver_node=job["driver_node"])
        self.shape = adapter_shape(config, target_modules(config, self.source))
        self._model_shape = shape_of(self.source.config, name, objective)
        if config.check_memory:
            self._check_memory(micro_batch_tokens)
        self.model = trained_models.load_for_training(
            self.source,
            objective=objective,
            dtype=torch.float32 if self.shape is None else self.dtype,
            device=self.device,
            zero_stage=config.zero_stage,
            base_dtype=config.base_dtype,
        )
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        trained_models.make_trainable(self.model, self.shape)
        trained_models.reduce_memory(
            self.model,
            gradient_checkpointing=config.gradient_checkpointing,
            compile_layers=compiles(config, self.device.type),
            zero_stage=config.zero_stage,
        )

    def _check_memory(self, micro_batch_tokens: int) -> None:
        """Refuse a model that does not fit in memory. A peak measured by an earlier start corrects the estimate."""
        import ray.train
        import torch

        from readapt_ray.training import memory

        setup = worker_setup(
            self._config,
            self.shape,
            num_workers=torch.distributed.get_world_size(),
            micro_batch_tokens=micro_batch_tokens,
            dtype=self.dtype,
            device_type=self.device.type,
        )
        plain = memory.estimate_memory(self._model_shape, setup)
        file = self.output / _MEMORY_NAME
        before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"correction": 1.0}
        measured = step_metrics.written_peak_bytes(self.output, after_step=before.get("step", 0))
        correction = before["correction"]
        if measured and "parts" in before:
            correction = memory.MemoryEstimate(before["parts"], {}).corrected(measured)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            step = step_metrics.last_written_step(self.output)
            file.write_text(json.dumps({"parts": plain.parts, "correction": correction, "step": step}) + "\n")
        free = memory.free_bytes(self.device, ray.train.get_context().get_local_world_size())
        memory.check_fits(self._model_shape, setup, free_bytes=free, correction=correction)

    def run(self, objective: Any, *, mean_tokens: float, doc_ids_of: Callable[[Sequence[int]], list[str]]) -> None:
        """Train from the last checkpoint (if any) to the last step. All workers must call it.

        `mean_tokens`: tokens of a text on average, for FLOPs. `doc_ids_of`: doc_ids of numbered passages.
        """
        import torch

        from readapt_ray.training.engine import DeepSpeedEngine
        from readapt_ray.training.speed import flops_per_token
        from readapt_ray.training.steps import run_steps

        if torch.distributed.get_rank() == 0:
            (self.output / _DTYPE_NAME).write_text(self._dtype_name)
        descent = optimization(self._config)
        run_steps(
            DeepSpeedEngine(self.model, descent),
            objective,
            descent,
            checkpoints=self.output / "checkpoints",
            reporter=step_metrics.StepPoster(self._monitor, self.output),
            flops_per_token=flops_per_token(self._model_shape, self.shape, mean_tokens=mean_tokens),
            doc_ids_of=doc_ids_of,
        )

    def save(self, *, trained_on: str, task_type: str) -> None:
        """Write the adapter, or all weights if there is none, to the output folder. All workers must call it.

        The adapter's config names the model, `trained_on`, and PEFT's task type: `CAUSAL_LM` or `FEATURE_EXTRACTION`.
        """
        import torch

        from readapt_ray.training import dora
        from readapt_ray.training import trainable as trained_models

        if self.shape is None:
            trained_models.save_model(self.model, Location(str(self.source.folder)), self.output)
            return
        state = dora.adapter_state(self.model)
        if torch.distributed.get_rank() == 0:
            base = models.base_name(trained_on)
            dora.save_adapter(self.output, state, self.shape, base=base, task_type=task_type)
