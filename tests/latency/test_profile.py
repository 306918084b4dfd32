"""The latency profile: measured for real on small operators, fitted exactly on made-up ones, refused where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from archsearch.architecture import Architecture
from archsearch.cli import main
from archsearch.config import RunConfig
from archsearch.errors import ConfigError
from archsearch.latency import profile_check, profiling
from archsearch.latency.profile_check import prepare_profile
from archsearch.latency.profiling import measure_profile, sample_architectures
from archsearch.latency.validity import Disturbed
from archsearch.latency_profile import LatencyProfile, ProfileUnfit, load_profile, operators_of

CPU = torch.device("cpu")
SPACE: dict[str, Any] = {
    "name": "small",
    "hidden_size": [32, 64],
    "vocab_size": 64,
    "stages": [{"name": "only", "mixers": ["a", "d", "a+d"], "ffns": [0, 1], "blocks": {"min": 1, "max": 6}}],
    "options": {"a": {"head_dim": 16, "kv_heads": [1, 2]}, "d": {"head_dim": [16, 64]}, "f": {"multiple_of": 32}},
}
COSTS = {"a": 70.0, "d": 110.0, "f": 20.0}
HEAD = 30.0


def config_of(space: dict[str, Any] | None = None, **latency: Any) -> RunConfig:
    settings = {"tokens": 32, "strata": 2, "steps": 4, "repeats": 1, **latency}
    return RunConfig.model_validate({"space": space or SPACE, "latency": settings, "execution": {"device": "cpu"}})


def made_up(scale: float = 1.0, each: float = 0.0) -> Callable[[Architecture], float]:
    """Microseconds of a step that is a sum, but that what ``each`` operator costs shows in mixtures only."""

    def microseconds(architecture: Architecture) -> float:
        mixed = len(set(architecture.notation.split())) > 1
        costs = sum(COSTS[o.kind] * architecture.hidden_size / 32 for o in architecture.operators)
        return HEAD + costs * (scale if mixed else 1) + each * len(architecture.operators) * mixed

    return microseconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """In place of the measurement: ``us`` gives microseconds, ``calls`` holds what was measured, ``end`` ends it."""
    state = SimpleNamespace(us=made_up(), calls=[], end=10**6)

    def measure(architecture: Architecture, config: object, **options: object) -> SimpleNamespace:
        if len(state.calls) >= state.end:
            raise KeyboardInterrupt
        state.calls.append(architecture)
        return SimpleNamespace(tpot_ms=state.us(architecture) / 1e3)

    monkeypatch.setattr(profiling, "measure_decode", measure)
    return state


def profile_of(path: Path, config: RunConfig | None = None, checks: int = 12) -> LatencyProfile:
    return measure_profile(config or config_of(), path, CPU, checks, lambda text: None)


def unfit(config: RunConfig) -> str:
    with pytest.raises(ProfileUnfit) as caught:
        prepare_profile(config)
    assert "archsearch profile" in caught.value.remedy
    return caught.value.cause


def test_a_real_profile_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {**SPACE, "hidden_size": 64, "options": {"a": {"head_dim": 16}, "d": {"head_dim": 16}}}
    space |= {"stages": [{"name": "only", "mixers": ["a", "d"], "ffns": 0, "blocks": {"min": 1, "max": 6}}]}
    (tmp_path / "space.json").write_text(config_of(space).model_dump_json())
    out = tmp_path / "made" / "profile.json"
    command = ["profile", "--space", str(tmp_path / "space.json"), "--out", str(out), "--check", "3"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["architectures"] == 3
    profile = load_profile(out)
    assert (profile.fingerprint.kind, profile.fingerprint.dtype, profile.fingerprint.tokens) == ("cpu", "float32", 32)
    assert [entry.operator and entry.operator["kind"] for entry in profile.table] == [None, "a", "d"]
    assert all(5 < entry.us < 50_000 for entry in profile.table[1:])
    model = sample_architectures(config_of(space).space, 3)[0]
    assert profile.seconds(model) == pytest.approx(profile.ms(model) * 32 / 1e3)


def test_what_is_a_sum_is_predicted_exactly(tmp_path: Path, fake: Any) -> None:
    profile = profile_of(tmp_path / "profile.json")
    assert profile.error is not None
    assert profile.error.worst < 1e-6
    assert profile.error.spearman == pytest.approx(1)
    assert profile.error.architectures == 6
    costs = {entry.operator["kind"]: entry.us for entry in profile.table if entry.operator and entry.hidden_size == 64}
    assert costs == pytest.approx({kind: 2 * us for kind, us in COSTS.items()})
    assert [entry.us for entry in profile.table if entry.operator is None] == pytest.approx([HEAD, HEAD])


@pytest.mark.parametrize(("scale", "each"), [(0.9, 0.0), (1.0, 8.0)])
def test_mixtures_mend_the_table_and_its_error_is_told_of_others(
    scale: float, each: float, tmp_path: Path, fake: Any
) -> None:
    mixed = {**SPACE, "stages": [{"name": "only", "mixers": ["a+d"], "ffns": [0, 1], "blocks": {"min": 1, "max": 9}}]}
    fake.us = made_up(scale, each)
    profile = profile_of(tmp_path / "profile.json", config_of(mixed), checks=18)
    assert profile.error is not None
    assert profile.error.median < 0.5 * profile.error.chains_alone
    assert sum(one.fitted for one in profile.checked) == 9
    held = [one for one in profile.checked if not one.fitted]
    off = [abs((one.predicted_ms or 0) / one.measured_ms - 1) for one in held]
    assert (profile.error.median, profile.error.worst) == pytest.approx((np.median(off), max(off)))


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path, fake: Any) -> None:
    path = tmp_path / "profile.json"
    whole = profile_of(tmp_path / "whole.json")
    total, fake.calls = len(fake.calls), []
    for fake.end in (5, total - 2):
        with pytest.raises(KeyboardInterrupt):
            profile_of(path)
        assert "was not finished" in unfit(config_of(profile=str(path)))
    fake.end = 10**6
    assert profile_of(path) == whole
    assert len(fake.calls) == total
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    profile_of(path)
    assert len(fake.calls) == total


def test_another_space_adds_to_the_table(tmp_path: Path, fake: Any) -> None:
    path = tmp_path / "profile.json"
    profile_of(path)
    wider = config_of({**SPACE, "hidden_size": [32, 64, 96]}, profile=str(path))
    assert "lacks the head at width 96, a (" in unfit(wider)
    count, fake.calls = len(fake.calls), []
    profile_of(path, wider)
    assert len(fake.calls) < count
    assert {model.hidden_size for model in fake.calls if len(set(model.operators)) == 1} >= {96}
    prepare_profile(wider)
    prepare_profile(config_of(profile=str(path)))


def test_operators_are_those_that_fit_the_width() -> None:
    space = config_of().space
    assert [(o.kind, getattr(o, "head_dim", 0)) for o in operators_of(space, 32)] == [
        ("a", 16), ("a", 16), ("d", 16), ("f", 0),
    ]  # fmt: skip
    assert [getattr(o, "head_dim", 0) for o in operators_of(space, 64) if o.kind == "d"] == [16, 64]


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"tokens": 64}, "taken with tokens 32, here is 64"),
        ({"batch": 2}, "taken with batch 1, here is 2"),
        ({"strata": 4}, "taken with strata 2, here is 4"),
        ({"dtype": "bfloat16"}, "taken with dtype float32, here is bfloat16"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], cause: str, tmp_path: Path, fake: Any) -> None:
    profile_of(tmp_path / "profile.json")
    assert cause in unfit(config_of(profile=str(tmp_path / "profile.json"), **settings))


def test_another_device_or_kernel_is_refused(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    profile_of(path)
    config = config_of(profile=str(path))
    prepare_profile(config)
    with monkeypatch.context() as patch:
        patch.setattr(profile_check, "kernel_hash", lambda: "0123456789ab")
        assert "kernel hash" in unfit(config)
    data = json.loads(path.read_text())
    data["fingerprint"]["device"] = "NVIDIA H200"
    path.write_text(json.dumps(data))
    assert "taken with device NVIDIA H200, here is" in unfit(config)
    with pytest.raises(ProfileUnfit, match="device") as caught:
        profile_of(path)
    assert caught.value.remedy == "name another --out"


def test_another_driver_is_told(tmp_path: Path, fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "profile.json"
    profile_of(path)
    data = json.loads(path.read_text())
    data["fingerprint"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    prepare_profile(config_of(profile=str(path)))
    assert "was measured with torch 1.0, here" in caplog.text


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda text: text[: len(text) // 2], "no latency profile"),
        (lambda text: "{}", "fingerprint: Field required"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version"),
        (lambda text: text.replace('"us": ', '"us": -'), "greater than or equal to 0"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[str], str], cause: str, tmp_path: Path, fake: Any) -> None:
    path = tmp_path / "profile.json"
    profile_of(path)
    path.write_text(change(path.read_text()))
    before = path.read_text()
    for use in (lambda: prepare_profile(config_of(profile=str(path))), lambda: profile_of(path)):
        with pytest.raises(ConfigError, match=cause):
            use()
    assert path.read_text() == before


def test_an_empty_space_is_refused_before_anything_is_measured(tmp_path: Path, fake: Any) -> None:
    with pytest.raises(ConfigError, match="has no feasible architecture"):
        profile_of(tmp_path / "profile.json", config_of({**SPACE, "limits": {"parameters": {"max": 10}}}))
    assert list(tmp_path.iterdir()) == []
    assert fake.calls == []


def test_bad_commands_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {**SPACE, "limits": {"parameters": {"max": 10}}}
    for name, space in (("space", SPACE), ("empty", empty)):
        document = {"space": space, "latency": {"tokens": 32}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    out = str(tmp_path / "folder" / "profile.json")
    for arguments, code, cause in (
        (["--space", "empty.json"], 3, "no feasible architecture"),
        (["--space", "space.json", "--check", "1"], 2, "--check 1"),
        (["--space", "space.json", "--device", "cuda:99"], 4, "CUDA"),
        (["--space", "space.json", "--set", "latency.source=profile"], 3, "needs a profile"),
        (["--space", "space.json", "--out", "space.json/profile.json"], 6, "cannot create"),
        (["--space", "space.json", "--out", "."], 2, "is a folder"),
    ):
        arguments = [str(tmp_path / word) if word.endswith(".json") else word for word in arguments]
        assert main(["profile", "--device", "cpu", "--out", out, *arguments]) == code
        told = capsys.readouterr().err
        assert cause in told
        assert "remedy: " in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.json", "space.json"]


def test_a_disturbed_measurement_is_taken_again_at_the_end(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, disturbed = profiling.measure_decode, [2, 3]

    def measure(*arguments: Any, **options: Any) -> Any:
        if len(fake.calls) in disturbed:
            raise Disturbed("somebody was here", disturbed.pop(0) and "wait")
        return whole(*arguments, **options)

    monkeypatch.setattr(profiling, "measure_decode", measure)
    said: list[str] = []
    profile = measure_profile(config_of(), tmp_path / "profile.json", CPU, 12, said.append)
    assert [line for line in said if "somebody" in line] == ["put off: somebody was here"] * 2
    assert profile.error is not None
    assert profile.error.worst < 1e-6
    assert len(fake.calls) == len(profile.chains) + 12

    fake.calls.clear()
    disturbed[:] = [0] * 1000
    with pytest.raises(Disturbed):
        measure_profile(config_of(), tmp_path / "busy.json", CPU, 12, said.append)
    assert not (tmp_path / "busy.json").exists()
