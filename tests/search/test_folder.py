"""RunFolder: what it refuses, what it leaves alone, and who may hold its lock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from archsearch.config import load_config
from archsearch.errors import ArchsearchError, ConfigError, RunInUse, StorageError, UsageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search import filesystem
from archsearch.search.folder import RunFolder
from tests.search.fakes import make_config

HOLD = (
    "import sys, time; from archsearch.search.folder import RunFolder\n"
    "with RunFolder.open(sys.argv[1]).lock():\n    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", make_config(), {"python": "3"})


def test_create_writes_what_open_reads(folder: RunFolder) -> None:
    found = RunFolder.open(folder.path)
    assert found.config == make_config()
    assert found.environment == {"python": "3"}
    assert found.trials.is_dir()
    assert found.weights.is_dir()


def test_a_run_with_seeds_from_files_opens_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = {"hidden_size": 64, "operators": "a f", "options": {"a": {"head_dim": 32}}}
    (tmp_path / "seed.yaml").write_text(json.dumps({"vocab_size": 512, **seed}))
    stage = {"name": "only", "mixers": ["a", "d"], "blocks": [1, 2]}
    space = {"hidden_size": 64, "vocab_size": 256, "stages": [stage], "options": {"a": {"head_dim": 32}}}
    (tmp_path / "space.yaml").write_text(json.dumps({"space": {**space, "seeds": ["seed.yaml"]}}))
    monkeypatch.chdir(tmp_path)
    config = load_config("space.yaml")
    RunFolder.create("run", config)
    monkeypatch.chdir("/")
    (tmp_path / "seed.yaml").unlink()
    found = RunFolder.open(tmp_path / "run").config
    assert found == config
    assert found.space.seed_genomes == ({"only.mixers": "a", "only.blocks": 1},)


def test_create_refuses_a_folder_with_something_in_it(folder: RunFolder) -> None:
    before = sorted(folder.path.iterdir())
    with folder.lock():
        pass
    with pytest.raises(UsageError, match="not empty") as error:
        RunFolder.create(folder.path, make_config())
    assert "resume" in error.value.remedy
    assert sorted(folder.path.iterdir()) == before


def test_create_leaves_a_strangers_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty") as error:
        RunFolder.create(tmp_path, make_config())
    assert "resume" not in error.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_create_goes_on_where_a_creation_was_killed(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("")
    assert RunFolder.create(tmp_path, make_config()).config == make_config()


def test_create_takes_an_empty_folder_and_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", make_config()).config_path.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArchsearchError) as error:
        RunFolder.create(tmp_path / "file", make_config())
    assert error.value.exit_code == 2
    assert (tmp_path / "file").read_text() == "x"


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RunFolder.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no config"):
        RunFolder.open(tmp_path)


def test_open_refuses_a_damaged_config(folder: RunFolder) -> None:
    folder.config_path.write_text("space: [")
    with pytest.raises(ConfigError):
        RunFolder.open(folder.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError):
        RunFolder.create(tmp_path / "run", make_config())


def test_an_unwritable_place_is_a_storage_error() -> None:
    with pytest.raises(StorageError):
        RunFolder.create("/proc/archsearch/run", make_config())


def test_a_second_process_is_told_who_holds_the_run(folder: RunFolder) -> None:
    with folder.lock():
        pass
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=rf"process {process.pid} on \S+, started 20") as error, folder.lock():
            pass
        assert error.value.exit_code == 75
        with pytest.raises(RunInUse):
            RunFolder.create(folder.path, make_config())
    finally:
        process.kill()
        process.wait()
    with folder.lock():
        record = json.loads((folder.path / "run.lock").read_text())
    assert record["pid"] == os.getpid()


def test_a_network_file_system_is_refused(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    where = str(tmp_path).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {where} nfs4 rw 0 0\n")
    monkeypatch.setattr(filesystem, "MOUNTS", mounts)
    with folder.lock():
        pass
    assert filesystem.file_system(tmp_path / "not" / "there") == "nfs4"
    assert not filesystem.is_network(Path("/"))
    with pytest.raises(StorageError, match="network file system"), folder.lock():
        pass
    with pytest.raises(StorageError, match="nfs4"):
        RunFolder.create(tmp_path / "other", make_config())
    assert not (tmp_path / "other").exists()


def test_evaluations_come_back_and_damage_is_named(folder: RunFolder) -> None:
    config = make_config()
    architecture = config.space.build({name: choices[0] for name, choices in config.space.genes.items()})
    evaluation = Evaluation(architecture=architecture, outcome=Outcome.NAN, error="loss is nan")
    assert folder.read_evaluation(3) is None
    folder.write_evaluation(3, evaluation)
    assert folder.read_evaluation(3) == evaluation
    folder.evaluation_path(3).write_text('{"outcome": "OK"')
    with pytest.raises(StorageError, match="0003"):
        folder.read_evaluation(3)


def test_a_moved_run_says_nothing_of_its_old_place(folder: RunFolder, tmp_path: Path) -> None:
    old = str(folder.path)
    shutil.move(folder.path, tmp_path / "moved")
    moved = RunFolder.open(tmp_path / "moved")
    assert moved.config == make_config()
    assert not any(old in path.read_text() for path in moved.path.glob("*.*") if path.is_file())
