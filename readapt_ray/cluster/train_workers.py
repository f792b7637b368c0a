"""Running a function on Ray Train workers, and what train and finetune do on them alike.

State lives in our own checkpoints under the artifact (see training/checkpoints.py), not in Ray Train's, so
what counts as done is what was really committed. Ray Train starts the workers, forms their process
group, and starts them again after a failure, with fewer where nodes were lost and the options allow it.
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
    """What a run on workers tells the stage."""

    num_workers: int
    dtype: str
    """What was computed in."""
    rows: list[dict[str, Any]]
    """Step metrics, each step once."""

    def details(self) -> dict[str, Any]:
        """Return the details for the manifest."""
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
        stage: names Ray's metrics.
        work: runs on every worker inside a process group; a `TrainWorker` finds in its job what the driver adds to it.
        job: plain values.
        workspace: progress goes there, step metrics into its `metrics.jsonl`.
        config: how many workers, and how often they are started again after one of them died.
        stream: the workers' data, where it comes through Ray Data.

    Raises:
        ReadaptError: the workers' own, with its message; or one that says how they died.
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
            step_metrics.followed(monitor, workspace, config.trackers),
            placement.said_when_too_small(least, resources, who="workers"),
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
        # A resize starts all workers again from the last checkpoint, so each start needs time to write one.
        "elastic_resize_monitor_interval_s": 2 * checkpoint_every_s,
    }


def _start_monitor(stage: str) -> Any:
    """Start the monitor on the driver's node: on a node that may die it would take the run with it.

    If it crashes it restarts empty. It holds only progress, and an error that would come again.
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
    """Return Ray's trainer of this work. Its controller, once it runs, is the only one in `controllers`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from readapt_ray.cluster.process_group import ProcessGroupConfig

    storage = str(output.local_path) if output.is_local else output.uri
    controllers.clear()
    made = TorchTrainer(
        _entered,
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
    # Ctrl-C stays Python's: Ray Train's handler ends the process with code 1, and stays in place after the run.
    made._register_sigint_handler = controllers.append
    return made


def _dtype(config: OptimizationConfig, output: Location, *, on_gpus: bool) -> str:
    """Return what all workers compute in, at every start: as asked, else what the output was begun with, else what
    suits them.
    """
    if config.dtype != "auto":
        return config.dtype
    begun = output / _DTYPE_NAME
    if begun.is_file():
        return begun.read_text()
    return "bfloat16" if on_gpus or connection.all_have_bfloat16_units() else "float32"


def _fit(trainer: Callable[[], Any], monitor: Any, max_failures: int) -> None:
    """Train; start lost workers again, until they die more than `max_failures` times without a checkpoint in between.

    Ray Train would count all failures of a run, and a run on spot instances lasts through many.
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
    """Release what workers hold that were lost between the forming of the process group and the first line of the work.

    Ray Train (2.60) keeps their placement group until the driver ends.

    Raises:
        ControllerError: the controller failed for another reason.
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


def _entered(config: dict[str, Any]) -> None:
    """Set as many threads as the worker has CPUs, then do the work.

    An error of ours would come again at every new start: it is left on the monitor, and a worker that finds
    one there ends at once.
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
    """Return the layers that get an adapter: the ones asked for, or the family's; none where all is
    trained.
    """
    if config.target_modules or config.method == "full":
        return config.target_modules
    return retrievers.target_modules(str(model.config.get("model_type")))


class TrainWorker:
    """One worker's model, from the check of its memory to the files of the result.

    Args:
        job: holds `output` and what `run_workers` adds.
        config: the stage's.
        name: MODEL that is trained.
        objective: loads the model with its head; None headless.
        micro_batch_tokens: of one pass, for the estimate of memory.

    Raises:
        FingerprintMismatchError: there are other weights on this node.
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
        due = job["inputs"].values()
        on_worker.check_same_model(name, lambda: self.source.fingerprint, due, driver_node=job["driver_node"])
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
        trained_models.spend_less(
            self.model,
            gradient_checkpointing=config.gradient_checkpointing,
            compile_layers=compiles(config, self.device.type),
            zero_stage=config.zero_stage,
        )

    def _check_memory(self, micro_batch_tokens: int) -> None:
        """Refuse what does not fit. What an earlier start in this folder measured corrects the estimate."""
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
        measured = step_metrics.kept_peak_bytes(self.output, after_step=before.get("step", 0))
        correction = before["correction"]
        if measured and "parts" in before:
            correction = memory.MemoryEstimate(before["parts"], {}).corrected(measured)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            step = step_metrics.kept_steps(self.output)
            file.write_text(json.dumps({"parts": plain.parts, "correction": correction, "step": step}) + "\n")
        free = memory.free_bytes(self.device, ray.train.get_context().get_local_world_size())
        memory.check_fits(self._model_shape, setup, free_bytes=free, correction=correction)

    def run(self, objective: Any, *, mean_attended: float, doc_ids_of: Callable[[Sequence[int]], list[str]]) -> None:
        """Take all steps."""
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
            flops_per_token=flops_per_token(self._model_shape, self.shape, mean_attended=mean_attended),
            doc_ids_of=doc_ids_of,
        )

    def save(self, *, trained_on: str, task_type: str) -> None:
        """Write the adapter, or all weights; all workers call it, the first one writes."""
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
