"""The validation: no outcome is read where it must not be, and what it says of rows that lack something."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.plan.counts import num_parameters, reported_flops_per_token, train_flops_per_token
from crosschip.plan.step import Layout
from crosschip.plan.validate import Row, read_rows, validate_rows
from crosschip.plan.validate.cases import CannotPredict, case_of
from crosschip.plan.validate.fitting import fit_kinds
from crosschip.plan.validate.parallelism import layout_words
from crosschip.plan.validate.predicting import predicted_value
from crosschip.plan.validate.rows import OUTCOMES, SHIPPED_ROWS

SOME = (
    "korthikanti_22b_seqsel", "korthikanti_175b_full", "korthikanti_1t_full", "mosaic_13b_a100-40gb_16",
    "mosaic_30b_a100-40gb_32", "dsv2", "ds67b_per_T", "mlperf51_llama31_8b_b200", "falcon40b",
)  # fmt: skip


def cells(ids: tuple[str, ...] = SOME) -> list[dict[str, str]]:
    with SHIPPED_ROWS.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["id"] in ids]


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def by_id(document: dict[str, Any]) -> dict[str, Any]:
    return {row["id"]: row for row in document["rows"]}


def test_a_row_has_no_outcome() -> None:
    assert not {field.name for field in fields(Row)} & set(OUTCOMES)


def test_predictions_hang_on_no_outcome_but_those_for_calibration(tmp_path: Path) -> None:
    rows = cells()
    honest = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", rows))))
    for row in rows:
        for column in OUTCOMES:
            if row["calibration"] != "yes":
                row[column] = "" if row["id"] == "dsv2" else "123"
            elif column != row["quantity"]:
                row[column] = "123"
    blinded = by_id(validate_rows(read_rows(written(tmp_path / "b.csv", rows))))
    assert {k: v.get("predicted") for k, v in honest.items()} == {k: v.get("predicted") for k, v in blinded.items()}
    assert blinded["dsv2"]["published"] is None
    assert blinded["dsv2"]["error"] is None
    # The control: a row for calibration does count.
    for row in rows:
        if row["calibration"] == "yes":
            row[row["quantity"]] = str(2 * float(row[row["quantity"]].replace("123", "100")))
    moved = by_id(validate_rows(read_rows(written(tmp_path / "c.csv", rows))))
    assert moved["korthikanti_1t_full"]["predicted"] != honest["korthikanti_1t_full"]["predicted"]


def test_the_document(tmp_path: Path) -> None:
    document = validate_rows(read_rows(written(tmp_path / "a.csv", cells())))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    rows = by_id(document)
    assert set(rows) == set(SOME)
    assert rows["falcon40b"]["skipped"].startswith("the row names no quantity: name one of")
    assert rows["mlperf51_llama31_8b_b200"]["skipped"].startswith("no number of tokens: fill tokens_t")
    one = rows["korthikanti_1t_full"]
    assert one["error"] == pytest.approx(one["predicted"] / one["published"] - 1)
    steps = next(group for group in document["groups"] if group["threshold"] == 0.05)
    assert steps["met"] is True
    assert all(len(each["fitted_on"]) >= 1 for each in document["parameters"].values())


def test_an_uncalibrated_chip_is_predicted_and_says_so(tmp_path: Path) -> None:
    row = {**cells(("dsv2",))[0], "id": "pangu", "model": "Pangu Ultra", "arch": "dense", "chip": "Ascend 910B"}
    row |= {"params_total_b": "135", "params_active_b": "135", "n_chips": "8192", "parallelism": "TP8 PP8"}
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [*cells(), row]))))["pangu"]
    assert found["predicted"] > 0
    assert any("no row calibrates Ascend 910B" in note for note in found["notes"])


def test_what_is_published_of_a_run_stands_in_for_what_its_row_leaves_out() -> None:
    rows = {row.id: row for row, _ in read_rows()}
    for row, batch, fixed in (
        ("dsv2", 9216, {"pipeline": 16}),
        ("opt175b", 1024, {"tensor": 8, "zero": 3}),
        ("bloom176b", 2048, {"interleave": 1}),
    ):
        case = case_of(rows[row])
        assert case.job.batch_size == batch
        assert fixed.items() <= dict(case.fixed).items()
    assert case_of(rows["dsv2"]).job.zero_bubble
    assert not case_of(rows["ds67b_per_T"]).job.zero_bubble
    assert rows["opt175b"].without_stops
    assert case_of(rows["titan_8b_8_bf16"]).job.batch_size == 512  # no whole run: a usual number


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no file"):
        read_rows(tmp_path / "none.csv")
    path = tmp_path / "a.csv"
    path.write_text("id,quantity\n1,2\n")
    with pytest.raises(RecipeError, match="lacks the columns model, chip"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(RecipeError, match="lacks the columns id, quantity, model, chip"):
        read_rows(path)
    path.write_text("id,quantity,model,chip\n")
    with pytest.raises(RecipeError, match="no row"):
        read_rows(path)
    path.write_text("id,quantity,model,chip\n1,2\n")
    with pytest.raises(RecipeError, match="another number of cells"):
        read_rows(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="no CSV"):
        read_rows(path)
    path.write_text("id,quantity,model,chip\nx,step_time_s,a,b\nx,step_time_s,a,b\n")
    with pytest.raises(RecipeError, match="twice"):
        read_rows(path)


def test_what_cannot_be_predicted_is_skipped_with_its_reason(tmp_path: Path) -> None:
    row = cells(("mosaic_13b_a100-40gb_16",))[0]
    rows = [
        {**row, "id": "chip", "chip": "Unheard-of 9000"},
        {**row, "id": "model", "model": "Unheard of", "params_total_b": ""},
        {**row, "id": "quantity", "quantity": "happiness"},
        {**row, "id": "zero", "parallelism": "TP0 PP2"},
        {**row, "id": "chunks", "parallelism": "TP2 PP2 VP0"},
        {**row, "id": "lower", "parallelism": "tp-0 pp2"},
        {**row, "id": "micro", "parallelism": "FSDP micro-batch 0"},
        {**row, "id": "shards", "parallelism": "FSDP0 TP8"},
        {**row, "id": "rounds", "parallelism": "DiLoCo H=0", "kind": "lowcomm_run"},
        {**row, "id": "huge", "model": "Unheard of", "params_total_b": "1e9", "params_active_b": ""},
        {**row, "id": "active", "model": "Unheard of", "arch": "moe", "params_active_b": ""},
    ]
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", rows))))
    assert "no figures for the chip" in found["chip"]["skipped"]
    assert "no number of parameters" in found["model"]["skipped"]
    assert "happiness" in found["quantity"]["skipped"]
    for name, words in (
        ("zero", "TP0"),
        ("lower", "tp-0"),
        ("chunks", "VP0"),
        ("micro", "micro-batch 0"),
        ("rounds", "H=0"),
        ("shards", "FSDP0"),
    ):
        assert words in found[name]["skipped"]
        assert "begin at 1" in found[name]["skipped"]
    assert "1e+09 B parameters" in found["huge"]["skipped"]
    assert "fill params_active_b" in found["active"]["skipped"]


@pytest.mark.parametrize("chip", ["H100-80GB", "h100", "H100 SXM", "NVIDIA H100 80GB HBM3"])
def test_a_chip_is_one_kind_however_a_row_spells_it(tmp_path: Path, chip: str) -> None:
    rows = cells(("mosaic_13b_h100-80gb_8", "mosaic_7b_h100-80gb_8"))
    as_h100 = [{**row, "chip": "H100"} for row in rows]
    spelled = [rows[0], {**as_h100[1], "chip": chip}]
    first, second = (
        by_id(validate_rows(read_rows(written(tmp_path / f"{name}.csv", each))))["mosaic_7b_h100-80gb_8"]
        for name, each in (("a", as_h100), ("b", spelled))
    )
    assert first["predicted"] == second["predicted"]
    assert (f"{chip!r} is taken for H100" in second["notes"]) == (chip != "h100")


@pytest.mark.parametrize(
    "chip",
    ["RTX A1000", "A100X", "A800 PCIe", "H100 PCIe", "NVIDIA H100 NVL", "B300", "GB300", "H2000", "Ascend 950DT",
     "Ascend 950DT NPU", "Ascend 910D",
     "Ascend 310P", "Ascend 310P NPU", "MI300A", "AMD Instinct MI300A", "MI350X",
     "H20-3e 141GB", "NVIDIA H20-3e", "H20 141GB", "GH200 144GB", "NVIDIA GH200 144G HBM3e"],
)  # fmt: skip
def test_a_chip_that_only_looks_like_a_known_one_is_refused(chip: str) -> None:
    row, _ = read_rows()[0]
    with pytest.raises(CannotPredict, match="no figures for the chip"):
        case_of(replace(row, chip=chip))


def test_a_file_without_rows_for_calibration_is_predicted_as_fitted_on_the_shipped_ones(tmp_path: Path) -> None:
    rows = cells(("mosaic_7b_h100-80gb_8",))
    document = validate_rows(read_rows(written(tmp_path / "a.csv", rows)))
    shipped = validate_rows(read_rows())
    assert by_id(document)["mosaic_7b_h100-80gb_8"]["predicted"] == by_id(shipped)["mosaic_7b_h100-80gb_8"]["predicted"]
    assert "mosaic_13b_h100-80gb_8" in document["parameters"]["H100"]["fitted_on"]
    assert len(document["rows"]) == 1


def test_a_row_that_is_not_described_moves_a_fit_less() -> None:
    rows = {row.id: (row, outcome.value) for row, outcome in read_rows()}
    case, told = case_of(rows["korthikanti_175b_full"][0]), case_of(rows["megatron175b_12288"][0])
    assert case.is_described
    assert not told.is_described
    alone = fit_kinds([(case, 18.13)])["A100 80 GB"].efficiency

    def moved(is_described: bool) -> float:
        guess = replace(told, is_described=is_described)
        return abs(fit_kinds([(case, 18.13), (guess, 119.4)])["A100 80 GB"].efficiency - alone)

    assert moved(False) < 0.5 * moved(True)


def test_a_reported_utilisation_is_counted_by_its_convention() -> None:
    row = next(row for row, _ in read_rows() if row.id == "llama3_405b_8k")

    def predicted(convention: str) -> float:
        case = case_of(replace(row, convention=convention))
        layout = Layout(data=64, tensor=8, pipeline=16, interleave=8, recompute="full")
        return predicted_value(case, layout, case.hardware)

    model = case_of(row).job.architecture
    assert predicted("palm") / predicted("") == pytest.approx(
        reported_flops_per_token(model, 8192) / train_flops_per_token(model, 8192)
    )
    # Published: 6 N + 12 L H Q T (arXiv 2204.02311, appendix B), N without the embedding, which is no product.
    inside = num_parameters(model) - model.hidden_size * model.vocab_size
    whole = 6 * inside + 12 * 126 * 16384 * 8192
    assert reported_flops_per_token(model, 8192) == pytest.approx(whole, rel=1e-4)
    assert predicted("megatron, incl. recompute") == pytest.approx(4 / 3 * predicted("megatron"))


def test_the_published_precision_of_a_run_stands_in_for_what_its_row_leaves_out() -> None:
    row = next(row for row, _ in read_rows() if row.id == "dsv2")
    assert not case_of(row).job.fp8
    v3 = replace(row, model="DeepSeek-V3", params_total=671e9, params_active=37e9)
    assert case_of(v3).job.fp8
    assert "precision not given: fp8 as published for DeepSeek-V3" in case_of(v3).notes
    assert not case_of(replace(v3, precision="bf16")).job.fp8
    assert not case_of(replace(v3, chip="Ascend 910B")).job.fp8
    assert any("int3" in note for note in case_of(replace(v3, precision="int3")).notes)


@pytest.mark.parametrize(
    ("text", "num_chips", "expected"),
    [
        ("TP8 CP1 PP16 DP64", 8192, {"tensor": 8, "pipeline": 16, "context": 1, "expert": 1}),
        ("FSDP32 TP8 AsyncTP, full AC", 256, {"tensor": 8, "pipeline": 1, "zero": 3, "recompute": "full"}),
        ("PP16 EP8 ZeRO-1", 2048, {"tensor": 1, "pipeline": 16, "expert": 8, "zero": 1}),
        ("TP8 + PP; sequence-parallel + selective recompute", 280, {"pipeline": 35, "recompute": "selective"}),
        ("FSDP + compile, selective AC", 8, {"zero": 3, "recompute": "alternate", "tensor": 1}),
        ("PP2 VP24 EP8", 16, {"interleave": 24, "pipeline": 2}),
        ("FSDP8 TP8 PP8 interleaved, full AC", 512, {"interleave": 2, "pipeline": 8, "zero": 2}),
        ("FSDP FULL_SHARD, micro-batch 14, bf16 sums", 32, {"micro_batch": 14, "zero": 3}),
        ("tp8, pp16, vpp5, dp64", 8192, {"tensor": 8, "pipeline": 16, "interleave": 5, "context": 1, "expert": 1}),
        ("TP-8 PP-16 EP-4", 8192, {"tensor": 8, "pipeline": 16, "expert": 4}),
        ("TP: 8, PP: 16, CP = 2, VPP 3", 8192, {"tensor": 8, "pipeline": 16, "context": 2, "interleave": 3}),
        ("fsdp tp=2", 64, {"tensor": 2, "pipeline": 1, "zero": 3}),
        ("tp8, no pp", 64, {"tensor": 8, "pipeline": 1}),
        ("", 16, {}),
    ],
)
def test_words_of_a_layout(text: str, num_chips: int, expected: dict[str, Any]) -> None:
    words = layout_words(text, num_chips)
    assert expected.items() <= words.fixed.items()
    assert words.tensor_overlap == ("AsyncTP" in text)
