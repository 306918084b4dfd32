"""RayExecutor: one actor a slot, reused while it is healthy, replaced after whatever may have poisoned it.

Only JSON of a few kilobytes passes through Ray. Its hidden retries are off: what is tried again is
the loop's decision.
"""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, LocalRayletDiedError, OutOfMemoryError, RayError

from archsearch.architecture import Architecture
from archsearch.config import ExecutionConfig
from archsearch.errors import EnvironmentUnfit
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.search.executors import Finished, evaluate_once, failed
from archsearch.search.ray_cluster import Cluster, connect_ray, disconnect_ray
from archsearch.stopping import StoppingRule

START_SECONDS = 180.0
LOST_SECONDS = 20.0
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Worker:
    """Lives in its own process. Holds the evaluator, so that imports and set-up are paid once."""

    def __init__(self, evaluator: bytes, variables: dict[str, str]) -> None:
        # Before the evaluator is unpickled, because what that imports may read them.
        os.environ.update(variables)
        self._evaluator: Evaluator = ray.cloudpickle.loads(evaluator)

    def hello(self) -> tuple[str, int]:
        """Node and process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def evaluate(self, architecture: str, seed: int, stopping: str | None) -> str:
        """Evaluate one architecture; JSON in, JSON out."""
        rule = None if stopping is None else StoppingRule.model_validate_json(stopping)
        found = evaluate_once(self._evaluator, Architecture.model_validate_json(architecture), seed, rule)
        return found.model_dump_json()


@dataclass(slots=True)
class Job:
    """One evaluation in flight. ``begun`` is None until its worker is up."""

    key: int
    architecture: Architecture
    seed: int
    stopping: StoppingRule | None
    result: Any
    submitted: float
    begun: float | None = None


@dataclass(slots=True)
class Slot:
    """A place for one worker; the actor is made when it is first needed."""

    actor: Any = None
    hello: Any = None
    node: str = ""
    pid: int = 0
    job: Job | None = None
    failures: int = 0
    failed_starts: int = 0

    @property
    def awaited(self) -> Any:
        """The next thing to come from this slot: its worker's first word, or its job's result."""
        assert self.job is not None
        return self.hello if self.job.begun is None else self.job.result


class RayExecutor:
    """Evaluates in Ray actors, each on a GPU or a core of its own.

    A worker is replaced after an outcome that may have poisoned it, after a crash, at the deadline,
    and after ``config.worker_failures`` failures in a row.

    Args:
        config: workers, device, address and limits.
        evaluator: pickled to each worker once. On a cluster, every node must have its packages.

    Raises:
        EnvironmentUnfit: from here and from ``wait``: no such cluster, fewer GPUs than workers, or
            workers that do not start.
    """

    # Ray turns an exception that is raised inside it into one of its own.
    interruptible = False

    def __init__(self, config: ExecutionConfig, evaluator: Evaluator) -> None:
        self._config = config
        self._cluster = connect_ray(config)
        try:
            count, on_gpu = plan_slots(config, self._cluster)
        except EnvironmentUnfit:
            disconnect_ray(self._cluster)
            raise
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        self._make = ray.remote(Worker).options(**options, num_gpus=int(on_gpu)).remote
        self._arguments = (_pickled(evaluator), {} if on_gpu else CPU_ONLY)
        self._slots = [Slot() for _ in range(count)]

    @property
    def capacity(self) -> int:
        """Number of workers."""
        return len(self._slots)

    def submit(self, key: int, architecture: Architecture, seed: int, stopping: StoppingRule | None = None) -> None:
        """Give it to a free worker."""
        slot = next(slot for slot in self._slots if slot.job is None)
        slot.job = Job(key, architecture, seed, stopping, None, time.monotonic())
        self._start(slot, slot.job)

    def wait(self, timeout: float | None = None) -> Finished:
        """What has ended; workers past their deadline are killed on the way."""
        limit = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            finished = self._collect(limit)
            finished += self._expire()
            if finished or time.monotonic() >= limit or not self._busy:
                return finished

    def close(self) -> None:
        """Kill the workers and leave Ray."""
        for slot in self._slots:
            self._discard(slot)
        disconnect_ray(self._cluster)

    @property
    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.job is not None]

    def _start(self, slot: Slot, job: Job) -> None:
        if slot.actor is None:
            slot.actor = self._make(*self._arguments)
            slot.hello = slot.actor.hello.remote()
            slot.node, slot.pid, slot.failures = "", 0, 0
        job.submitted = time.monotonic()
        job.begun = job.submitted if slot.pid else None
        rule = None if job.stopping is None else job.stopping.model_dump_json()
        job.result = slot.actor.evaluate.remote(job.architecture.model_dump_json(), job.seed, rule)

    # Results

    def _collect(self, limit: float) -> Finished:
        waiting = {slot.awaited: slot for slot in self._busy}
        if not waiting:
            return []
        seconds = max(min(limit, *(self._deadline(slot) for slot in self._busy)) - time.monotonic(), 0.0)
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [found for ref in ready if (found := self._advance(waiting[ref])) is not None]

    def _deadline(self, slot: Slot) -> float:
        """When the slot's patience ends, on the monotonic clock."""
        assert slot.job is not None
        if slot.job.begun is None:
            return slot.job.submitted + START_SECONDS
        return slot.job.begun + self._config.deadline

    def _advance(self, slot: Slot) -> tuple[int, Evaluation] | None:
        """Take what a slot has ready: its worker is up, or its job has ended."""
        job = slot.job
        assert job is not None
        if job.begun is None:
            self._greet(slot, job)
            return None
        try:
            evaluation = Evaluation.model_validate_json(ray.get(job.result))
        except RayError as error:
            evaluation = self._lost(slot, job, error)
        return self._finish(slot, job, evaluation)

    def _greet(self, slot: Slot, job: Job) -> None:
        try:
            slot.node, slot.pid = ray.get(slot.hello)
            job.begun = time.monotonic()
        except RayError as error:
            slot.failed_starts += 1
            if slot.failed_starts >= self._config.worker_failures or isinstance(error, LocalRayletDiedError):
                raise EnvironmentUnfit(f"a worker cannot start: {_line(error)}", "see `archsearch doctor`") from error
            self._discard(slot)
            self._start(slot, job)

    def _lost(self, slot: Slot, job: Job, error: RayError) -> Evaluation:
        """What the loss of a worker says about its candidate."""
        if isinstance(error, LocalRayletDiedError):
            raise EnvironmentUnfit(f"Ray died on this machine: {_line(error)}", "then `archsearch resume`") from error
        if isinstance(error, OutOfMemoryError):
            outcome = Outcome.OOM
        elif isinstance(error, ActorUnavailableError):
            outcome = Outcome.CRASH if _has_died(slot) else Outcome.NODE_LOST
        else:
            outcome = Outcome.NODE_LOST if _is_dead(slot.node) else Outcome.CRASH
        return failed(job.architecture, outcome, str(error).strip(), seed=job.seed, seconds=_since(job))

    def _expire(self) -> Finished:
        """End what is past its deadline."""
        late = [slot for slot in self._busy if time.monotonic() >= self._deadline(slot)]
        return [self._time_out(slot, slot.job) for slot in late if slot.job is not None]

    def _time_out(self, slot: Slot, job: Job) -> tuple[int, Evaluation]:
        if job.begun is None:
            raise EnvironmentUnfit(f"no worker started within {START_SECONDS:g} s", "see `archsearch doctor`")
        error = f"no result within the deadline of {self._config.deadline:g} s"
        evaluation = failed(job.architecture, Outcome.TIMEOUT, error, seed=job.seed, seconds=_since(job))
        return self._finish(slot, job, evaluation)

    def _finish(self, slot: Slot, job: Job, evaluation: Evaluation) -> tuple[int, Evaluation]:
        slot.job, slot.failed_starts = None, 0
        slot.failures = slot.failures + 1 if evaluation.outcome.is_failure else 0
        if evaluation.outcome.poisons_worker or slot.failures >= self._config.worker_failures:
            self._discard(slot)
        return job.key, evaluation

    def _discard(self, slot: Slot) -> None:
        """End a worker, whatever it is stuck in; the next job gets a new one."""
        if slot.actor is None:
            return
        ray.kill(slot.actor, no_restart=True)
        if slot.pid and slot.node == self._cluster.node:
            # Ray asks the process to end; this does not ask.
            with suppress(ProcessLookupError):
                os.kill(slot.pid, signal.SIGKILL)
        slot.actor, slot.hello, slot.node, slot.pid, slot.failures = None, None, "", 0, 0


