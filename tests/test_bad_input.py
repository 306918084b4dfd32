"""Bad input gets one line of cause, one of remedy, the documented exit code, and nothing is written or lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from archsearch.cli import main
from archsearch.commands.spaces import TEMPLATE
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.folder import RunFolder
from tests.kits.runs import SMALL_FLAGS, TINY, fake_evaluations, make_run

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command in an empty folder; it must fail as documented. Gives cause and remedy."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str | Path, code: int, progress: bool = False) -> str:
        """``progress``: the search had begun, and told so."""
        before = snapshot(tmp_path)
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        if progress:
            lines = [line for line in lines if not line.startswith(("run folder: ", "done ", "starting"))]
        assert len(lines) == 2, captured.err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("remedy: ")
        assert len(lines[0]) > len("error: ") + 5
        assert len(lines[1]) > len("remedy: ") + 5
        assert snapshot(tmp_path) == before
        return captured.err

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, but for the lock, which names its last owner."""
    paths = [path for path in folder.rglob("*") if path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def edited(old: str, new: str) -> str:
    """The file that ``init`` writes, with one thing changed."""
    text = TEMPLATE.format(name="bad.yaml")
    assert old in text, old
    return text.replace(old, new, 1)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found empty"),
    "spaces": (b"  \n\n", "found empty"),
    "binary": (bytes(range(256)) * 4, "not UTF-8"),
    "zero bytes": (b"space:\0\n", "control characters"),
    "utf-16": ("space: {}".encode("utf-16"), "not UTF-8"),
    "10 MB": (b"# padding\n" * 2**20, "larger than"),
    "deep": (b"[" * 20000, "nested deeper"),
    "deep mapping": (b"a: " + b"{a: " * 300, "nested deeper"),
    "list": (b"- 1\n- 2\n", "found a list"),
    "scalar": (b"hello\n", "found a str"),
    "two documents": (b"space: {}\n---\nspace: {}\n", "more than one document"),
    "not YAML": (b"space: [1, 2\n", "not valid YAML"),
    "tab": (b"space:\n\tname: x\n", "not valid YAML"),
    "python object": (b"space: !!python/object:os.system {}\n", "tag"),
    "alias": (b"a: &x [1]\nb: *x\n", "aliases"),
    "duplicate key": (b"space: {}\nspace: {}\n", "repeated"),
    "no space": (b"search: {}\n", "space"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(refused: Refused, tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / "bad.yaml").write_bytes(content)
    assert expected in refused("validate", "bad.yaml", code=3)
    refused("run", "--space", "bad.yaml", "--out", "run", code=3)


EDITS: dict[str, tuple[str, str, str]] = {
    "unknown key": ("evaluations: 24", "evaluatoins: 24", "did you mean 'evaluations'"),
    "unknown section": ("proxy:", "porxy:", "did you mean 'proxy'"),
    "text for a number": ("tokens: 200K", "tokens: many", "not a number such as"),
    "no is a word": ("evaluations: 24", "evaluations: no", "found 'no'"),
    "negative": ("hidden_size: [64, 96, 128]", "hidden_size: [-64]", "at least 8"),
    "zero": ("vocab_size: 256", "vocab_size: 0", "vocab_size"),
    "nan": ("learning_rate: 3e-3", "learning_rate: .nan", "finite"),
    "infinity": ("learning_rate: 3e-3", "learning_rate: .inf", "finite"),
    "huge": ("vocab_size: 256", "vocab_size: 1" + "0" * 30, "vocab_size"),
    "fraction": ("vocab_size: 256", "vocab_size: 256.5", "vocab_size"),
    "empty choices": ("hidden_size: [64, 96, 128]", "hidden_size: []", "empty"),
    "repeated choice": ("hidden_size: [64, 96, 128]", "hidden_size: [64, 64]", "repeated"),
    "min above max": ("blocks: {min: 1, max: 2}", "blocks: {min: 3, max: 2}", "above"),
    "limits min above max": ("operators: {max: 12}", "operators: {min: 13, max: 12}", "above"),
    "unknown operator": (
        "mixers: [a, d, gd+a, m2+a]",
        "mixers: [a, gdd]",
        "did you mean 'gd'",
    ),
    "head dim": ("a: {head_dim: 32, kv_heads: [1, 2]}", "a: {head_dim: 7}", "head_dim"),
    "true for a number": ("a: {head_dim: 32, kv_heads: [1, 2]}", "a: {kv_heads: true}", "valid integer"),
    "FFN as mixer": ("mixers: [a, d, gd+a, m2+a]", "mixers: [f]", "no mixer"),
    "budget of 0": ("evaluations: 24", "evaluations: 0", "greater than or equal to 1"),
    "no tokens": ("tokens: 200K", "tokens: 0", "greater than or equal to 1"),
    "infeasible": ("parameters: {max: 1.5M}", "parameters: {max: 10}", "above the limit"),
    "unknown seed": ("seeds:", "seeds: [gpt-9]\n  x:", "seeds"),
    "hostile name": ("name: my-space", "name: ../../etc/passwd", "name"),
    "markup name": ("name: my-space", 'name: "[/]"', "name"),
    "long name": ("name: my-space", "name: " + "x" * 300, "name"),
    "unknown sampler": ("evaluations: 24", "sampler: magic", "sampler"),
    "unknown objective": ("evaluations: 24", "objectives: [lost]", "objectives"),
}


@pytest.mark.parametrize("name", EDITS)
def test_values(refused: Refused, tmp_path: Path, name: str) -> None:
    old, new, expected = EDITS[name]
    (tmp_path / "bad.yaml").write_text(edited(old, new))
    assert expected in refused("validate", "bad.yaml", code=3)


def test_a_head_dim_that_divides_no_width(refused: Refused, tmp_path: Path) -> None:
    text = edited("hidden_size: [64, 96, 128]", "hidden_size: [72]").split("  seeds:")[0]
    (tmp_path / "bad.yaml").write_text(text)
    assert "divide" in refused("validate", "bad.yaml", code=3)


def test_an_option_is_found_by_its_line(refused: Refused, tmp_path: Path) -> None:
    text = edited("a: {head_dim: 32, kv_heads: [1, 2]}", "a: {head_dim: 33}")
    (tmp_path / "bad.yaml").write_text(text)
    line = next(number for number, words in enumerate(text.splitlines(), 1) if "head_dim: 33" in words)
    assert f"bad.yaml:{line}: space: options.a.head_dim: " in refused("validate", "bad.yaml", code=3)


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(edited("learning_rate: 3e-3", "learning_rate: 1e-3"))
    assert main(["validate", str(tmp_path / "good.yaml")]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_paths_that_are_no_files(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused("validate", "folder", code=3)
    assert "cannot read" in refused("validate", "loop", code=3)
    assert "not a regular file" in refused("validate", "/dev/zero", code=3)
    assert "cannot read" in refused("validate", "absent.yaml", code=3)
    assert "cannot read" in refused("validate", "x" * 300, code=3)


def test_names_cannot_reach_the_terminal(refused: Refused) -> None:
    shown = refused("validate", "\x1b[31mred\u202e\n[/].yaml", code=3)
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["run"],
        ["run", "--space"],
        ["run", "--space", str(TINY), "--evaluations", "many"],
        ["run", "--space", str(TINY), "--bogus"],
        ["export", "somewhere"],
        ["inspect", "absent"],
        ["inspect", "absent", "--json", "--csv"],
        ["resume", "absent"],
        ["export", "absent", "--to", "x"],
        ["train", "qwen3-0.6b", "--device", "tpu"],
        ["train", "qwen3-0.6b", "--set", "latency.tokens=1"],
        ["train", "qwen3-0.6b", "--set", "proxy.tokens"],
        ["latency", "qwen3-0.6b", "--set", "tokens=1"],
        ["latency", "qwen3-0.6b", "--context", "0"],
        ["latency", "qwen3-0.6b", "--batch", "two"],
    ],
)
def test_usage(refused: Refused, words: list[str]) -> None:
    refused(*words, code=2)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--space", str(TINY), "--set", "search.evaluations"],
        ["run", "--space", str(TINY), "--set", "=1"],
        ["run", "--space", str(TINY), "--set", "search.bogus=1"],
        ["run", "--space", str(TINY), "--set", "space.stages.9.blocks=1"],
        ["run", "--space", str(TINY), "--evaluations", "0"],
        ["run", "--space", str(TINY), "--workers", "-1"],
        ["run", "--space", str(TINY), "--executor", "magic"],
        ["train", "gpt-9"],
        ["latency", "qwen3"],
        ["latency", "qwen3-0.6b", "--batch", "0"],
        ["latency", "qwen3-0.6b", "--tokens", "0"],
        ["latency", "qwen3-0.6b", "--tokens", "many"],
        ["latency", "qwen3-0.6b", "--dtype", "int4"],
        ["train", "qwen3-0.6b", "--set", "proxy.tokens=-1"],
        ["train", "qwen3-0.6b", "--set", "proxy.data=/does/not/exist"],
        ["train", str(TINY)],
    ],
)
def test_invalid_values(refused: Refused, words: list[str]) -> None:
    refused(*words, code=3)


