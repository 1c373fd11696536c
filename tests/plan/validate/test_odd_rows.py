"""Files of other people's rows: an odd cell costs its own row at most, an outcome that is held back is not used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from crosschip.plan.step import Layout
from crosschip.plan.validate import read_rows, validate_rows
from crosschip.plan.validate.batches import batch_words
from crosschip.plan.validate.cases import CannotPredict, case_of
from crosschip.plan.validate.parallelism import layout_words
from crosschip.plan.validate.predicting import choose_layout, predicted_value
from tests.plan.validate.test_validation import by_id, cells, written

ROW = "mosaic_13b_a100-40gb_16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": "many"}, "seq_len = 'many' is not a positive number: mend the cell, or leave it empty"),
        ({"n_chips": "-8"}, "n_chips = '-8'"),
        ({"n_chips": "7.5"}, "n_chips = '7.5' is no whole number"),
        ({"n_chips": "0.2"}, "n_chips = '0.2' is no whole number"),
        ({"n_chips": "1.2.3 - 4"}, "n_chips = '1.2.3 - 4' is not a positive number"),
        ({"seq_len": "1e12"}, "seq_len = '1e12' is no whole number up to"),
        ({"params_total_b": "nan"}, "params_total_b = 'nan'"),
        ({"tokens_t": "a lot"}, "tokens_t = 'a lot'"),
        ({"arch": "hybrid"}, "arch = 'hybrid' is none of dense, moe"),
        ({"calibration": "maybe"}, "calibration = 'maybe' is none of yes, no"),
        ({"tokens_t": "1e300"}, "tokens_t = '1e300' is not between 1e-06 and 1e+12"),
        ({"params_total_b": "1e299"}, "params_total_b = '1e299' is not between"),
        ({"arch": "dense", "params_active_b": "6"}, "arch = 'dense' with params_active_b = '6' of params_total_b"),
        ({"params_active_b": "13.2"}, "params_active_b = '13.2' is more than params_total_b = '12.854': mend"),
    ],
)
def test_an_odd_cell_costs_its_own_row_alone(tmp_path: Path, change: dict[str, str], words: str) -> None:
    row = cells((ROW,))[0]
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [row, {**row, "id": "odd", **change}]))))
    assert words in found["odd"]["skipped"]
    assert found[ROW]["predicted"] > 0


def test_a_row_without_an_id_is_skipped_by_its_line(tmp_path: Path) -> None:
    row = cells((ROW,))[0]
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [row, {**row, "id": ""}]))))
    assert found["line 3"]["skipped"] == "id is empty: give each row its own id"


def test_active_parameters_may_be_more_than_all_by_rounding(tmp_path: Path) -> None:
    row = {**cells((ROW,))[0], "params_total_b": "8", "params_active_b": "8.03"}
    (found, _), *_ = read_rows(written(tmp_path / "a.csv", [row]))
    assert found.params_active == found.params_total == 8e9
    assert not found.faults


def test_an_outcome_that_is_no_number_is_not_published(tmp_path: Path) -> None:
    row = cells((ROW,))[0]
    odd = {**row, "id": "odd", row["quantity"]: "inf"}
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [row, odd]))))
    assert found["odd"]["predicted"] == found[ROW]["predicted"]
    assert found["odd"]["published"] is None
    assert f"{row['quantity']} = 'inf' is not a positive number: taken as not published" in found["odd"]["notes"]


@pytest.mark.parametrize("outcome", ["1e-320", "1e-310", "1e300"])
def test_an_outcome_that_no_run_can_have_skips_its_row(tmp_path: Path, outcome: str) -> None:
    row = cells((ROW,))[0]
    odd = {**row, "id": "odd", row["quantity"]: outcome}
    document = validate_rows(read_rows(written(tmp_path / "a.csv", [row, odd])))
    assert f"{row['quantity']} = '{outcome}' is not between" in by_id(document)["odd"]["skipped"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_prediction_that_is_no_number_skips_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("crosschip.plan.validate.report.predicted_value", lambda *_: math.inf)
    document = validate_rows(read_rows(written(tmp_path / "a.csv", cells((ROW,)))))
    assert "the prediction is inf" in by_id(document)[ROW]["skipped"]


def test_a_row_without_an_architecture_is_a_mixture_by_its_active_parameters(tmp_path: Path) -> None:
    row = {**cells((ROW,))[0], "model": "Foo 100B-A10B", "params_total_b": "100", "params_active_b": "10"}
    (empty, _), (named, _), (dense, _) = read_rows(
        written(
            tmp_path / "a.csv",
            [
                {**row, "arch": ""},
                {**row, "id": "b", "arch": "moe"},
                {**row, "id": "c", "arch": "", "params_active_b": "100"},
            ],
        )
    )
    assert case_of(empty).job.architecture == case_of(named).job.architecture
    assert case_of(empty).job.architecture.experts is not None
    assert "arch not given: 10 of 100 B parameters active, so a mixture" in case_of(empty).notes
    assert case_of(dense).job.architecture.experts is None


@pytest.mark.parametrize("model", ["Foo 2x7B", "Foo 1x13B", "Foo 0x13B", "Foo 3x7B"])
def test_a_name_with_few_experts_costs_no_other_row(tmp_path: Path, model: str) -> None:
    row = cells((ROW,))[0]
    odd = {**row, "id": "odd", "model": model, "arch": "moe", "params_total_b": "13", "params_active_b": "12"}
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [row, odd]))))
    assert found[ROW]["predicted"] > 0
    assert found["odd"].get("predicted") or found["odd"]["skipped"]


def test_a_layout_over_experts_decides_how_many_of_about_so_many_chips_are_taken() -> None:
    row = next(row for row, _ in read_rows() if row.id == "dsv2")
    about = replace(row, num_chips=6000, parallelism="TP8 PP16 EP4 VP2", kind="throughput", quantity="mfu_pct_reported")
    case = case_of(about)
    assert case.num_chips == 11 * 16 * 32  # whole groups of 16 stages, whose experts lie on 4 x 8 chips
    assert "'TP8 PP16 EP4 VP2' does not divide 6000 chips: 5632 taken" in case.notes
    _, layout = choose_layout(case, case.hardware)
    assert (layout.tensor, layout.pipeline, layout.expert, layout.interleave) == (8, 16, 4, 2)
    assert case_of(replace(about, num_chips=6144)).num_chips == 6144


@pytest.mark.parametrize("kind", ["throughput", "full_run", "step_time"])
def test_a_run_from_before_fused_attention_is_so_in_every_kind_of_row(kind: str) -> None:
    row = next(row for row, _ in read_rows() if row.id == "bloom176b")
    case = case_of(replace(row, kind=kind, quantity="tflops_per_chip_reported"))
    assert not case.job.fused_attention
    assert dict(case.fixed)["recompute"] == "full"


def test_operations_that_count_recomputed_ones_are_of_a_layout_that_recomputes() -> None:
    row = next(row for row, _ in read_rows() if row.id == "llama3_405b_8k")
    assert "recompute" not in dict(case_of(row).fixed)
    case = case_of(replace(row, convention="megatron, incl. recompute"))
    assert dict(case.fixed)["recompute"] == "full"
    named = case_of(replace(row, convention="megatron, incl. recompute", parallelism="TP8 PP16, no recompute"))
    assert dict(named.fixed)["recompute"] == "none"
    plain = case_of(replace(row, convention="megatron", parallelism="TP8 PP16, no recompute"))
    layout = Layout(data=64, tensor=8, pipeline=16, interleave=8)
    assert predicted_value(named, layout, named.hardware) == predicted_value(plain, layout, plain.hardware)


def test_a_row_for_calibration_without_a_layout_is_skipped(tmp_path: Path) -> None:
    row = cells((ROW,))[0]
    odd = {
        **row,
        "id": "odd",
        "calibration": "yes",
        "parallelism": "DiLoCo H=10 TP16",
        "n_chips": "32",
    }
    document = validate_rows(read_rows(written(tmp_path / "a.csv", [row, odd])))
    assert "no layout of 32 chips" in by_id(document)["odd"]["skipped"]
    assert by_id(document)[ROW]["predicted"] > 0
    assert not any("odd" in each["fitted_on"] for each in document["parameters"].values())


@pytest.mark.parametrize(
    ("cell", "sequences", "is_noted"),
    [
        ("1,024 seqs", 1024, False),
        ("~4M tokens", 1024, False),
        ("4194304", 1024, False),
        ("4M -> 16M tokens", 4096, True),
        ("4M tokens to 16M", 4096, True),
        ("32 → 3072", 3072, True),
        ("16M tokens (ramped from 4M)", 4096, True),
        ("1536 x 4096", 1536, True),
        ("4096 x 1536", 1536, True),
        ("1536 seqs of 4096 tokens", 1536, True),
        ("8 x 128 seqs", 1024, True),
        ("8M tokens/step", 2048, True),
        ("GBS=1024", 1024, True),
    ],
)
def test_a_batch_is_read_as_far_as_it_goes(cell: str, sequences: int, is_noted: bool) -> None:
    words = batch_words(cell)
    assert words.sequences(4096) == sequences
    assert len(words.notes) == is_noted
    assert all(f"{cell!r} is read as" in note for note in words.notes)


@pytest.mark.parametrize(
    "cell",
    ["many", "-8 seqs", "1.2.3 seqs", "512abc", "2^20 tokens", "0", "1e30 tokens", "16 x 64", "2 seqs per GPU",
     "micro-batch 4"],
)  # fmt: skip
def test_a_batch_that_cannot_be_read_is_as_if_not_given(cell: str) -> None:
    row = next(row for row, _ in read_rows() if row.id == "llama3_405b_8k")
    case, empty = case_of(replace(row, global_batch=cell)), case_of(replace(row, global_batch=""))
    assert case.job == empty.job
    assert not case.is_described
    assert set(case.notes) - set(empty.notes) == {
        f"global_batch = {cell!r} is no size that can be read: taken as not given"
    }


def test_a_batch_of_sequences_gives_their_length_where_the_row_has_none() -> None:
    row = next(row for row, _ in read_rows() if row.id == "llama3_405b_8k")
    job = case_of(replace(row, global_batch="1536 x 2048", seq_len=None)).job
    assert (job.batch_size, job.seq_len) == (1536, 2048)


@pytest.mark.parametrize(
    "change",
    [{}, {"id": "another"}, {"id": "another", "chip": "NVIDIA A100-SXM4-40GB"}, {"id": "another", "n_chips": ""}],
)
def test_a_shipped_row_that_a_file_holds_back_is_not_fitted_on(tmp_path: Path, change: dict[str, str]) -> None:
    row = cells(("mosaic_30b_a100-40gb_32",))[0]
    assert row["calibration"] == "yes"
    held_back = {**row, "calibration": "no", **change}
    document = validate_rows(read_rows(written(tmp_path / "a.csv", [held_back])))
    assert not any(row["id"] in each["fitted_on"] for each in document["parameters"].values())
    assert document["parameters"]["H800"]["fitted_on"] == ["ds67b_per_T"]
    # The control: another run on as many chips leaves it in.
    other = {**held_back, "id": "another", "n_chips": "64"}
    document = validate_rows(read_rows(written(tmp_path / "b.csv", [other])))
    assert row["id"] in document["parameters"]["A100 40 GB"]["fitted_on"]


def test_a_layout_of_a_runs_paper_does_not_describe_its_row() -> None:
    row = next(row for row, _ in read_rows() if row.id == "opt175b")
    full = replace(row, global_batch="1024 seqs", seq_len=2048, num_chips=1024)
    assert not full.parallelism
    case = case_of(full)
    assert dict(case.fixed)["tensor"] == 8
    assert not case.is_described
    assert case_of(replace(full, parallelism="FSDP TP8")).is_described


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("TP8xPP16xDP64", (8, 16, 1)),
        ("TP8 x PP16", (8, 16, 1)),
        ("8-way TP, 16-way PP", (8, 16, 1)),
        ("8-way tensor and 16 way pipeline parallelism", (8, 16, 1)),
        ("DP64 TP8 PP", (8, 16, 1)),
        ("EP64, DP128", (1, 1, 64)),
    ],
)
def test_usual_spellings_of_a_layout_are_read(text: str, widths: tuple[int, int, int]) -> None:
    words = layout_words(text, 8192)
    assert words.is_named
    assert tuple(words.fixed[name] for name in ("tensor", "pipeline", "expert")) == widths


@pytest.mark.parametrize(
    ("text", "num_chips"),
    [
        ("TP8 PP16 DP64", 8192),
        ("FSDP32 TP8 CP2", 512),
        ("FSDP=256", 256),
        ("FSDP2 TP8", None),
        ("DP4 FSDP32 TP8", 1024),
        ("8-way data, 4-way tensor", 32),
        ("DP64 TP8 PP", None),
        ("TP8 PP16", None),
        ("DiLoCo H=100 x FSDP8", None),
    ],
)
def test_chips_that_a_layout_names(text: str, num_chips: int | None) -> None:
    assert layout_words(text, 2048).num_chips == num_chips


def test_chips_that_a_layout_names_are_taken_where_the_row_has_none() -> None:
    row = next(row for row, _ in read_rows() if row.id == "llama3_405b_8k")
    case = case_of(replace(row, num_chips=None))
    assert case.num_chips == row.num_chips == 8192
    assert "number of chips not given: 8192 taken, the product of the layout's widths" in case.notes
    assert case.is_described == case_of(row).is_described
    assert case_of(replace(row, num_chips=4096)).num_chips == 4096
    with pytest.raises(CannotPredict, match="chips in parallelism = 'TP8 DP99999999'"):
        case_of(replace(row, num_chips=None, parallelism="TP8 DP99999999"))


def test_a_layout_that_cannot_be_read_is_said() -> None:
    assert any("'octopus' could not be read" in note for note in layout_words("octopus", 8).notes)
    for text in ("", "full recompute"):
        assert any("layout not given" in note for note in layout_words(text, 8).notes)


@pytest.mark.parametrize("source", ["arXiv 2104.04473", "arXiv:2104.04473", "arXiv: 2104.04473"])
def test_a_paper_is_dated_by_its_number_however_it_is_written(source: str) -> None:
    row = next(row for row, _ in read_rows() if row.id == "korthikanti_1t_full")
    assert not case_of(replace(row, source=source)).job.fused_attention
    assert case_of(replace(row, source="a page")).job.fused_attention


def test_step_times_of_others_are_not_held_to_calculons_threshold(tmp_path: Path) -> None:
    (row,) = cells(("korthikanti_1t_full",))
    rows = [row, {**row, "id": "mine", "source": "a page"}]
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", rows))))
    assert found["korthikanti_1t_full"]["group"] == "Calculon's step times"
    assert found["mine"]["group"] == "step times, other sources"
