"""The decode benchmark's record and limits, on a CPU: what is measured needs a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from archsearch.architecture import load_architecture
from archsearch.config import LatencyConfig
from archsearch.latency.validity import Disturbed
from benchmarks import decode, decode_parts, decode_picture, decode_rehearsal

CPU = torch.device("cpu")
CONFIG = LatencyConfig()


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> decode.Record:
    monkeypatch.setattr(decode, "CUDA", CPU)
    return decode.Record(tmp_path / "decode.json")


def test_rows_are_measured_once_and_failures_end_nothing(
    record: decode.Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def measure(name: str, config: LatencyConfig) -> decode_parts.Row:
        measured.append(name)
        if name == "bad":
            raise RuntimeError("no such kernel")
        return {"us": 1.0}, [f"{name} done"]

    monkeypatch.setitem(decode.PARTS, "operators", (measure, ["one", "bad", "two"]))
    for _ in range(2):
        decode.run("operators", [], CONFIG, decode.Record(record.path), 60)
    assert measured == ["one", "bad", "two", "bad"]
    assert "bad: RuntimeError: no such kernel" in capsys.readouterr().out
    assert set(json.loads(record.path.read_text())["operators"]) == {"one", "two"}


def test_record_of_other_kernels_is_left_alone(record: decode.Record) -> None:
    record.add("operators", "one", {"us": 1.0})
    told = json.loads(record.path.read_text()) | {"kernel_hash": "another"}
    record.path.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="kernel_hash another"):
        decode.Record(record.path)
    assert json.loads(record.path.read_text()) == told


def test_disturbed_row_is_taken_once_more_at_the_end(record: decode.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(name: str, config: LatencyConfig) -> decode_parts.Row:
        measured.append(name)
        if name == "busy" or measured == ["one"]:
            raise Disturbed("1 other process(es) use the GPU", "leave it alone")
        return {}, []

    monkeypatch.setitem(decode.PARTS, "models", (measure, ["one", "busy", "two"]))
    decode.run("models", [], CONFIG, record, 60)
    assert measured == ["one", "busy", "two", "one", "busy"]
    assert list(record.found["models"]) == ["one", "two"]  # in their usual order


def test_row_that_would_take_too_long_is_not_begun(record: decode.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, config: LatencyConfig) -> decode_parts.Row:
        time.sleep(0.06)
        return {}, []

    monkeypatch.setitem(decode.PARTS, "exact", (measure, ["one", "two"]))
    with pytest.raises(decode.OutOfTime):
        decode.run("exact", [], CONFIG, record, 0.1)
    assert set(record.found["exact"]) == {"one"}


def test_part_ends_when_its_time_is_over() -> None:
    with pytest.raises(decode.OutOfTime), decode.limited(0.01):
        time.sleep(5)
    with decode.limited(60):
        pass


def test_every_row_has_its_rehearsal() -> None:
    for part in set(decode.PARTS) - {"exact"}:  # which runs what the models run
        assert list(decode_rehearsal.tasks(part, []))
    sample = decode_rehearsal.sample(load_architecture("nemotron-flash-1b"))
    assert [operator.kind for operator in sample.operators] == ["d", "f", "m2", "a"]


def test_ratios_are_those_of_bytes_times_efficiency() -> None:
    row = {"tpot_ms": 0.8, "floor_ms": 0.5, "floor_fraction": 0.625, "kernels_per_token": 142}
    other = {"tpot_ms": 1.0, "floor_ms": 0.75, "floor_fraction": 0.75, "kernels_per_token": 62}
    (line,) = decode_picture.of_ratios({"qwen3-0.6b": row, "nemotron-flash-1b": other})
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[:4] == ["qwen3-0.6b / nemotron-flash-1b", "1.91", "0.80", "0.67"]
    assert cells[5].startswith("1.20 ")


def test_the_paper_is_held_against_the_floor_of_its_own_card() -> None:
    here = {"tpot_ms": 0.6, "floor_ms": 0.4, "bandwidth": {"read": 4.725e12}}
    (line,) = decode_picture.of_blocks({"qwen3-0.6b": here})
    assert [cell.strip() for cell in line.split("|")][2:] == ["0.600", "3.363", "98.7", "0.400", "0.600", "7.1"]


def test_errors_of_prompts_stand_beside_those_of_the_reference() -> None:
    measured = [{"length": 512, "ms": 28.7}]
    errors = {"reference": 0.099, "fp32": {"logits": [0.053, 0.052], "states": [0.083, 0.081]}}
    rows = {"deep": {"measured": measured, "errors": errors}, "unfit": {"measured": [], "errors": None}}
    assert list(decode_picture.of_prompts(rows)) == [
        "deep | 28.70 | - | - | - | 0.099 | logits 0.053 (0.052), states 0.083 (0.081)",
        "unfit | - | - | - | - | - | -",
    ]
