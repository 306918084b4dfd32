"""The search benchmark: bad tables, small spaces, records, and the invented spaces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from archsearch.errors import ConfigError, InvalidArchitecture
from benchmarks import search
from benchmarks.formulas import FORMULAS
from benchmarks.tables import ProblemEvaluator, coverage, load_table

HEAD = "g1,g2,error,cost"
ROWS = [f"{a},{b},{(a - 2) ** 2 + b},{a + 2 * b + 0.1}" for a, b in itertools.product(range(4), range(4))]


def write(path: Path, *rows: str, head: str = HEAD) -> str:
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["search", *map(str, words)])
    code = search.main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("head", "change", "message"),
    [
        (HEAD, lambda row: row.replace("3,", ",", 1) if row.startswith("3,") else row, "gene is missing"),
        (HEAD, lambda row: row.rsplit(",", 1)[0] + ",7", "cost is constant"),
        (
            HEAD,
            lambda row: row.rsplit(",", 1)[0] + (",nan" if row.startswith("0,0") else ",1"),
            "number in 1 of 16 rows, first in row 1",
        ),
        (HEAD, lambda row: row.rsplit(",", 1)[0] + (",inf" if row.startswith("0,0") else ",1"), "no finite number"),
        (HEAD, lambda row: row.rsplit(",", 1)[0] + ",fast", "no finite number"),
        (HEAD, lambda row: "1" + row[1:], "12 rows share all of the genes (g1, g2)"),
        ("g1,g2,error,price", lambda row: row, "no column 'cost'"),
        ("error,cost,g1,g2", lambda row: row, "no gene columns found: the first, 'error', is an objective"),
    ],
    ids=["missing gene", "constant", "nan", "infinite", "text", "twice", "no column", "no genes"],
)
def test_bad_tables_are_refused(tmp_path, monkeypatch, capsys, head, change, message) -> None:
    table = write(tmp_path / "table.csv", *map(change, ROWS), head=head)
    code, out, err = run(capsys, monkeypatch, "--table", table, "--objectives", "error,cost", "--json", tmp_path / "r")
    assert (code, out) == (3, "")
    assert message in err
    assert "remedy: " in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", [[], ["--table", "t.csv"], ["--table", "t.csv", "--formula", "rugged"]])
def test_what_is_searched_must_be_clear(monkeypatch, capsys, words) -> None:
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 3
    assert "remedy: " in err


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ConfigError, match="cannot read"):
        load_table(str(tmp_path / "empty.csv"), ("error", "cost"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_table(str(tmp_path / "absent.csv"), ("error", "cost"))


@pytest.mark.parametrize("label", ["aging", "nsga2", "random"])
def test_a_space_smaller_than_population_and_budget_is_found_whole(tmp_path: Path, label: str) -> None:
    task = search.Task(write(tmp_path / "table.csv", *ROWS), ("error", "cost"))
    curve, _ = search.Job(task, label, seed=0, evaluations=500).run()
    assert len(curve) <= len(ROWS)
    assert curve == sorted(curve)
    if label == "aging":  # the others may give up after many repeats in a row
        assert (len(curve), curve[-1]) == (16, pytest.approx(1.0))


def test_rows_may_be_missing(tmp_path: Path) -> None:
    table = load_table(write(tmp_path / "table.csv", *ROWS[:7]), ("error", "cost"))
    with pytest.raises(InvalidArchitecture, match="no such row"):
        table.space.build({"g1": 1, "g2": 3})
    curve, _ = search.Job(search.Task(str(tmp_path / "table.csv"), ("error", "cost")), "aging", 0, 500).run()
    assert (len(curve), curve[-1]) == (7, pytest.approx(1.0))


def test_a_table_of_few_combinations_needs_a_word(tmp_path, monkeypatch, capsys) -> None:
    rng, genes = np.random.default_rng(0), [f"g{i}" for i in range(26)]
    rows = [[*genome, sum(genome), 26 - sum(genome[:5])] for genome in rng.integers(0, 3, (200, 26)).tolist()]
    path = write(tmp_path / "table.csv", *(",".join(map(str, row)) for row in rows), head=",".join([*genes, "a", "b"]))
    words = ["--table", path, "--objectives", "a,b", "--algorithms", "aging,tpe", "--evaluations", 30, "--seeds", 1]
    code, out, err = run(capsys, monkeypatch, *words)
    assert (code, out) == (3, "")
    assert "holds 200 of 2.54e+12 combinations of its 26 genes" in err
    code, out, _ = run(capsys, monkeypatch, *words, "--nearest")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["aging", "@30"], ["tpe", "@30"]]
    assert "ended" not in out
    table = load_table(path, ("a", "b"), (), True)
    for row in (0, 7):
        genome = [*rows[row][:25], (rows[row][25] + 1) % 3]
        found = table.objectives(table.space.build(dict(zip(genes, genome, strict=True))))
        assert found == tuple(rows[row][26:])


def test_what_ended_early_says_so(tmp_path, monkeypatch, capsys) -> None:
    words = ["--table", write(tmp_path / "table.csv", *ROWS), "--objectives", "error,cost", "--seeds", 1]
    code, out, _ = run(capsys, monkeypatch, *words, "--algorithms", "aging", "--evaluations", 30)
    assert code == 0
    assert "@30 1.0000" in out
    assert "a search ended after 16" in out


def test_where_to_write_is_known_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    words = ["--table", write(tmp_path / "table.csv", *ROWS), "--objectives", "error,cost"]
    for option in ("--json", "--png", "--curves"):
        code, out, err = run(capsys, monkeypatch, *words, option, tmp_path / "absent" / "file")
        assert (code, out) == (3, "")
        assert "is no folder" in err


def test_three_objectives(tmp_path: Path) -> None:
    rows = [f"{row},{index * 7 % 16}" for index, row in enumerate(ROWS)]
    task = search.Task(write(tmp_path / "table.csv", *rows, head=HEAD + ",size"), ("error", "cost", "size"))
    curve, _ = search.Job(task, "aging", 0, 16).run()
    assert curve[-1] == pytest.approx(1.0)


def test_records_are_joined_and_others_refused(tmp_path, monkeypatch, capsys) -> None:
    table = write(tmp_path / "table.csv", *ROWS)
    common = ["--table", table, "--objectives", "error,cost", "--evaluations", 12, "--seeds", 2]
    one, two, both = (tmp_path / name for name in ("one.json", "two.json", "both.json"))
    assert run(capsys, monkeypatch, *common, "--algorithms", "aging", "--json", one)[0] == 0
    assert run(capsys, monkeypatch, *common, "--algorithms", "random", "--merge", one, "--json", two)[0] == 0
    code, out, _ = run(capsys, monkeypatch, *common, "--algorithms", "", "--merge", one, two, "--json", both)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["aging", "random"]
    results = json.loads(both.read_text())["results"]
    assert [(r["algorithm"], r["seeds"], r["evaluations"], len(r["mean"])) for r in results] == [
        ("aging", 2, 12, 12),
        ("random", 2, 12, 12),
    ]
    swapped = ["--table", table, "--objectives", "cost,error", "--algorithms", "", "--merge", one]
    code, _, err = run(capsys, monkeypatch, *swapped)
    assert code == 3
    assert "differs in objectives" in err
    code, _, err = run(capsys, monkeypatch, *common, "--merge", table)
    assert code == 3
    assert "is no record" in err


def test_coverage_counts_what_was_evaluated(tmp_path: Path) -> None:
    table = load_table(write(tmp_path / "table.csv", *ROWS), ("error", "cost"))
    evaluator = ProblemEvaluator(table)
    for genome in itertools.product(range(4), range(4)):
        evaluator(table.space.build(dict(zip(("g1", "g2"), genome, strict=True))), seed=0)
    curve = coverage(table, evaluator.points)
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(1.0)
    assert coverage(table, [(4.0 + 3, 9.1)]) == [0.0]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_spaces_of_26_genes_with_a_known_front(name: str) -> None:
    problem, rng = FORMULAS[name], np.random.default_rng(0)
    assert len(problem.space.genes) == 26
    points = []
    while len(points) < 100:
        identity = problem.space.identity(genome := problem.space.sample(rng))
        if identity is not None:
            points.append(problem.objectives(problem.space.build(genome)))
            assert problem.objectives(problem.space.build(genome)) == points[-1]
    low, _ = problem.bounds
    # No survey of 4.5e13 genomes is complete.
    assert (np.array(points) > 0.98 * low).all()
    assert 0.6 < coverage(problem, points)[-1] < 0.96


def test_finished_searches_are_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    common = ["--table", write(tmp_path / "table.csv", *ROWS), "--objectives", "error,cost", "--algorithms", "aging"]
    curves, record = tmp_path / "curves.jsonl", tmp_path / "record.json"
    assert run(capsys, monkeypatch, *common, "--evaluations", 12, "--seeds", 2, "--curves", curves)[0] == 0
    first = curves.read_text()
    curves.write_text(first + first[:40])  # a line that a kill cut short
    words = [*common, "--evaluations", 10, "--seeds", 3, "--curves", curves, "--json", record]
    assert run(capsys, monkeypatch, *words)[0] == 0
    found = [json.loads(line) for line in first.splitlines()]
    assert {tuple(line["key"]) for line in found} == {("table.csv", "error", "cost", "aging", seed) for seed in (0, 1)}
    result = json.loads(record.read_text())["results"][0]
    assert (result["seeds"], len(result["mean"])) == (3, 10)
    fresh = [search.Job(search.Task(common[1], ("error", "cost")), "aging", seed, 10).run()[0] for seed in range(3)]
    np.testing.assert_allclose(result["mean"], np.mean(fresh, axis=0), atol=1e-5)
    assert curves.read_text().startswith(first + first[:40] + "\n")
    assert len(curves.read_text().splitlines()) == 4  # the third seed was all that was missing


def test_foreign_curves_are_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "foreign.jsonl").write_text('{"loss": 1}\n')
    table = write(tmp_path / "table.csv", *ROWS)
    words = ["--table", table, "--objectives", "error,cost", "--curves", tmp_path / "foreign.jsonl"]
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 3
    assert "holds no searches" in err
