"""The Ray that evaluations run on: one of our own on this machine, or a cluster at a given address."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from archsearch.config import ExecutionConfig
from archsearch.errors import EnvironmentUnfit

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 3.0
PROBE_SECONDS = 20.0
PROBE = "import ray, sys; print(ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR').dashboard_url)"
# Ray speaks gRPC, so HTTP/2: a client's first words are this text and its settings; the server's are its settings.
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP2_HEADER, HTTP2_TYPE, HTTP2_SETTINGS = 9, 3, 4
OBJECT_STORE_BYTES = 128 * 2**20  # architectures and evaluations are a few kilobytes


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to run on. ``node`` is this machine's node; ``owned`` where this process started Ray."""

    node: str
    cpus: int
    gpus: int
    owned: bool


def prepare_environment() -> None:
    """Set what Ray reads when it is imported: no usage statistics, and no messages of its daemons on our stdout."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")


def connect_ray(config: ExecutionConfig) -> Cluster:
    """Start a local Ray, or attach to ``config.address``. A Ray that this process already uses is used on.

    A local Ray asks for a token, which Ray (from 2.59 on) makes by itself; it has no dashboard.

    Raises:
        EnvironmentUnfit: nothing answers at the address, it refuses us, or it takes jobs from anyone.
    """
    import ray

    owned = not ray.is_initialized()
    if owned and config.address is None:
        _start(config)
    elif owned:
        _attach(str(config.address), config.allow_insecure_ray)
    resources: dict[str, float] = ray.cluster_resources()
    node = ray.get_runtime_context().get_node_id()
    return Cluster(node, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), owned)


def disconnect_ray(cluster: Cluster) -> None:
    """End what ``connect_ray`` started."""
    import ray

    if cluster.owned:
        ray.shutdown()


def _start(config: ExecutionConfig) -> None:
    workers = None if config.workers == "auto" else config.workers
    with _private_files():
        _init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )


def _attach(address: str, allow_insecure: bool) -> None:
    _knock(address)
    url = _probe(address)
    if url and not allow_insecure and _takes_jobs_from_anyone(url):
        raise EnvironmentUnfit(
            f"the Ray cluster at {address} runs jobs from anyone who reaches http://{url}",
            "start it with RAY_AUTH_MODE=token, or accept the risk with --set execution.allow_insecure_ray=true",
        )
    _init(address=address)


def _probe(address: str) -> str:
    """The dashboard's host:port, from a process of its own: where no Ray answers, Ray retries for minutes."""
    remedy = "check that it is the address of a running Ray cluster of the same version, and its token"
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise EnvironmentUnfit(f"no Ray cluster answers at {address} within {PROBE_SECONDS:g} s", remedy) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        raise EnvironmentUnfit(f"cannot attach to Ray at {address}: {lines[-1]}", remedy) from None
    return done.stdout.rstrip("\n").rpartition("\n")[2]


def _init(**options: Any) -> Any:
    import ray

    try:
        return ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentUnfit(f"cannot use Ray: {lines[0]}", "check the address, its token and the cluster") from error


def _knock(address: str) -> None:
    """Raise EnvironmentUnfit unless something that may be a Ray listens at ``address``."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in address:
        raise EnvironmentUnfit(
            f"the Ray address {address!r} is not host:port", "give the address that `ray start --head` printed"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            answers = _speaks_http2(connection)
    except (OSError, OverflowError) as error:
        raise EnvironmentUnfit(
            f"no Ray cluster answers at {address}: {error}", "start the cluster, or leave execution.address out"
        ) from error
    if not answers:
        raise EnvironmentUnfit(
            f"no Ray cluster answers at {address}: what listens there is no Ray",
            "give the address that `ray start --head` printed",
        )


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other end answers as a gRPC server does; one that wants TLS cannot be asked like this."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    connection.settimeout(ANSWER_SECONDS)
    try:
        connection.sendall(HTTP2_GREETING)
        header = connection.recv(HTTP2_HEADER, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(header) == HTTP2_HEADER and header[HTTP2_TYPE] == HTTP2_SETTINGS


def _takes_jobs_from_anyone(url: str) -> bool:
    """Whether the Jobs API answers a request that carries no token."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{url}/api/jobs/", timeout=CONNECT_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _private_files() -> Iterator[None]:
    """Ray writes its token with the mode that the umask leaves; that file must be ours alone."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)
