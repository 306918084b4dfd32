"""Tables and pictures, also of runs with nothing in them and names that mean harm."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from archsearch.report import csv_text, table, write_report
from archsearch.report.files import make_picture
from archsearch.report.picture import Picture, Point, draw
from tests.kits.runs import fake_evaluations, make_run


def pixels(path: Path) -> set[tuple[int, ...]]:
    """The colours of a picture."""
    with Image.open(path) as image:
        assert image.size == (1440, 900)
        colours = image.convert("RGB").getcolors(2**21)
    assert colours is not None
    return {colour for _, colour in colours}


@pytest.mark.parametrize(
    "objectives",
    ["[loss, decode_latency]", "[loss]", "[state_bytes, parameters]", "[loss, decode_latency, parameters]"],
)
def test_report_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: str) -> None:
    fake_evaluations(monkeypatch)
    run = make_run(tmp_path / "r", f"search.objectives={objectives}", "search.evaluations=8")
    results = run.results()
    paths = write_report(results.config, results.candidates, results.reference, tmp_path)
    assert [path.name for path in paths] == ["pareto.csv", "pareto.png", "hypervolume.png"]
    rows = list(csv.DictReader(paths[0].open()))
    assert [int(row["number"]) for row in rows] == [candidate.number for candidate in results.front]
    assert (11, 110, 153) in pixels(paths[1])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hypervolume.png", "pareto.csv", "pareto.png", "r"]


def test_seeds_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluations(monkeypatch)
    results = make_run(tmp_path / "r").results()
    frame = table(results.config, results.candidates)
    assert frame.loc[frame["seed"], "notation"].tolist() == [results.candidates[0].architecture.notation]
    picture = make_picture(results.config, results.candidates, results.reference)
    assert [point.number for point in picture.points if point.seed] == frame.loc[frame["seed"], "number"].tolist()
    assert {point.number for point in picture.points if point.on_front} == {c.number for c in results.front}
    assert f"{len(results.front)} on the front; hypervolume {results.hypervolume:.4g}" in picture.subtitle


def test_a_run_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluations(monkeypatch)
    config = make_run(tmp_path / "r", "search.evaluations=1").config
    paths = write_report(config, [], None, tmp_path)
    assert paths[0].read_text() == "on_front,seed\n"
    assert len(pixels(paths[1])) > 1


@pytest.mark.parametrize("name", ["$\\frac{$", "[/]", "<script>", "% \\ ^ _ {"])
def test_names_are_not_read_as_formulas(tmp_path: Path, name: str) -> None:
    points = [Point(0, 1.0, 1.0, True, True), Point(1, 900.0, 2.0, False, False)]
    draw(Picture(points, name, name, name, name), tmp_path / "x.png")
    assert (217, 130, 43) in pixels(tmp_path / "x.png")


def test_csv_holds_no_formulas() -> None:
    frame = pd.DataFrame({"text": ["=1+1", "+1", "-1", "@x", "\tx", "x=1", ""], "number": [-1.5, 2, 3, 4, 5, 6, -7]})
    rows = list(csv.reader(io.StringIO(csv_text(frame))))[1:]
    assert [row[0] for row in rows] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "x=1", ""]
    assert float(rows[0][1]) == -1.5