def test_init_overwrites_nothing(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("mine")
    refused("init", code=2)
    (tmp_path / "link.yaml").symlink_to("nowhere")
    refused("init", "link.yaml", code=2)
    refused("init", "absent/space.yaml", code=6)


# Run folders


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run below the current folder."""
    fake_evaluations(monkeypatch)
    return make_run(tmp_path / "finished", "search.evaluations=4").path


def test_a_folder_with_something_in_it(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert "not empty" in refused("run", "--space", TINY, "--out", "taken", *SMALL_FLAGS, code=2)
    assert "not a folder" in refused("run", "--space", TINY, "--out", "taken/mine.txt", *SMALL_FLAGS, code=2)
    assert "not a run folder" in refused("inspect", "taken", code=2)
    assert "not a run folder" in refused("resume", "taken", code=2)


def test_a_run_is_not_overwritten(refused: Refused, finished: Path) -> None:
    assert "archsearch resume" in refused("run", "--space", TINY, "--out", finished, *SMALL_FLAGS, code=2)


@pytest.mark.parametrize("out", ["/proc/archsearch", "/dev/null/run"])
def test_a_folder_that_cannot_be_written(refused: Refused, out: str) -> None:
    refused("run", "--space", TINY, "--out", out, *SMALL_FLAGS, code=6)


def test_a_run_in_use(refused: Refused, finished: Path) -> None:
    with RunFolder.open(finished).lock():
        # flock belongs to the open file, so a second one in this process stands for another process
        message = refused("resume", finished, code=75, progress=True)
    assert f"process {os.getpid()}" in message


def test_a_full_disk(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("archsearch.files.os.fsync", full)
    message = refused("init", code=6)
    assert "No space left" in message
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_another_space(refused: Refused, finished: Path) -> None:
    config = finished / "config.yaml"
    config.write_text(config.read_text().replace("- 96\n", "- 96\n  - 160\n", 1))
    assert "another space" in refused("resume", finished, code=3, progress=True)


def test_a_damaged_study(refused: Refused, finished: Path) -> None:
    study = finished / "study.db"
    whole = study.read_bytes()
    for content in (b"", b"not SQLite at all" * 100, whole[: len(whole) // 2], b"\0" * 4096):
        study.write_bytes(content)
        refused("inspect", finished, code=6)
        refused("export", finished, "--to", "x", code=6)
        refused("resume", finished, code=6, progress=True)


def test_a_lost_evaluation(refused: Refused, finished: Path) -> None:
    (finished / "trials" / "0000.json").unlink()
    assert "is missing" in refused("inspect", finished, code=6)
    (finished / "trials" / "0000.json").write_text("{}")
    assert "cannot read" in refused("inspect", finished, code=6)


def test_a_trial_that_does_not_exist(refused: Refused, finished: Path) -> None:
    for words in (["inspect", finished], ["export", finished, "--to", "x"]):
        assert "no trial 99" in refused(*words, "--trial", "99", code=2)
        assert "no trial -1" in refused(*words, "--trial", "-1", code=2)


def test_export_targets(refused: Refused, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "outside").symlink_to(tmp_path.parent)
    for format in ("hf", "yaml", "json"):
        words = ["export", finished, "--format", format, "--to"]
        assert "exists" in refused(*words, "taken", code=2)
        assert "exists" in refused(*words, "dangling", code=2)
        assert "exists" in refused(*words, ".", code=2)
        assert "leaves the current folder" in refused(*words, "../x", code=2)
        assert "leaves the current folder" in refused(*words, "taken/../../x", code=2)
        assert "leaves the current folder" in refused(*words, "outside/x", code=2)
        assert "cannot write" in refused(*words, "/proc/x/y", code=6)
        assert "cannot write" in refused(*words, "x" * 300, code=6)
    assert "no export format" in refused("export", finished, "--to", "x", "--format", "onnx", code=2)


def test_a_trial_without_result_has_no_weights(refused: Refused, finished: Path) -> None:
    path = finished / "trials" / "0001.json"
    evaluation = Evaluation.model_validate_json(path.read_text())
    path.write_text(evaluation.model_copy(update={"outcome": Outcome.NAN, "objectives": {}}).model_dump_json())
    assert "outcome NAN" in refused("export", finished, "--trial", "1", "--to", "x", code=2)


def test_a_ray_address_where_nothing_answers(refused: Refused) -> None:
    words = ["run", "--space", TINY, "--out", "r", "--set", "execution.address=127.0.0.1:1"]
    assert "no Ray cluster answers" in refused(*words, code=4, progress=True)
    words[-1] = "execution.address=../nonsense"
    assert "host:port" in refused(*words, code=4, progress=True)
