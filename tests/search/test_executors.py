"""Executors: the kit for both, then what only processes can promise."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture
from archsearch.config import ExecutionConfig
from archsearch.errors import EnvironmentUnfit
from archsearch.evaluation import Evaluator, Outcome
from archsearch.search import ray_cluster
from archsearch.search.executors import Executor, InlineExecutor
from archsearch.search.ray_cluster import Cluster, connect_ray, disconnect_ray, prepare_environment
from tests.kits.evaluator_kit import EvaluatorKit
from tests.kits.executor_kit import EVERY_DIGIT, ExecutorKit, Start, architectures, run
from tests.search.fakes import FakeEvaluator, FaultyEvaluator, Tagged

prepare_environment()

import ray  # noqa: E402

from archsearch.search.ray_executor import RayExecutor, plan_slots  # noqa: E402


class TestInline(ExecutorKit):
    """In the caller's thread."""

    @pytest.fixture
    def start(self) -> Start:
        return InlineExecutor


class TestFakeEvaluator(EvaluatorKit):
    """The kit itself, on the simplest evaluator."""

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return FakeEvaluator()

    @pytest.fixture
    def architecture(self) -> Architecture:
        return architectures(1)[0]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Cluster]:
    cluster = connect_ray(ExecutionConfig(workers=4))
    yield cluster
    disconnect_ray(cluster)


@pytest.fixture
def start_ray(ray_session: Cluster) -> Iterator[Any]:
    started: list[RayExecutor] = []

    def start(evaluator: Evaluator, **config: Any) -> RayExecutor:
        executor = RayExecutor(ExecutionConfig.model_validate({"workers": 1, "device": "cpu", **config}), evaluator)
        started.append(executor)
        return executor

    yield start
    for executor in started:
        executor.close()


