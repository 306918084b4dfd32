"""The command line: what each command prints where, and with which exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture
from archsearch.cli import main
from archsearch.config import load_config
from archsearch.errors import EnvironmentUnfit, RunInUse, SearchStopped, StorageError
from archsearch.latency.device import DoesNotFit
from tests.kits.runs import SMALL_FLAGS, TINY, fake_evaluations, make_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        fake_evaluations(patch)
        yield make_run(tmp_path_factory.mktemp("runs") / "one").path


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    fake_evaluations(monkeypatch)

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def run_seed() -> Architecture:
    """The first candidate of every run of the tiny space."""
    space = load_config(TINY).space
    return space.build(space.seed_genomes[0])


def data(result: tuple[int, str, str], name: str) -> dict[str, Any]:
    """The one JSON object on stdout of a command that went well."""
    code, out, err = result
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    assert document["schema_version"] == 1
    assert document["command"] == name
    return document


def test_run_writes_the_run_folder(command: Command, tmp_path: Path) -> None:
    code, out, err = command("run", "--space", TINY, "--out", "mine", *SMALL_FLAGS)
    assert code == 0
    assert "operators" in out
    assert "12 of 12 candidates evaluated" in out
    assert "run folder: mine" in err
    assert re.search(r"^done 12/12, running 0, failed \d+, best loss 2\.\d+, front \d+, hypervolume 0\.\d+", err, re.M)
    folder = tmp_path / "mine"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "study.db", "trials", "pareto.csv", "pareto.png"}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["optuna"].startswith("5")
    assert command("validate", folder / "config.yaml")[0] == 0


def test_run_names_its_folder(command: Command, tmp_path: Path) -> None:
    document = data(command("run", "--space", TINY, *SMALL_FLAGS, "--evaluations", "4", "--json"), "run")
    assert re.fullmatch(r"experiments/tiny-\d{8}-\d{6}", document["run"])
    assert document["reason"] == "finished"
    assert document["evaluated"] == 4
    assert (tmp_path / document["run"] / "study.db").exists()


def test_flags_win_over_set(command: Command, tmp_path: Path) -> None:
    words = ["run", "--space", TINY, "--out", "r", *SMALL_FLAGS, "--evaluations", "3", "--seed", "7"]
    assert command(*words)[0] == 0
    saved = (tmp_path / "r" / "config.yaml").read_text()
    assert "evaluations: 3" in saved
    assert "seed: 7" in saved


def test_dry_run_writes_nothing(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("run", "--space", TINY, "--dry-run")
    assert code == 0
    space = load_config(TINY).space
    assert f"{space.size:,} genomes of {len(space.genes)} genes" in out
    assert "  hidden_size: 64, 96" in out
    assert len(re.findall(r"^ +\d+\.\d\dM +\d+ wide  \w", out, re.M)) == 5
    document = data(command("run", "--space", TINY, "--dry-run", "--json"), "run")
    assert len(document["samples"]) == 5
    assert document["training_bytes"] > 0
    assert document["seconds_a_candidate"] > 0
    assert list(tmp_path.iterdir()) == []


def test_resume_of_a_finished_run_changes_nothing(command: Command, run_path: Path) -> None:
    trials = {path.name: path.read_bytes() for path in (run_path / "trials").iterdir()}
    code, out, err = command("resume", run_path)
    assert code == 0, err
    assert "12 of 12 candidates evaluated" in out
    assert {path.name: path.read_bytes() for path in (run_path / "trials").iterdir()} == trials


def test_inspect_prints_the_front(command: Command, run_path: Path) -> None:
    code, out, _ = command("inspect", run_path)
    assert code == 0
    document = data(command("inspect", run_path, "--json"), "inspect")
    assert "decode [s]" in out
    for candidate in document["front"]:
        assert re.search(rf"^ *{candidate['number']}  .*{re.escape(candidate['notation'])} *$", out, re.M)
    assert sum(document["outcomes"].values()) >= 12
    losses = [candidate["objectives"]["loss"] for candidate in document["front"]]
    assert losses == sorted(losses)


def test_replicates_tell_how_sure_a_front_is(command: Command, tmp_path: Path) -> None:
    code, out, err = command("run", "--space", TINY, "--out", "r", *SMALL_FLAGS, "--replicates", "2")
    assert code == 0, err
    front = data(command("inspect", "r", "--json"), "inspect")["front"]
    assert "other seeds" in out
    assert f"training {len(front)} candidates of the front with 2 other seeds" in err
    assert "seed noise 0.0014 nats" in out
    files = {path.name for path in (tmp_path / "r" / "replicates").iterdir()}
    assert files == {f"{one['number']:04d}-{seed}.json" for one in front for seed in (1, 2)}
    for one in front:
        found = one["replicates"]["loss"]
        assert found["mean"] == pytest.approx(one["objectives"]["loss"] + 0.003)
        assert found["std"] == pytest.approx(0.002 / 2**0.5)
    trials = list((tmp_path / "r" / "trials").iterdir())
    assert command("resume", "r", "--replicates", "3")[0] == 0
    assert list((tmp_path / "r" / "trials").iterdir()) == trials
    document = data(command("inspect", "r", "--json"), "inspect")
    assert [len(one["replicates"]["loss"]["values"]) for one in document["front"]] == [3] * len(front)
    assert document["seed_noise"]["freedom"] == 2 * len(front)
    assert [one["beaten_by"] for one in front] == [[]] * len(front)
    for path in (tmp_path / "r" / "replicates").glob(f"{front[0]['number']:04d}-*.json"):
        again = json.loads(path.read_text())
        again["objectives"]["loss"] += 1.0
        path.write_text(json.dumps(again))
    out = command("inspect", "r")[1]
    assert f"trial {front[0]['number']} owes its place to its seed" in out


def test_replicates_that_cannot_be_are_refused_before_the_search(command: Command, tmp_path: Path) -> None:
    code, _, err = command("run", "--space", TINY, "--out", "r", "--replicates", "0")
    assert (code, "--replicates 0" in err) == (2, True)
    words = ["--set", "search.objectives=[parameters]", "--replicates", "2"]
    code, _, err = command("run", "--space", TINY, "--out", "r", *words)
    assert (code, "do not depend on a seed" in err) == (3, True)
    assert not (tmp_path / "r").exists()


def test_rungs_are_shown_with_what_they_saved(command: Command) -> None:
    rungs = ["--set", "proxy.tokens=80K", "--set", "proxy.rungs=[5K, 20K, 80K]"]
    rungs += ["--set", "search.stopping.minimum=4", "--set", "search.stopping.confidence=0.6"]
    code, out, err = command("run", "--space", TINY, "--out", "r", *SMALL_FLAGS, *rungs)
    assert code == 0, err
    document = data(command("inspect", "r", "--json"), "inspect")
    stopped = document["outcomes"]["STOPPED"]
    assert stopped > 0
    assert f"stopped {stopped}" in err
    assert re.search(r"^rungs: stopped \d+ at 5,000, \d+ at 20,000 tokens; .* saved$", out, re.M)
    assert sum(document["rungs"]["stopped"].values()) == stopped
    assert document["rungs"]["tokens"] < document["rungs"]["tokens_without"]
    rows = list(csv.DictReader(io.StringIO(command("inspect", "r", "--csv")[1])))
    one = next(row for row in rows if row["outcome"] == "STOPPED")
    code, out, _ = command("inspect", "r", "--trial", one["number"])
    assert "STOPPED" in out
    assert re.search(r"rungs +\d\.\d{4} at 5,000", out)


def test_noise_of_a_study_marks_neighbours(command: Command, tmp_path: Path, run_path: Path) -> None:
    proxy = load_config(run_path / "config.yaml").proxy.model_dump(mode="json")
    noise = {"std": 0.5, "low": 0.4, "high": 0.7, "freedom": 16, "source": "2 seeds"}
    (tmp_path / "v").mkdir()
    record = tmp_path / "v" / "validity.json"
    record.write_text(json.dumps({"proxy": proxy, "noise": noise}))
    code, out, _ = command("inspect", run_path, "--noise", "v")
    assert code == 0
    assert "loss as" in out
    assert "seed noise 0.5000 nats" in out
    front = data(command("inspect", run_path, "--noise", "v", "--json"), "inspect")["front"]
    assert front[0]["indistinguishable"] == [front[1]["number"]]
    record.write_text(json.dumps({"proxy": proxy | {"tokens": 5}, "noise": noise}))
    assert command("inspect", run_path, "--noise", "v")[0] == 3
    assert command("inspect", run_path, "--noise", "nowhere")[0] == 2


def test_validate_proxy_refuses_before_it_trains(command: Command, tmp_path: Path) -> None:
    words = ["validate-proxy", "--space", TINY, "--out", "v", "--architectures"]
    assert command(*words, "2", "--long", "1M")[0] == 2
    code, _, err = command(*words, "8", "--long", "80K")
    assert (code, "no longer training" in err) == (2, True)
    assert not (tmp_path / "v").exists()


def test_inspect_prints_losses_whose_perplexity_no_float_holds(
    command: Command, run_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_path, tmp_path / "run")
    for path in (tmp_path / "run" / "trials").glob("*.json"):
        trial = json.loads(path.read_text())
        if trial["objectives"]:
            trial["objectives"]["loss"] += 1000.0
            path.write_text(json.dumps(trial))
    code, out, err = command("inspect", tmp_path / "run")
    assert code == 0, err
    assert "e+304" in out


def test_inspect_as_csv(command: Command, run_path: Path) -> None:
    code, out, _ = command("inspect", run_path, "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    document = data(command("inspect", run_path, "--json"), "inspect")
    on_front = {int(row["number"]) for row in rows if row["on_front"] == "True"}
    assert on_front == {candidate["number"] for candidate in document["front"]}
    assert next(row["number"] for row in rows if row["seed"] == "True") == "0"
    kept = list(csv.DictReader((run_path / "pareto.csv").open()))
    assert {int(row["number"]) for row in kept} == on_front


def test_inspect_says_why(command: Command, run_path: Path) -> None:
    code, out, _ = command("inspect", run_path, "--why")
    assert code == 0
    assert "what each kind of proposal earned" in out
    document = data(command("inspect", run_path, "--why", "--json"), "inspect")
    assert len(document["history"]) == document["evaluated"]
    assert document["history"][-1]["hypervolume"] == pytest.approx(document["hypervolume"])
    assert sum(row["proposals"] for row in document["proposals"]) == document["evaluated"]
    assert (run_path / "hypervolume.png").stat().st_size > 10_000


def test_inspect_one_trial(command: Command, run_path: Path) -> None:
    code, out, _ = command("inspect", run_path, "--trial", "0")
    assert code == 0
    seed = run_seed()
    assert re.search(rf"^notation +{seed.notation}$", out, re.M)
    trial = data(command("inspect", run_path, "--trial", "0", "--json"), "inspect")["trial"]
    assert trial["lineage"]["kind"] == "seed"
    assert trial["evaluation"]["architecture"] == seed.to_dict()


def test_exported_files_are_read_back(command: Command, run_path: Path) -> None:
    trial = data(command("inspect", run_path, "--trial", "0", "--json"), "inspect")["trial"]
    for format in ("yaml", "json"):
        words = ["export", run_path, "--trial", "0", "--to", f"x-1.{format}", "--format", format, "--json"]
        assert data(command(*words), "export")["path"].endswith(f"x-1.{format}")
        assert data(command("validate", f"x-1.{format}", "--json"), "validate")["id"] == trial["id"]


def test_train_and_latency(command: Command) -> None:
    Path("small.yaml").write_text(
        "{hidden_size: 16, vocab_size: 256, operators: d a, options: {a: {head_dim: 8}, d: {head_dim: 8}}}"
    )
    sizes = ["tokens=256", "batch=2", "context=32", "validation_tokens=64"]
    words = ["train", "small.yaml", *(word for size in sizes for word in ("--set", f"proxy.{size}"))]
    result = data(command(*words, "--json"), "train")
    assert 4 < result["loss"] < 7
    assert result["tokens"] == 256
    code, out, _ = command(*words)
    assert code == 0
    assert f"loss {result['loss']:.4f} nats" in out


def test_train_out_of_memory_is_no_bug(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from archsearch.proxy import trainer

    def full(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.")

    monkeypatch.setattr(trainer, "train_proxy", full)
    code, out, err = command("train", "qwen3-0.6b", "--device", "cpu")
    assert (code, out) == (DoesNotFit.exit_code, "")
    assert "cpu ran out of memory" in err
    assert "a bug" not in err


def test_latency(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.latency.prefill.LENGTHS", (16,))
    monkeypatch.setattr("archsearch.latency.throughput.CPU_SECONDS", 0.1)
    Path("small.yaml").write_text(
        "{hidden_size: 16, vocab_size: 256, operators: d a, options: {a: {head_dim: 8}, d: {head_dim: 8}}}"
    )
    words = ["latency", "small.yaml", "--tokens", "16", "--context", "20", "--device", "cpu", "--dtype", "bfloat16"]
    words += ["--batch", "2", "--set", "latency.strata=1", "--set", "latency.steps=4"]
    result = data(command(*words, "--json"), "latency")
    decode = result["decode"]
    assert decode["seconds"] > 0
    assert (decode["tokens"], decode["batch"], decode["dtype"]) == (16, 2, "bfloat16")
    assert result["throughput"]["context"] == 20
    assert result["prefill"]["measured"][0]["batch"] == 2
    code, out, err = command(*words)
    assert code == 0
    for said in ("ms a token", "of the floor", "memory: weights", "to the first token", "tokens/s", "note: on a CPU"):
        assert said in out
    assert err.splitlines() == ["decode", "prefill", "throughput"]


def test_init_writes_a_space_that_runs(command: Command) -> None:
    assert command("init", "mine.yaml")[1] == "mine.yaml\n"
    assert command("validate", "mine.yaml")[0] == 0
    assert command("run", "--space", "mine.yaml", "--out", "r", *SMALL_FLAGS)[0] == 0


def test_doctor(command: Command) -> None:
    document = data(command("doctor", "--json"), "doctor")
    assert document["ok"]
    checks = {check["name"]: check for check in document["checks"]}
    assert {"python", "torch", "sqlite", "ray", "disk", "operator a", "operator m2"} <= checks.keys()
    assert all(check["status"] in ("ok", "warn") for check in checks.values())
    assert "off by" in checks["operator gd"]["detail"]


def test_doctor_tunes_no_kernels_without_a_gpu(command: Command) -> None:
    code, _, err = command("doctor", "--tune")
    assert code == 4
    assert "no NVIDIA GPU to tune kernels for" in err


def test_doctor_fails_where_a_check_fails(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str) -> None:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr("archsearch.commands.doctor.check_operator", broken)
    code, out, err = command("doctor")
    assert code == 4
    assert re.search(r"^fail  operator a +RuntimeError: no kernel image$", out, re.M)
    assert "operator a" in err.splitlines()[0]


def test_version_and_help(command: Command) -> None:
    assert command("--version")[1].startswith("archsearch 0")
    code, out, _ = command()
    assert code == 0
    for name in ("run", "resume", "inspect", "export", "train", "latency", "validate", "init", "doctor"):
        assert re.search(rf"\b{name} ", out)


@pytest.mark.parametrize("error", [EnvironmentUnfit, SearchStopped, StorageError, RunInUse])
def test_exit_codes(command: Command, monkeypatch: pytest.MonkeyPatch, error: type[StorageError]) -> None:
    def fail(*_: object) -> None:
        raise error("the cause", "the remedy")

    monkeypatch.setattr("archsearch.config.load_config", fail)
    assert command("validate", TINY)[0] == 0
    monkeypatch.setattr("archsearch.commands.spaces.load_config", fail)
    code, out, err = command("validate", TINY)
    assert (code, out) == (error.exit_code, "")
    assert err == "error: the cause\nremedy: the remedy\n"


def test_debug_shows_the_traceback(command: Command) -> None:
    assert "Traceback" not in command("validate", "absent.yaml")[2]
    assert "Traceback" in command("validate", "absent.yaml", "--debug")[2]
    assert "Traceback" in command("--debug", "validate", "absent.yaml")[2]


def test_a_bug_leaves_its_traceback_in_a_file(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("archsearch.commands.spaces.validate_file", broken)
    code, out, err = command("validate", TINY)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    (path,) = tmp_path.glob("archsearch-error-*.txt")
    assert str(path) in err.splitlines()[1]
    assert "ZeroDivisionError: oops" in path.read_text()


def test_interrupt(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("archsearch.commands.spaces.validate_file", interrupted)
    assert command("validate", TINY)[0] == 130


SLOW = """
import sys, time
from tests.kits import runs
from archsearch import api, cli

class Slow(runs.FakeEvaluator):
    def __call__(self, architecture, *, seed):
        time.sleep(0.2)
        return super().__call__(architecture, seed=seed)

api.ProxyEvaluator = Slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run(command: Command, tmp_path: Path, number: signal.Signals, code: int) -> None:
    words = ["run", "--space", str(TINY), "--out", str(tmp_path / "r"), *SMALL_FLAGS]
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], cwd=root, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("r/trials/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"archsearch resume {tmp_path / 'r'}" in err
    assert "12 of 12 candidates evaluated" in command("resume", tmp_path / "r")[1]


def test_live_progress_on_a_terminal(tmp_path: Path) -> None:
    words = ["run", "--space", str(TINY), "--out", str(tmp_path / "r"), *SMALL_FLAGS, "--evaluations", "8"]
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=root, env=environment, stderr=terminal, stdout=subprocess.PIPE
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(controller, 65536):
                shown += chunk
        except OSError:
            pass
        out, _ = process.communicate()
    assert process.returncode == 0
    assert b"\x1b" not in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert len(re.findall(r"done \d/8  running", plain)) > 2
    assert "hypervolume" in plain
    assert "left" in plain
