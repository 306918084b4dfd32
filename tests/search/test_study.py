"""The study on disk: what Optuna reads of it, what is refused, and that nothing refused is touched."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from archsearch.config import RunConfig
from archsearch.errors import ArchsearchError, ConfigError, StorageError
from archsearch.evaluation import Outcome
from archsearch.search.database import journal_mode, wal_is_safe
from archsearch.search.folder import RunFolder
from archsearch.search.ledger import Ledger
from archsearch.search.loop import run_search
from archsearch.search.progress import Standing, hypervolume_reference
from archsearch.search.samplers import make_sampler
from archsearch.search.study import candidates, dataframe, front, hypervolume, open_study
from archsearch.search.study import hypervolume_reference as stored_reference
from tests.search.fakes import SPACE, FakeEvaluator, FaultyEvaluator, make_config, objectives_of

OBJECTIVES = ("loss", "decode_latency")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=12))
    run_search(folder, FaultyEvaluator("nan", digits="012"))
    return folder


def test_the_study_reads_back_as_it_was_written(folder: RunFolder) -> None:
    found = candidates(open_study(folder), folder)
    assert [c.number for c in found] == list(range(12))
    for candidate in found:
        assert candidate.architecture is not None
        assert candidate.evaluation is not None
        assert (
            folder.config.space.build(candidate.genome) == candidate.architecture == candidate.evaluation.architecture
        )
        assert candidate.outcome is candidate.evaluation.outcome
        expected = Outcome.NAN if candidate.architecture.id[0] in "012" else Outcome.OK
        assert candidate.outcome is expected
        if expected is Outcome.OK:
            assert candidate.evaluation.objectives == objectives_of(candidate.architecture)
    assert {c.outcome for c in found} == {Outcome.OK, Outcome.NAN}


def test_the_front_is_what_no_candidate_dominates(folder: RunFolder) -> None:
    found = candidates(open_study(folder), folder)
    points = {c.number: [c.evaluation.objectives[n] for n in OBJECTIVES] for c in found if c.outcome is Outcome.OK}
    expected = {
        number
        for number, point in points.items()
        if not any(all(a <= b for a, b in zip(o, point, strict=True)) and o != point for o in points.values())
    }
    chosen = front(found, OBJECTIVES)
    assert {c.number for c in chosen} == expected
    losses = [points[c.number][0] for c in chosen]
    assert losses == sorted(losses)


def test_the_hypervolume_is_that_of_the_last_progress(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=12))
    summary = run_search(folder, FakeEvaluator())
    study = open_study(folder)
    reference = stored_reference(study)
    found = candidates(study, folder)
    assert reference is not None
    assert hypervolume(found, OBJECTIVES, reference) == pytest.approx(summary.progress.hypervolume)
    first = [[c.evaluation.objectives[n] for n in OBJECTIVES] for c in found[:6] if c.evaluation]
    assert reference == pytest.approx([1.1 * max(column) for column in zip(*first, strict=True)])


def test_optuna_reads_the_file_as_its_own(folder: RunFolder) -> None:
    study = optuna.load_study(study_name="archsearch", storage=folder.study_url)
    assert study.metric_names == list(OBJECTIVES)
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == sum(c.outcome is Outcome.OK for c in candidates(open_study(folder), folder))
    assert {t.number for t in study.best_trials} == {
        c.number for c in front(candidates(open_study(folder), folder), OBJECTIVES)
    }
    assert all(t.distributions.keys() == folder.config.space.genes.keys() for t in study.trials)
    assert all(t.datetime_start <= t.datetime_complete for t in complete)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_memory_and_file_hold_the_same_trials(tmp_path: Path, sampler: str) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=14, sampler=sampler))
    run_search(folder, FaultyEvaluator("nan", digits="01"))
    ledger = Ledger(folder.config, folder)
    again = Ledger(folder.config, folder)
    assert ledger.trials == again.trials
    number = ledger.propose(make_sampler(folder.config)(99, False)).number
    ledger.enter(number, {"architecture": "x", "attempts": 1})
    ledger.note(number, {"attempts": 2})
    ledger.finish(number, Outcome.OK, [1.0, 2.0])
    stored = Ledger(folder.config, folder).trials[number]
    kept = ledger.trials[number]
    for name in ("number", "state", "params", "distributions", "values", "user_attrs", "system_attrs"):
        assert getattr(stored, name) == getattr(kept, name)
    assert (stored.datetime_start, stored.datetime_complete) == (kept.datetime_start, kept.datetime_complete)


def test_the_table_has_a_row_a_candidate(folder: RunFolder) -> None:
    table = dataframe(candidates(open_study(folder), folder))
    assert list(table["number"]) == list(range(12))
    assert table["gene.hidden_size"].isin(SPACE["hidden_size"]).all()
    assert table.loc[table["outcome"] == "OK", "objective.loss"].notna().all()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(bytes(data))


def _foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE cats (name)")
    connection.close()


def _other_study(path: Path) -> None:
    path.unlink()
    optuna.create_study(study_name="cats", storage=f"sqlite:///{path}")


def _newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE study_user_attributes SET value_json = '99' WHERE key = 'schema_version'")
    connection.commit()
    connection.close()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no database, whatever its name says"),
    "truncated": _truncate,
    "overwritten": _flip,
    "foreign": _foreign,
    "other study": _other_study,
    "newer": _newer,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_study_is_refused_and_left_alone(folder: RunFolder, damage: str) -> None:
    DAMAGES[damage](folder.study_path)
    before = digest(folder.study_path) if folder.study_path.exists() else None
    with pytest.raises(StorageError) as error:
        run_search(RunFolder.open(folder.path), FakeEvaluator())
    assert error.value.exit_code == 6
    assert "study.db" in error.value.cause
    assert "\n" not in error.value.cause + error.value.remedy
    if damage != "newer":
        with pytest.raises(StorageError):
            open_study(folder)
    assert (digest(folder.study_path) if folder.study_path.exists() else None) == before


def _config(**search: Any) -> RunConfig:
    return make_config(evaluations=12, **search)


@pytest.mark.parametrize(
    "changed",
    [
        make_config(space={**SPACE, "hidden_size": [64, 96]}, evaluations=12),
        _config(objectives=["loss", "parameters"]),
        RunConfig.model_validate({**_config().model_dump(), "proxy": {"tokens": "1M"}}),
    ],
    ids=["space", "objectives", "proxy"],
)
def test_a_resume_refuses_what_would_make_results_incomparable(folder: RunFolder, changed: RunConfig) -> None:
    changed.save(folder.config_path)
    before = digest(folder.study_path)
    with pytest.raises(ConfigError) as error:
        run_search(RunFolder.open(folder.path), FakeEvaluator())
    assert error.value.exit_code == 3
    assert digest(folder.study_path) == before


def test_a_resume_may_have_a_larger_budget(folder: RunFolder) -> None:
    make_config(evaluations=15).save(folder.config_path)
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == 15


def test_a_read_only_study_can_be_read(folder: RunFolder) -> None:
    folder.study_path.chmod(0o444)
    folder.path.chmod(0o555)
    try:
        assert len(candidates(open_study(folder), folder)) == 12
    finally:
        folder.path.chmod(0o755)


def test_a_missing_evaluation_is_named(folder: RunFolder) -> None:
    folder.evaluation_path(4).unlink()
    with pytest.raises(ArchsearchError, match="0004"):
        candidates(open_study(folder), folder)


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
    ],
)
def test_wal_only_where_sqlite_is_mended(version: tuple[int, int, int], safe: bool) -> None:
    assert wal_is_safe(version) is safe


def test_the_journal_mode_is_in_force(folder: RunFolder) -> None:
    connection = sqlite3.connect(folder.study_path)
    assert connection.execute("PRAGMA journal_mode").fetchone()[0].upper() == journal_mode(folder.study_path)
    connection.close()


def test_the_reference_is_a_tenth_worse_than_the_worst() -> None:
    assert hypervolume_reference([(1.0, -2.0), (3.0, -4.0)]) == pytest.approx((3.3, -1.8))
    assert hypervolume_reference([(0.0,), (0.0,)]) == (1.0,)


def test_standing_fixes_its_reference_once() -> None:
    standing = Standing(make_config(evaluations=10).search)
    for number in range(5):
        standing.add(number, f"a{number}", (5.0 - number, 1.0 + number))
    assert standing.hypervolume is None
    standing.add(5, "failed", None)
    assert standing.reference == pytest.approx((5.5, 5.5))
    before = standing.hypervolume
    standing.add(6, "bad", (50.0, 50.0))
    assert (standing.reference, standing.hypervolume) == (pytest.approx((5.5, 5.5)), before)
    assert (standing.done, standing.failed, standing.front_size, standing.best) == (7, 1, 5, 1.0)
