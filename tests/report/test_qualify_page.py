"""The page of a qualification: what the report says, whatever is missing in it, and never a word executed."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.report.measured_figures import measured_figures
from crosschip.report.qualification import ReportError, measurements
from crosschip.report.qualify_page import page_beside, qualification_page, write_qualification_page
from tests.report.qualifications import MEASURED, NUM_DRAWN, finding, qualification
from tests.report.test_run_page import HOSTILE, PageReader


def read(report: dict[str, Any]) -> tuple[str, PageReader, str]:
    page = qualification_page(report)
    reader = PageReader()
    reader.feed(page)
    return re.sub(r"\s+", " ", "".join(reader.text)), reader, page


WHOLE = qualification(
    finding("FAIL", reproducer="mm.py", critical=True, details={"num_draws": 34}),
    finding("PASS WITH LIMITS", "aten.exp.default"),
    measured=MEASURED,
)


def test_the_whole_report_is_told_and_drawn() -> None:
    text, page, raw = read(WHOLE)
    assert "Ascend910B2 (npu:0) to train first" in text
    assert text.index("aten.mm.default is off") < text.index("aten.exp.default is off")
    assert "mm.py" in text
    assert "operators: something else" in text
    assert "cases: 2 of 10, for lack of time" in text
    assert page.tags.count("svg") == NUM_DRAWN
    assert "slope 0.025 MB per s" in text
    assert "fit: 40 µs + bytes / 2 GB/s" in text
    assert "never" in text  # an entry that nobody has heard of is a table
    assert '{"a": [1, 2]}' in text
    for measured in ("mm 6.1 (5.49 to 6.71)", "4 queries, 1024 keys: 3.7"):
        assert measured in text  # the drawings' descriptions hold their numbers
    assert "<text" in raw


def test_the_page_is_one_file_and_its_ids_are_unique() -> None:
    _, page, raw = read(WHOLE)
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', raw) == []
    assert re.findall(r"url\((?!#)[^)]*\)", raw) == []
    assert "@import" not in raw
    assert len(page.ids) == len(set(page.ids))
    assert len(re.findall("default-src 'none'", raw)) == 1


def hostile(value: Any) -> Any:
    """Every text of a document made hostile; numbers, and the words that the page goes by, are kept."""
    kept = {"qualification", "train", "FAIL", "PASS", "PASS WITH LIMITS", "loss curve", "bandwidth", "series", "fail"}
    kept |= {"gradient norm ratio", "complete", "equivalence"}
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"{value}{HOSTILE} $x^{{2$ \x07" if isinstance(value, str) and value not in kept else value


def test_hostile_text_stays_text() -> None:
    text, page, _ = read(hostile(copy.deepcopy(WHOLE)))
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("svg") >= NUM_DRAWN - 1
    assert text.count("<script>") > 20


def test_an_interrupted_report_and_a_missing_chip() -> None:
    text, *_ = read(qualification(complete=False))
    assert "INCONCLUSIVE; interrupted" in text
    missing = qualification(finding("INCONCLUSIVE", "chip npu"), model_name=None, dtype=None, chip="npu")
    missing.update(trace=None)
    for exam in missing["exams"]:
        exam["ended"] = "not run"
    text, *_ = read(missing)
    assert "the exam did not come to its end (not run)" in text
    assert "The chip gave no fingerprint" in text


@pytest.mark.parametrize("key", ["exams", "findings", "trace", "fingerprint", "tier", "time_s", "complete", "began"])
@pytest.mark.parametrize("value", [None, 3, "words", [], [3], {}, [{}]])
def test_a_damaged_part_never_ends_the_page(key: str, value: Any) -> None:
    read({**qualification(finding("FAIL")), key: value})


HUGE = 10**400  # an integer that JSON may hold and no float can


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, 1e308, 1e-320, float("nan"), float("inf"), [], "\ud800\x1b"], ids=lambda each: repr(each)[:9]
)
@pytest.mark.parametrize("place", ["time_s", "num_checks", "verdict", "measured"])
def test_a_number_that_is_none_never_ends_the_page(place: str, value: Any) -> None:
    report = qualification(finding("FAIL"))
    report["time_s"] = value if place == "time_s" else 1.0
    report["findings"][0]["measured"] = value
    for exam in report["exams"]:
        exam |= {"time_s": value} | ({place: {"a": value} if place == "num_checks" else value})
    read(report)


@pytest.mark.parametrize("value", [HUGE, 1e308], ids=["integer", "float"])
@pytest.mark.parametrize(("exam", "key"), [(exam, key) for exam in MEASURED for key in MEASURED[exam][0]])
def test_a_number_too_large_to_be_drawn_is_left_for_the_table(exam: str, key: str, value: Any) -> None:
    drawn = copy.deepcopy(MEASURED[exam][0])
    drawn[key] = [value, *drawn[key][1:]] if isinstance(drawn[key], list) else value
    read(qualification(measured={exam: [drawn]}))


def test_what_cannot_be_drawn_is_said_and_stays_in_the_table() -> None:
    broken = [
        {"plot": "series", "title": "A", "x": [1, 2], "y": [1.0]},
        {"plot": "bandwidth", "sizes_bytes": [0, 1], "seconds": [1.0, 1.0]},
        {"kind": "loss curve", "steps": [1], "chip": [float("nan")], "reference": [1.0]},
        {"operator": "x", "ratio": None, "lower": 1.0, "upper": 1.0},
    ]
    found = measured_figures([("e", entry) for entry in broken])
    assert (found.figures, len(found.rest), len(found.notes)) == ([], 4, 4)
    assert "not drawn, because numbers are missing" in read(qualification(measured={"e": broken}))[0]


def test_pairs_of_time_and_value_are_drawn_with_their_slope() -> None:
    pairs = [[0.0, 8e8], [60.0, None], [120.0, 9e8]]
    memory = {"check": "memory", "what": "allocated", "bytes_per_hour": 3.6e9, "series": pairs}
    sensors = {"check": "sensors", "clock_mhz": [[0, 1400.0], [5, 1395.0]], "power_w": None}
    found = measured_figures([("stability", memory), ("stability", sensors)])
    assert [figure.title for figure in found.figures] == ["memory: allocated", "sensors: clock_mhz"]
    assert "from 800 at 0 s to 900 at 120 s" in found.figures[0].svg
    assert ("key key-mark", "slope 1 MB per s") in found.figures[0].keys
    assert [entry for _, entry in found.rest] == [memory, sensors]


def test_the_worst_call_of_an_operator_is_the_one_drawn() -> None:
    figures = measured_figures(measurements(WHOLE)).figures
    assert "mm 6.1" in figures[0].svg
    assert "mm 0.97" not in figures[0].svg


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schema_version": 2}, "schema version 2, this crosschip reads up to 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"document": "plan"}, "no qualification report: it is 'plan'"),
        ({"verdict": "GOOD"}, "verdict 'GOOD'"),
    ],
)
def test_what_is_no_report_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ReportError) as caught:
        qualification_page({**qualification(), **changed})
    assert words in caught.value.problem
    assert caught.value.remedy


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[Path, Path]:
    """A report of an earlier examination and its page, which says PASS."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps(qualification()))
    page = write_qualification_page(report)
    assert page is not None
    return report, page