def plan_slots(config: ExecutionConfig, cluster: Cluster) -> tuple[int, bool]:
    """Number of workers, and whether each takes a GPU. Raises EnvironmentUnfit where they do not fit."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and cluster.gpus > 0)
    there, what = (cluster.gpus, "GPUs") if on_gpu else (cluster.cpus, "CPU slots")
    wanted = there if config.workers == "auto" else config.workers
    if there < max(wanted, 1):
        raise EnvironmentUnfit(
            f"{max(wanted, 1)} workers need as many {what}, Ray has {there}",
            "lower execution.workers, or choose another execution.device",
        )
    return wanted, on_gpu


def _has_died(slot: Slot) -> bool:
    """Whether a worker that cannot be reached has crashed, on a node that lives on."""
    try:
        ray.get(slot.actor.hello.remote(), timeout=LOST_SECONDS)
    except (ActorUnavailableError, GetTimeoutError):
        return False
    except RayError:
        return not _is_dead(slot.node)
    return False


def _is_dead(node: str) -> bool:
    nodes: list[dict[str, Any]] = ray.nodes()
    return any(found["NodeID"] == node and not found["Alive"] for found in nodes)


def _pickled(evaluator: Evaluator) -> bytes:
    return bytes(ray.cloudpickle.dumps(evaluator))


def _since(job: Job) -> float:
    return time.monotonic() - (job.begun or job.submitted)


def _line(error: BaseException) -> str:
    """The last line of a message, which is where Ray puts a worker's own exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