class TestRay(ExecutorKit):
    """In a process of its own."""

    @pytest.fixture
    def start(self, start_ray: Any) -> Start:
        return start_ray


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def dies(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends soon."""
    limit = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not alive(pid)


def test_a_healthy_worker_is_used_again_without_gpus_and_with_one_thread(start_ray: Any) -> None:
    devices = {result.device for result in run(start_ray(Tagged(FakeEvaluator())), architectures(4)).values()}
    assert len(devices) == 1
    pid, cuda, threads = devices.pop().split("/")
    assert int(pid) != os.getpid()
    assert (cuda, threads) == ("", "1")


@pytest.mark.parametrize(("fault", "workers"), [("oom", 3), ("nan", 1)])
def test_a_worker_is_replaced_after_what_may_have_poisoned_it(start_ray: Any, fault: str, workers: int) -> None:
    executor = start_ray(Tagged(FaultyEvaluator(fault, digits=EVERY_DIGIT)), worker_failures=5)
    assert len({result.device for result in run(executor, architectures(3)).values()}) == workers


def test_a_worker_is_replaced_after_failures_in_a_row(start_ray: Any) -> None:
    executor = start_ray(Tagged(FaultyEvaluator("nan", digits=EVERY_DIGIT)), worker_failures=2)
    pids = [result.device for _, result in sorted(run(executor, architectures(4)).items())]
    assert pids[0] == pids[1] != pids[2] == pids[3]


@pytest.mark.parametrize("fault", ["exit", "segfault"])
def test_a_process_that_dies_is_a_crash_run_once(start_ray: Any, tmp_path: Path, fault: str) -> None:
    bad, good = _pair()
    log = tmp_path / "log"
    results = run(start_ray(FaultyEvaluator(fault, digits=bad.id[0], log=str(log))), [bad, good])
    assert results[0].outcome is Outcome.CRASH
    assert results[1].ok
    assert log.read_text().split() == [bad.id, good.id]


def test_what_hangs_is_killed_at_the_deadline(start_ray: Any) -> None:
    bad, good = _pair()
    executor = start_ray(FaultyEvaluator("hang", digits=bad.id[0]), deadline=2)
    run(executor, [good])
    pid = executor._slots[0].pid
    assert alive(pid)
    results = run(executor, [bad, good])
    assert results[0].outcome is Outcome.TIMEOUT
    assert "2 s" in results[0].error
    assert results[1].ok
    assert dies(pid)


def test_close_leaves_no_worker(start_ray: Any) -> None:
    executor = start_ray(FaultyEvaluator("hang", digits=EVERY_DIGIT))
    executor.submit(0, architectures(1)[0], 0)
    while not executor._slots[0].pid:
        assert executor.wait(1.0) == []
    pid = executor._slots[0].pid
    executor.close()
    assert dies(pid)


def test_several_workers_work_at_once(start_ray: Any) -> None:
    executor: Executor = start_ray(Tagged(FakeEvaluator(seconds=0.3)), workers=3)
    assert executor.capacity == 3
    assert len({result.device for result in run(executor, architectures(9)).values()}) == 3


class Unloadable:
    """Cannot be unpickled on a worker."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("no such package on this node")


def test_a_worker_that_cannot_start_makes_the_environment_unfit(start_ray: Any) -> None:
    executor = start_ray(Unloadable(), worker_failures=2)
    executor.submit(0, architectures(1)[0], 0)
    with pytest.raises(EnvironmentUnfit, match="cannot start"):
        executor.wait(60.0)


@pytest.mark.parametrize(
    ("config", "cluster", "expected"),
    [
        ({}, Cluster("n", 8, 0, True), (8, False)),
        ({}, Cluster("n", 8, 2, True), (2, True)),
        ({"device": "cpu"}, Cluster("n", 8, 2, True), (8, False)),
        ({"workers": 2, "device": "cuda"}, Cluster("n", 8, 2, True), (2, True)),
    ],
)
def test_one_worker_a_gpu_or_one_a_core(config: Any, cluster: Cluster, expected: tuple[int, bool]) -> None:
    assert plan_slots(ExecutionConfig.model_validate(config), cluster) == expected


@pytest.mark.parametrize("config", [{"device": "cuda"}, {"device": "cuda", "workers": 1}, {"workers": 9}])
def test_more_workers_than_there_is_room_for_are_refused(config: Any) -> None:
    with pytest.raises(EnvironmentUnfit) as error:
        plan_slots(ExecutionConfig.model_validate(config), Cluster("n", 8, 0, True))
    assert error.value.exit_code == 4


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_refused(address: str) -> None:
    with pytest.raises(EnvironmentUnfit) as error:
        ray_cluster._attach(address, allow_insecure=False)
    assert address in error.value.cause
    assert error.value.exit_code == 4


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH", b""])
def test_a_listener_that_is_no_ray_is_refused_before_ray_is_asked(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_probe", lambda address: pytest.fail("Ray was asked"))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EnvironmentUnfit, match="no Ray cluster answers") as error:
            ray_cluster._attach(address, allow_insecure=False)
    assert address in error.value.cause


def test_a_ray_answers_as_one(ray_session: Cluster) -> None:
    ray_cluster._knock(ray.get_runtime_context().gcs_address)


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, int]]]:
    """A stand-in for a cluster's Jobs API; answers with the status that it is told."""
    answer = {"status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"] if self.path.startswith("/api/jobs") else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", answer
    server.shutdown()
    server.server_close()


def test_a_cluster_that_takes_jobs_without_a_token_is_refused(
    dashboard: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = dashboard
    attached: list[str] = []
    monkeypatch.setattr(ray_cluster, "_knock", lambda address: None)
    monkeypatch.setattr(ray_cluster, "_probe", lambda address: url)
    monkeypatch.setattr(ray_cluster, "_init", lambda address: attached.append(address))
    with pytest.raises(EnvironmentUnfit, match="from anyone") as error:
        ray_cluster._attach("head:6379", allow_insecure=False)
    assert "allow_insecure_ray" in error.value.remedy
    assert attached == []
    ray_cluster._attach("head:6379", allow_insecure=True)
    answer["status"] = 401
    ray_cluster._attach("head:6379", allow_insecure=False)
    assert attached == ["head:6379"] * 2


def test_the_token_of_a_local_ray_is_ours_alone(ray_session: Cluster) -> None:
    assert ray_session.owned
    token = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        assert token.stat().st_mode & 0o077 == 0


def _pair() -> tuple[Architecture, Architecture]:
    """Two architectures whose ids begin with different digits."""
    first, *rest = architectures(40)
    return first, next(other for other in rest if other.id[0] != first.id[0])