def test_while_a_report_is_made_no_page_of_another_one_is_beside_it(earlier: tuple[Path, Path]) -> None:
    report, page = earlier
    with page_beside(report):
        assert (report.exists(), page.exists()) == (True, False)
        report.write_text(json.dumps(qualification(finding("FAIL"))))
    assert "aten.mm.default is off" in page.read_text()


def test_an_interrupted_report_has_its_own_page(earlier: tuple[Path, Path]) -> None:
    report, page = earlier

    def examine() -> None:
        with page_beside(report):
            report.write_text(json.dumps(qualification(complete=False)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine()
    assert "INCONCLUSIVE; interrupted" in re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page.read_text()))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_where_nothing_was_written_what_was_there_stays(earlier: tuple[Path, Path], content: str | None) -> None:
    """Also what is no report and no page of one."""
    report, page = earlier
    if content is not None:
        report.write_text(content)
    before = report.read_text(), page.read_text()
    with pytest.raises(ValueError, match="refused"), page_beside(report):
        raise ValueError("refused")
    assert (report.read_text(), page.read_text()) == before
    assert sorted(report.parent.iterdir()) == sorted([report, page])


def test_the_page_of_a_report_that_stays_is_put_back_and_not_written_anew(earlier: tuple[Path, Path]) -> None:
    """Writing it anew could end in the middle."""
    report, page = earlier
    page.write_bytes(b"<p>\xff</p>")
    before = page.stat().st_ino
    with pytest.raises(ValueError, match="refused"), page_beside(report):
        raise ValueError("refused")
    assert (page.stat().st_ino, page.read_bytes()) == (before, b"<p>\xff</p>")


def test_what_a_killed_examination_put_aside_is_never_shown(earlier: tuple[Path, Path]) -> None:
    report, page = earlier
    page.rename(page.with_name(f".{page.name}.old"))
    with pytest.raises(ValueError, match="refused"), page_beside(report):
        raise ValueError("refused")
    assert list(report.parent.iterdir()) == [report]


def test_bad_usage_of_qualify_leaves_an_earlier_report_and_its_page(earlier: tuple[Path, Path]) -> None:
    report, page = earlier
    before = report.read_text(), page.read_text()
    command = ["qualify", "--model", str(report.parent / "nothing"), "--chip", "cpu", "--json", str(report)]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2, ended.output
    assert (report.read_text(), page.read_text()) == before


def test_a_page_that_could_not_be_written_is_refused_before_the_examination(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    ended = CliRunner().invoke(app, ["qualify", "--model", "nothing", "--json", str(tmp_path / "report.json")])
    assert ended.exit_code == 2, ended.output
    assert "report.html: it is a directory" in ended.stderr
