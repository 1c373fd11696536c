"""Which chip, and on what grounds: only what passed and was measured decides; everything else is said to be open."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.plan.document import SCHEMA_VERSION
from crosschip.qualify.programme import EXAMS
from crosschip.qualify.serving.examination import PROBES
from crosschip.report.compare import compare
from crosschip.report.compare_page import compare_markdown, compare_page
from crosschip.report.compared_files import NEWEST_PLAN, read_compared
from crosschip.report.qualification import ReportError, read_report
from crosschip.report.thoroughness import LONGER_EXAMS, SERVING_PROBES, SMOKE_EXAMS
from tests.report.qualifications import MEASURED, finding, qualification, speed
from tests.report.test_run_page import HOSTILE, PageReader

ROOT = Path(__file__).parent.parent.parent
ASCEND = {"chip": "npu:0", "model_name": "Ascend910B2"}
H20 = {"chip": "cuda:0", "model_name": "NVIDIA H20"}
H200 = {"chip": "cuda:0", "model_name": "NVIDIA H200"}


def answer(role: str, *reports: dict[str, Any], plans: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    document = compare({f"{place}.json": report for place, report in enumerate(reports)}, plans)
    return document["recommendations"][role]


def serving(*speeds: dict[str, Any], **chip: Any) -> dict[str, Any]:
    return qualification(role="serve", measured={"serving": list(speeds)}, **chip)


def test_the_only_chip_that_passed_is_recommended_with_its_grounds() -> None:
    found = answer("train", qualification(finding("FAIL"), **ASCEND), qualification(**H20))
    assert (found["answer"], found["chip"]) == ("RECOMMENDED", "NVIDIA H20 (cuda:0)")
    assert "no other chip has" in found["grounds"][0]
    assert "Ascend910B2 (npu:0) failed (smoke tier): aten.mm.default" in found["grounds"][1]
    assert any("stability is not shown" in line for line in found["missing"])


def test_none_passed() -> None:
    found = answer("train", qualification(finding("FAIL"), **ASCEND), qualification(finding("FAIL"), **H20))
    assert (found["answer"], found["chip"]) == ("NONE", None)


def test_an_interrupted_pass_carries_nothing() -> None:
    found = answer("train", qualification(finding("FAIL"), **ASCEND), qualification(complete=False, **H20))
    assert (found["answer"], found["chip"]) == ("INCONCLUSIVE", None)


def test_the_exams_that_a_recommendation_takes_are_those_of_the_programme() -> None:
    assert tuple(exam.name for exam in EXAMS if exam.weight_in("smoke")) == SMOKE_EXAMS
    for tier in ("standard", "soak"):
        assert sorted(LONGER_EXAMS) == sorted(exam.name for exam in EXAMS if exam.weight_in(tier))
    assert tuple(PROBES) == SERVING_PROBES


@pytest.mark.parametrize(
    ("tier", "exams", "open_for"),
    [
        ("smoke", SMOKE_EXAMS, None),
        ("soak", LONGER_EXAMS, None),
        ("smoke", (*SMOKE_EXAMS, "golden"), None),
        ("smoke", ("software",), "only the exams software were taken"),
        ("smoke", SMOKE_EXAMS[:-1], "only the exams software, special_values, attention, determinism, rehearsal were"),
        ("standard", SMOKE_EXAMS, f"only the exams {', '.join(SMOKE_EXAMS)} were taken"),
        ("smoke", ("golden",), "none of the exams was taken"),
    ],
)
def test_a_pass_of_some_exams_recommends_nothing(tier: str, exams: tuple[str, ...], open_for: str | None) -> None:
    passed = qualification(tier=tier, exams=exams, **H20)
    assert (passed["verdict"], passed["complete"]) == ("PASS", True)
    found = answer("train", qualification(finding("FAIL"), **ASCEND), passed)
    assert found["chip"] == (None if open_for else "NVIDIA H20 (cuda:0)")
    assert found["answer"] == ("INCONCLUSIVE" if open_for else "RECOMMENDED")
    if open_for:
        assert f"NVIDIA H20 (cuda:0) is undecided: {open_for}" in "; ".join(found["grounds"])
        assert "--role train and all exams: without --exams" in found["missing"][0]


def test_a_failure_in_some_exams_is_one() -> None:
    failed = [qualification(finding("FAIL"), exams=("operators",), **chip) for chip in (H20, ASCEND)]
    assert answer("train", *failed)["answer"] == "NONE"


def of_engine(url: str, *exams: str, subject: str = "first") -> dict[str, Any]:
    report = qualification(role="serve", chip=url, dtype=None, exams=exams, subject=subject)
    return {**report, "fingerprint": {"engine": {"url": url, "model": "served/name"}}}


@pytest.mark.parametrize(
    ("exams", "why", "todo"),
    [
        (("serving_noise", *SERVING_PROBES), "", ""),
        (("serving_noise", "serving_utf8"), "only the exams serving_utf8 were taken", "without --exams"),
        (("dry_voyage",), "a dry voyage has random weights", "with the trained weights"),
        (SMOKE_EXAMS, "none of the exams was taken", "qualify --engine URL"),  # a chip's say nothing of an engine
    ],
)
def test_an_engine_is_recommended_by_all_probes_of_the_trained_weights(
    exams: tuple[str, ...], why: str, todo: str
) -> None:
    failed = qualification(finding("FAIL"), role="serve", **ASCEND)
    found = answer("serve", failed, of_engine("http://a (vllm 0.11)", *exams))
    assert found["chip"] == (None if why else "http://a (vllm 0.11)")
    assert why in "; ".join(found["grounds"])
    assert todo in "; ".join(found["missing"])


def test_what_was_left_out_stands_beside_the_verdict() -> None:
    reports = {"a.json": qualification(exams=("software",), **H20), "b.json": qualification(finding("FAIL"), **ASCEND)}
    assert "PASS, 0 failures, 0 limits; only the exams software were taken" in compare_page(compare(reports))
    assert "only the exams" not in compare_page(compare(reports | {"a.json": qualification(**H20)}))


@pytest.mark.parametrize("order", [("all.json", "some.json"), ("some.json", "all.json")])
def test_a_report_of_all_exams_counts_before_a_later_one_of_some_in_a_longer_tier(order: tuple[str, str]) -> None:
    two = {
        "all.json": qualification(**H20),
        "some.json": qualification(tier="soak", exams=("software",), began_at=1.9e9, **H20),
    }
    document = compare({**{file: two[file] for file in order}, "a.json": qualification(finding("FAIL"), **ASCEND)})
    assert "all.json is used, not some.json" in document["notes"][0]
    assert document["recommendations"]["train"]["chip"] == "NVIDIA H20 (cuda:0)"


def test_a_role_that_was_not_examined_says_so() -> None:
    assert answer("serve", qualification(**ASCEND), qualification(**H20))["answer"] == "NOT EXAMINED"


def test_two_that_passed_stay_open_and_published_figures_only_lean() -> None:
    found = answer("serve", serving(**H20), serving(**H200))
    assert (found["answer"], found["chip"]) == ("INCONCLUSIVE", None)
    assert "NVIDIA H200 (cuda:0); that is a claim, not a measurement" in found["leaning"]
    # the bandwidth of the 910B is unconfirmed, so nothing can be said from published figures
    assert answer("serve", serving(**H20), serving(**ASCEND))["leaning"] is None


def test_a_measured_speed_decides_where_its_bounds_are_apart() -> None:
    found = answer("serve", serving(speed(900, 20), **H20), serving(speed(700, 20), **H200))
    assert found["chip"] == "NVIDIA H20 (cuda:0)"  # against the published figures: a measured number always wins
    assert "decoding: NVIDIA H20 (cuda:0) 900 tokens/s" in found["grounds"][1]


def test_a_speed_in_another_dtype_is_of_other_work() -> None:
    slow = serving(speed(700, 20), **H200) | {"compute_dtype": "bfloat16"}
    fast = serving(speed(900, 20), **H20)
    assert answer("serve", fast | {"compute_dtype": "bfloat16"}, slow)["answer"] == "RECOMMENDED"
    assert answer("serve", fast | {"compute_dtype": "float32"}, slow)["answer"] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([speed(900, 120)], [speed(700, 120)]),  # bounds overlap
        ([speed(900, 1)], [speed(700, 1, what="prefill")]),  # not the same thing
        ([speed(900, 1)], [speed(700, 1, unit="requests/s")]),
        ([speed(900, 1), speed(5, 1, "prefill")], [speed(700, 1), speed(9, 1, "prefill")]),  # each wins one
        ([speed(900, 1)], []),
    ],
)
def test_speeds_that_do_not_tell_them_apart(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert answer("serve", serving(*left, **H20), serving(*right, **H200))["answer"] == "INCONCLUSIVE"


def test_rates_of_the_chips_stand_side_by_side() -> None:
    rates = [
        {"kind": "product rate", "dtype": "bfloat16", "flop_per_s": 5e14, "of": "a cube"},
        {"kind": "product rate", "dtype": "float32", "flop_per_s": "nan", "of": "a cube"},
        {"kind": "memory rate", "dtype": "bfloat16", "bytes_per_s": 3e12},
    ]
    reports = {"0.json": qualification(measured={"software": rates}, **H20), "1.json": qualification(**H200)}
    measured = compare(reports)["chips"][0]["measured"]
    found = {each["what"]: (each["value"], each["unit"]) for each in measured}
    assert found["products in bfloat16, a cube"] == (500.0, "TFLOP/s")
    assert found["copies in bfloat16"] == (3000.0, "GB/s")
    assert "products in float32, a cube" not in found


def plan(chip: str, p50: str, p90: str) -> dict[str, Any]:
    return {"document": "plan", "chip": chip, "role": "train", "ready": {"p50": p50, "p90": p90}}


def test_dates_decide_training_where_they_are_apart() -> None:
    reports = qualification(**ASCEND), qualification(**H20)
    apart = plan("npu:0", "2027-03-01", "2027-04-01"), plan("NVIDIA H20", "2027-05-01", "2027-07-01")
    assert answer("train", *reports, plans=apart)["chip"] == "Ascend910B2 (npu:0)"
    close = plan("npu:0", "2027-03-01", "2027-05-02"), plan("NVIDIA H20", "2027-05-01", "2027-07-01")
    assert answer("train", *reports, plans=close)["chip"] is None


def test_plans_that_the_command_made_are_dates_beside_the_reports(tmp_path: Path) -> None:
    files = []
    for chip, num_chips, about in (("H20", 2, H20), ("H200", 8, H200)):
        cluster, planned, report = (tmp_path / f"{chip}.{end}" for end in ("toml", "plan.json", "json"))
        cluster.write_text(f'name = "lab {chip}"\nchip = "{chip}"\nnum_chips = {num_chips}\n')
        large = (
            "train.steps=2000000",
            "train.batch_size=1024",
            "model.hidden_size=2048",
            "model.intermediate_size=8192",
        )
        command = ["plan", str(ROOT / "recipes/first.toml"), "--cluster", str(cluster), "--json", str(planned)]
        command += [part for each in large for part in ("--set", each)]
        assert (ended := CliRunner().invoke(app, command)).exit_code == 0, ended.output
        report.write_text(json.dumps(qualification(**about)))
        files += [planned, report]
    ended = CliRunner().invoke(app, ["compare", *map(str, files), "--json", str(tmp_path / "c.json")])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "c.json").read_text())
    for chip, planned in zip(found["chips"], files[::2], strict=True):
        ready = json.loads(planned.read_text())["ready"]
        assert chip["plans"]["train"] == ready | {"cluster": chip["plans"]["train"]["cluster"]}
        assert f"{ready['p50']}, {ready['p90']}" in ended.output.replace("\\", "")
    assert found["recommendations"]["train"]["chip"] == "NVIDIA H200 (cuda:0)"
    assert "by plan NVIDIA H200 (cuda:0) is ready on" in found["recommendations"]["train"]["grounds"][1]


def test_a_plan_that_speaks_of_nothing_here_is_left_out_and_that_is_said() -> None:
    good = plan("NVIDIA H20", "2027-05-01", "2027-07-01")
    bad = [
        {**good, "model": "second"},
        {**good, "chip": "H100", "chip_matches": ["H100", "("]},
        {"document": "plan", "chip": "NVIDIA H20", "cluster": "lab"},
        {**good, "cluster": "again"},
    ]
    document = compare({"a.json": qualification(**ASCEND), "b.json": qualification(**H20)}, [good, *bad])
    notes = "; ".join(document["notes"])
    for words in ("the reports are of first", "for H100, of which there is no report", "no dates", "has two plans"):
        assert words in notes
    assert document["chips"][1]["plans"]["train"]["p50"] == "2027-05-01"


def test_a_plan_of_a_newer_crosschip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"document": "plan", "schema_version": NEWEST_PLAN + 1}))
    with pytest.raises(ReportError, match="is a plan of schema version"):
        read_compared([tmp_path / "p.json"])
    assert NEWEST_PLAN == SCHEMA_VERSION


def test_two_chips_for_two_roles_need_a_handoff() -> None:
    reports = [
        qualification(**H20),
        qualification(finding("FAIL"), **ASCEND),
        qualification(finding("FAIL"), role="serve", **H20),
        qualification(role="serve", **ASCEND),
    ]
    document = compare({f"{place}.json": report for place, report in enumerate(reports)})
    assert document["summary"].startswith("Training: NVIDIA H20 (cuda:0); inference: Ascend910B2 (npu:0). What one")


def test_a_simulated_chip_is_a_rehearsal() -> None:
    sim = {"chip": "sim", "model_name": "simulated chip"}
    found = answer("train", qualification(finding("FAIL"), **H20), qualification(**sim))
    assert any("says nothing of a real chip" in line for line in found["missing"])


def test_the_more_thorough_of_two_reports_counts_and_a_disagreement_is_open() -> None:
    smoke, soak = qualification(**H20), qualification(tier="soak", **H20)
    document = compare({"smoke.json": smoke, "soak.json": soak, "a.json": qualification(finding("FAIL"), **ASCEND)})
    assert "soak.json is used, not smoke.json" in document["notes"][0]
    assert document["chips"][0]["roles"]["train"]["tier"] == "soak"
    failed = qualification(finding("FAIL"), tier="smoke", **H20)
    document = compare({"smoke.json": failed, "soak.json": soak})
    assert "they disagree" in document["notes"][0]
    assert document["recommendations"]["train"]["answer"] == "INCONCLUSIVE"


def test_a_disagreement_stays_open_in_whatever_order_three_reports_come() -> None:
    reports = {
        "failed.json": qualification(finding("FAIL"), tier="smoke", **H20),
        "standard.json": qualification(tier="standard", **H20),
        "soak.json": qualification(tier="soak", **H20),
        "other.json": qualification(finding("FAIL"), **ASCEND),
    }
    for names in itertools.permutations(reports):
        document = compare({name: reports[name] for name in names})
        assert document["recommendations"]["train"]["answer"] == "INCONCLUSIVE", names
        (note,) = document["notes"]
        assert "3 times to train: soak.json is used" in note
        assert "they disagree" in note


def test_a_chip_that_could_not_be_used_is_the_one_of_its_device() -> None:
    gone = qualification(
        finding("FAIL", "chip npu:0"), chip="npu:0", model_name=None, dtype=None, subject="recipes/first.toml"
    )
    document = compare({"gone.json": gone, "serve.json": qualification(role="serve", **ASCEND)})
    assert [chip["title"] for chip in document["chips"]] == ["Ascend910B2 (npu:0)"]
    assert "gone.json names no chip" in document["notes"][0]


def test_reports_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ReportError, match="1 report is too few"):
        compare({"a.json": qualification()})
    with pytest.raises(ReportError, match=r"b\.json is of the subject 'second', a\.json of 'first'") as caught:
        compare({"a.json": qualification(**H20), "b.json": qualification(subject="second", **ASCEND)})
    assert "examine each with --model DIR" in (caught.value.remedy or "")
    with pytest.raises(ReportError, match=r"b\.json has schema version 9"):
        compare({"a.json": qualification(), "b.json": {**qualification(**H20), "schema_version": 9}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "it is 'list'"),
        ('{"document": "trace"}', "it is 'trace'"),
        (f'{{"document": "qualification", "seed": {"9" * 5000}}}', "4300 digits"),
        (b'{"subject": "\xff"}', "is not JSON"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ReportError) as caught:
        read_report(file)
    assert str(file) in caught.value.problem
    assert words in caught.value.problem


def document() -> dict[str, Any]:
    return compare(
        {
            "a.json": qualification(finding("FAIL", f"mm {HOSTILE}"), measured=MEASURED, **ASCEND),
            "b.json": qualification(role="serve", **{**H20, "model_name": f"NVIDIA H20 {HOSTILE} | x\n# y"}),
        }
    )


def test_the_page_and_the_text_say_the_same_and_nothing_is_executed() -> None:
    reader = PageReader()
    reader.feed(page := compare_page(document()))
    text = re.sub(r"\s+", " ", "".join(reader.text))
    markdown = compare_markdown(document())
    for words in ("Which chip for inference?", "256-320 (unconfirmed)", "? (unconfirmed)", "HCCS", "NVLink 900"):
        assert words in text
        assert re.sub(r"[#*]", "", words) in markdown.replace("\\", "")
    assert not {"script", "img"} & set(reader.tags)
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "<script" not in markdown.replace("\\<", "")
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {4}  # a column for the row's name and one for each chip, whatever is written in them
    json.dumps(document(), allow_nan=False)


HUGE = 10**400  # an integer that JSON may hold and no float can
NUMBERS = [
    speed(HUGE, 0),
    {"kind": "product rate", "flop_per_s": HUGE},
    {"kind": "memory rate", "bytes_per_s": -HUGE},
    {"kind": "equivalence", "mean": 1e308},
    {"plot": "bandwidth", "bandwidth_gb_s": HUGE},
    {"what": "speed", "launch_s": 1e308},
    {"ratio": HUGE},
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda entry: str(list(entry)))
def test_a_number_that_no_float_holds_is_not_compared(number: dict[str, Any]) -> None:
    document = compare({"a.json": serving(number, **H20), "b.json": serving(**H200)})
    assert [each["what"] for each in document["chips"][0]["measured"]] == ["memory", "dtypes that compute"]
    json.dumps(document, allow_nan=False)
    good = {key: 1e-3 if isinstance(value, int | float) else value for key, value in number.items()}
    assert len(compare({"a.json": serving(good, **H20), "b.json": serving(**H200)})["chips"][0]["measured"]) == 3


KEYS = ("exams", "findings", "trace", "fingerprint", "tier", "compute_dtype", "origin", "complete", "began")
DAMAGES: list[tuple[str, Any]] = [
    *((key, value) for key in KEYS for value in (None, 3, HUGE, "\ud800\x1b[2J", [], [3], {}, [{}])),
    ("fingerprint", {"chip": {"memory_bytes": HUGE, "dtypes": [], "model_name": 3}}),
    ("fingerprint", {"chip": []}),
    ("exams", [{"exam": [], "verdict": {}, "measurements": [{"kind": "speed", "lower": [], "ratio": {}}]}]),
    ("findings", [{"verdict": [], "subject": HUGE}]),
]


@pytest.mark.parametrize(("key", "value"), DAMAGES, ids=lambda each: repr(each)[:30])
def test_a_damaged_part_never_ends_the_comparison(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**qualification(finding("FAIL")), key: value}))
    (tmp_path / "b.json").write_text(json.dumps(qualification(**H20)))
    command = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    ended = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "c.html"), "--json", str(tmp_path / "c")])
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "c.html").exists()
    json.loads((tmp_path / "c").read_text())


def test_what_a_terminal_would_obey_or_cannot_show_is_written_in_escapes(tmp_path: Path) -> None:
    files = []
    for chip in ("npu:0", "cuda\ud83d\x07"):  # written as another program may; ours has the escapes in its reports
        odd = {"subject": "first\x1b[31m \ud800 \u202e\x7f\x9b", "chip": chip}
        (file := tmp_path / f"{len(files)}.json").write_text(json.dumps({**qualification(), **odd}))
        files.append(str(file))
    ended = CliRunner().invoke(app, ["compare", *files])
    assert ended.exit_code == 0, ended.output
    shown = ended.output.replace("\\\\", "\\")
    assert "# Chips for first\\x1b\\[31m \\ud800 \\u202e\\x7f\\x9b" in shown
    assert "(cuda\\ud83d\\x07)" in shown
    assert not [each for each in ended.output.replace("\n", "") if not each.isprintable()]


def test_a_plan_with_an_expression_that_cannot_be_compiled_fits_nothing() -> None:
    odd = {**plan("H20", "2027-05-01", "2027-07-01"), "chip_matches": ["H20{99999999999999999999}"]}
    document = compare({"a.json": qualification(**ASCEND), "b.json": qualification(**H20)}, [odd])
    assert "of which there is no report" in document["notes"][0]
