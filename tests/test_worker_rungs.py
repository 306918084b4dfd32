"""A candidate between rungs: stopped, killed and continued, without a shared disk; and its recall."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from archsearch import worker
from archsearch.config import ProxyConfig, SearchConfig
from archsearch.evaluation import Evaluation, Outcome
from archsearch.proxy import checkpoint, rungs
from archsearch.stopping import Forecast, StoppingRule
from archsearch.worker import ProxyEvaluator
from tests.test_worker import CANDIDATE, config_of

PROXY: dict[str, Any] = {"batch": 4, "context": 64, "validation_tokens": 512, "validations": 1}
RUNGS = {**PROXY, "rungs": [256, 512, 1024]}
LOSS_ONLY = SearchConfig(objectives=("loss",))


def strict(tokens: int) -> StoppingRule:
    """Stops everybody at one rung."""
    forecast = Forecast(weights=(0.0, 1.0), width=0.0, inverse=((0.0, 0.0),) * 2)
    return StoppingRule(objectives=("loss",), front=((3, (0.5,)),), forecasts={tokens: forecast})


def evaluate(
    proxy: dict[str, Any],
    weights: Path | None = None,
    checkpoints: Path | None = None,
    rule: StoppingRule | None = None,
) -> Evaluation:
    config = config_of(search=LOSS_ONLY, proxy=ProxyConfig.model_validate(proxy))
    folders = [str(path) if path else None for path in (weights, checkpoints)]
    return ProxyEvaluator(config, *folders)(CANDIDATE, seed=5, stopping=rule)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return evaluate(RUNGS)


def test_rungs_do_not_change_a_training(whole: Evaluation) -> None:
    assert whole.ok, whole.error
    assert [rung.tokens for rung in whole.rungs] == [256, 512]
    losses = dict(whole.curve)
    assert [rung.objectives["loss"] for rung in whole.rungs] == [losses[256], losses[512]]
    assert whole.rungs[0].objectives["parameters"] == CANDIDATE.parameters
    without = evaluate({**PROXY, "tokens": 1024})
    assert without.objectives == whole.objectives
    assert without.rungs == ()


def test_the_dominated_stop_with_what_they_showed(whole: Evaluation, tmp_path: Path) -> None:
    found = evaluate(RUNGS, weights=tmp_path, rule=strict(512))
    assert found.outcome is Outcome.STOPPED
    assert found.rungs == whole.rungs
    assert found.curve == tuple(point for point in whole.curve if point[0] <= 512)
    assert found.verdict is not None
    assert (found.verdict.tokens, found.verdict.dominated_by) == (512, 3)
    assert found.verdict.expected == found.rungs[-1].objectives["loss"]
    assert found.error.startswith("stopped after 512 tokens: ")
    assert "trial 3" in found.error
    assert found.metrics["proxy_tokens"] == 512
    assert found.objectives == {}
    assert list(tmp_path.iterdir()) == []


def test_a_killed_candidate_goes_on_from_its_last_rung(
    whole: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = rungs.Judge.__call__

    def killed(self: rungs.Judge, tokens: int, loss: float) -> bool:
        if tokens == 512:
            raise KeyboardInterrupt
        return judge(self, tokens, loss)

    monkeypatch.setattr(rungs.Judge, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(RUNGS, checkpoints=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [f"{CANDIDATE.id}.safetensors"]
    found = evaluate(RUNGS, checkpoints=tmp_path)
    assert found.metrics["resumed_at"] == 512
    assert (found.objectives, found.curve, found.rungs) == (whole.objectives, whole.curve, whole.rungs)
    stopped = evaluate(RUNGS, checkpoints=tmp_path, rule=strict(512))
    assert stopped.outcome is Outcome.STOPPED
    assert stopped.rungs == whole.rungs


def test_a_checkpoint_that_does_not_fit_is_replaced_and_told(whole: Evaluation, tmp_path: Path) -> None:
    (tmp_path / f"{CANDIDATE.id}.safetensors").write_bytes(b"torn")
    found = evaluate(RUNGS, checkpoints=tmp_path)
    assert found.objectives == whole.objectives
    assert found.metrics["checkpoint"].startswith("not used: ")
    assert "resumed_at" not in found.metrics


def test_a_worker_without_the_run_folder_says_so(whole: Evaluation, tmp_path: Path) -> None:
    found = evaluate(RUNGS, tmp_path / "gone", tmp_path / "away")
    assert found.objectives == whole.objectives
    note = "not kept: the run folder is not on this machine"
    assert (found.paths["weights"], found.paths["checkpoint"]) == (note, note)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_nothing_against_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    found = evaluate(PROXY | {"tokens": 1024}, weights=tmp_path)
    assert (found.outcome, set(found.objectives)) == (Outcome.OK, {"loss"})
    assert found.paths["weights"].startswith("not kept: cannot write ")
    assert "No space left" in found.paths["weights"]
    assert list(tmp_path.iterdir()) == []


RECALL = {
    "context": 16, "pairs": [1, 2], "vocab_size": 8, "tokens": 256, "batch": 4, "test_sequences": 8,
}  # fmt: skip


def test_recall_is_an_objective_known_at_every_rung() -> None:
    search = SearchConfig(objectives=("loss", "recall"))
    config = config_of(search=search, proxy=ProxyConfig.model_validate({**RUNGS, "recall": RECALL}))
    found = ProxyEvaluator(config)(CANDIDATE, seed=5)
    assert found.ok, found.error
    assert set(found.objectives) == {"loss", "recall"}
    assert found.objectives["recall"] == found.metrics["recall"]["error"]
    assert set(found.metrics["recall"]["accuracy"]) == {"1", "2"}
    assert found.seconds["recall"] > 0
    assert all(rung.objectives["recall"] == found.objectives["recall"] for rung in found.rungs)


def test_recall_above_the_limit_is_infeasible_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_train", lambda *arguments: pytest.fail("it was trained"))
    proxy = ProxyConfig.model_validate({**PROXY, "recall": RECALL})
    found = ProxyEvaluator(config_of({"recall": 0.01}, search=LOSS_ONLY, proxy=proxy))(CANDIDATE, seed=5)
    assert found.outcome is Outcome.INFEASIBLE
    assert "is above the limit 0.01; widen space.limits.recall" in found.error
    assert "recall" in found.metrics
