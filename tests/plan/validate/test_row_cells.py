"""Cells of a row that are written in another way than most, and what a row's notes say in the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crosschip.plan.counts import active_parameters, num_parameters, train_flops_per_token
from crosschip.plan.step import Layout
from crosschip.plan.table import print_validation
from crosschip.plan.validate import Row, read_rows, validate_rows
from crosschip.plan.validate.cases import CannotPredict, case_of
from crosschip.plan.validate.predicting import choose_layout, predicted_value
from tests.plan.validate.test_validation import by_id, cells, written

ROW = "mosaic_13b_a100-40gb_16"


def row(name: str, **changes: Any) -> Row:
    return replace(next(row for row, _ in read_rows() if row.id == name), **changes)


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("seq_len", "8K", 8192),
        ("seq_len", "4k", 4096),
        ("n_chips", "~6000", 6000),
        ("n_chips", "about 6,000", 6000),
        ("n_chips", "≈ 16K", 16384),
        ("n_chips", "approx. 512", 512),
        ("seq_len", "2048-16384", 9216),
        ("params_total_b", "~70", 70e9),
        ("params_total_b", "718B", 718e9),
        ("params_total_b", "1.04T", 1040e9),
        ("params_total_b", "7 billion parameters", 7e9),
        ("tokens_t", "12T", 12e12),
        ("tokens_t", "14.8T tokens", 14.8e12),
        ("tokens_t", "330B", 0.33e12),
        ("n_chips", "6,144 NPUs", 6144),
        ("n_chips", "256 nodes x 8", 2048),
        ("n_chips", "256x8 GPUs", 2048),
        ("n_chips", "1-3K", 2048),
        ("seq_len", "4K -> 8K", 4096),
        ("seq_len", "4096 tokens", 4096),
    ],
)
def test_a_number_that_is_not_plain_is_read_and_said(tmp_path: Path, column: str, cell: str, value: float) -> None:
    given = {**cells((ROW,))[0], "params_active_b": "", column: cell}
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [given]))
    names = {"seq_len": "seq_len", "n_chips": "num_chips", "params_total_b": "params_total", "tokens_t": "tokens"}
    assert getattr(found, names[column]) == pytest.approx(value)
    assert not found.faults
    (reading,) = found.readings
    assert reading.startswith(f"{column} = {cell!r} is read as ")
    assert ("the middle of its range" in reading) == ("-" in cell and ">" not in cell)
    if column not in ("params_total_b", "tokens_t"):
        assert reading in case_of(found).notes


@pytest.mark.parametrize(
    ("quantity", "cell", "value"),
    [
        ("chip_hours", "2.38M", 2.38e6),
        ("chip_hours", "2.664M H800 GPU hours", 2.664e6),
        ("chip_hours", "2.664M GPU hours", 2.664e6),
        ("chip_hours", "184,320 GPU-h", 184_320),
        ("chip_hours", "2-3M hours", 2.5e6),
        ("chip_hours", "1.3M and 0.1M hours", None),
        ("tok_s_per_chip", "1.2K tok/s/GPU", 1200),
        ("tflops_per_chip_reported", "390 TFLOPs", 390),
        ("tflops_per_chip_reported", "~400 TFLOP/s/GPU", 400),
        ("mfu_pct_reported", ">50 %", 50),
        ("mfu_pct_reported", "38-43% MFU", 40.5),
        ("wall_days", "~90 days", 90),
        ("wall_days", "3 months", None),
        ("step_time_s", "18.1 s", 18.1),
    ],
)
def test_outcomes_with_their_units_are_read_and_said(
    tmp_path: Path, quantity: str, cell: str, value: float | None
) -> None:
    given = {**cells((ROW,))[0], "quantity": quantity, quantity: cell}
    ((_, outcome),) = read_rows(written(tmp_path / "a.csv", [given]))
    assert outcome.value == (None if value is None else pytest.approx(value))
    assert ("taken as not published" if value is None else f"{quantity} = {cell!r} is read as") in outcome.note


@pytest.mark.parametrize(
    ("cell", "arch"), [("fine-grained MoE", "moe"), ("Sparse", "moe"), ("MoE", "moe"), ("dense (GQA)", "dense")]
)
def test_an_architecture_in_other_words_is_read(tmp_path: Path, cell: str, arch: str) -> None:
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [{**cells((ROW,))[0], "arch": cell}]))
    assert found.arch == arch
    assert (f"arch = {cell!r} is read as {arch}" in found.readings) == (cell.lower() != arch)


@pytest.mark.parametrize("cell", ["non-MoE", "dense and MoE", "hybrid"])
def test_an_architecture_that_is_neither_or_both_skips_the_row(tmp_path: Path, cell: str) -> None:
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [{**cells((ROW,))[0], "arch": cell}]))
    assert f"arch = {cell!r} is none of dense, moe" in found.faults[0][0]


def test_plain_numbers_are_not_told(tmp_path: Path) -> None:
    given = {**cells((ROW,))[0], "n_chips": "6,144", "tokens_t": "1e-2"}
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [given]))
    assert found.readings == ()


@pytest.mark.parametrize("cell", ["about many", "8Kb", "about", "~-8", "512-1023"])
def test_words_around_a_number_that_are_not_known_skip_the_row(tmp_path: Path, cell: str) -> None:
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [{**cells((ROW,))[0], "n_chips": cell}]))
    assert f"n_chips = {cell!r}" in found.faults[0][0]


@pytest.mark.parametrize(
    ("source", "is_fused"),
    [
        ("https://arxiv.org/abs/2104.04473", False),
        ("arxiv.org/pdf/2104.04473v5", False),
        ("https://arxiv.org/abs/2407.21783", True),
    ],
)
def test_a_paper_is_dated_by_its_address(source: str, is_fused: bool) -> None:
    assert case_of(row("korthikanti_1t_full", source=source)).job.fused_attention == is_fused


@pytest.mark.parametrize("words", ["selective recompute", "Selective recompute", "selective recomputation"])
def test_selective_recomputation_says_nothing_of_fused_attention(words: str) -> None:
    case = case_of(row("llama3_405b_8k", parallelism=f"TP8 PP16, {words}"))
    assert case.job.fused_attention
    assert dict(case.fixed)["recompute"] == "selective"


def test_hfu_counts_recomputed_layers_and_6nd_no_attention() -> None:
    layout = Layout(data=64, tensor=8, pipeline=16, interleave=8, recompute="full")

    def predicted(convention: str, recompute: str = "full") -> float:
        case = case_of(row("llama3_405b_8k", convention=convention))
        return predicted_value(case, replace(layout, recompute=recompute), case.hardware)  # type: ignore[arg-type]

    model = case_of(row("llama3_405b_8k")).job.architecture
    assert predicted("hfu") == pytest.approx(4 / 3 * predicted(""))
    assert predicted("hfu", "none") == pytest.approx(predicted("", "none"))
    assert predicted("hfu 57.8") == predicted("")  # of a row whose figure is an MFU
    for convention in ("6nd", "6 * n * d", "mfu, 6nd"):
        assert predicted(convention) / predicted("") == pytest.approx(
            6 * active_parameters(model) / train_flops_per_token(model, 8192)
        )
    assert "recompute" not in dict(case_of(row("llama3_405b_8k", convention="hfu")).fixed)


def test_a_convention_that_is_not_known_is_noted() -> None:
    def noted(convention: str, **changes: Any) -> bool:
        case = case_of(row("llama3_405b_8k", convention=convention, **changes))
        return any("is none that is known" in note for note in case.notes)

    assert noted("home-made")
    assert not noted("home-made", quantity="tok_s_per_chip")
    assert not any(map(noted, ("", "hfu", "6nd", "palm", "mfu", "megatron model-flop incl. recompute")))


def test_the_time_of_a_step_with_another_batch_is_scaled_to_the_rows() -> None:
    small = row("korthikanti_22b_seqsel", num_chips=512, parallelism="FSDP", global_batch="256 seqs")
    (half, layout), (whole, same) = (
        choose_layout(case, case.hardware)
        for case in (case_of(small), case_of(replace(small, global_batch="512 seqs")))
    )
    assert layout == same
    assert half.job.batch_size == 512
    times = [predicted_value(each, layout, each.hardware) for each in (half, whole)]
    assert times[0] == pytest.approx(times[1] / 2)
    note = "a batch of 256 sequences does not divide: 512 taken, and the step's time times 0.5"
    assert note in half.notes
    assert half.batch_scale == 0.5
    throughput = replace(small, quantity="tok_s_per_chip")
    case, layout = choose_layout(case_of(throughput), half.hardware)
    assert note not in case.notes


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [("Grok-1", 314, 86), ("Pangu Pro MoE", 72, 16.5), ("Qwen2-57B-A14B", 57, 14), ("Unheard of", 1000, 32)],
)
def test_an_unknown_mixture_has_both_of_its_sizes(model: str, total: float, active: float) -> None:
    known = row("dsv2", model=model, params_total=total * 1e9, params_active=active * 1e9)
    found = case_of(known).job.architecture
    assert found.assumed
    assert active_parameters(found) / 1e9 == pytest.approx(active, rel=0.05)
    assert num_parameters(found) / 1e9 == pytest.approx(total, rel=0.05)
    assert f"{active_parameters(found) / 1e9:.4g} B of them active" in found.assumed


def test_a_mixture_that_no_usual_shape_is_as_sparse_as_is_refused() -> None:
    with pytest.raises(CannotPredict, match="no shape with 1 B active parameters for 'Foo'") as caught:
        case_of(row("dsv2", model="Foo", params_total=2000e9, params_active=1e9))
    assert "mend params_active_b" in caught.value.remedy


def test_a_row_for_calibration_without_a_layout_leaves_its_kind_to_the_shipped_rows(tmp_path: Path) -> None:
    given = cells((ROW,))[0]
    odd = {**given, "id": "odd", "calibration": "yes", "parallelism": "DiLoCo H=10 TP16", "n_chips": "32"}
    document = validate_rows(read_rows(written(tmp_path / "a.csv", [given, odd])))
    assert document["parameters"]["A100 40 GB"]["fitted_on"] == ["mosaic_30b_a100-40gb_32"]
    assert not any("no row calibrates" in note for note in by_id(document)[ROW]["notes"])


def test_the_terminal_shows_chips_and_what_was_assumed(tmp_path: Path) -> None:
    given = cells((ROW,))[0]
    rows = [given, {**given, "id": "[bare]", "n_chips": "", "parallelism": ""}, {**given, "id": "no", "chip": "[x]"}]
    document = validate_rows(read_rows(written(tmp_path / "a.csv", rows)))
    file = io.StringIO()
    print_validation(document, Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("[bare]"))
    assert " 2,048 " in lines[at]
    assert lines[at + 1].strip() == "; ".join(by_id(document)["[bare]"]["notes"])
    assert "number of chips not given: 2048 assumed" in lines[at + 1]
    assert "layout not given: the best one that fits is searched for" in lines[at + 1]
    assert any("no figures for the chip '[x]'" in line for line in lines)
