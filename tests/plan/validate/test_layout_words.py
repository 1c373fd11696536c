"""Words of a layout: what leaves a pipeline open, what is noted as not read, and layouts that only split the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crosschip.plan.validate import Row, read_rows
from crosschip.plan.validate.cases import case_of
from crosschip.plan.validate.parallelism import layout_words
from crosschip.plan.validate.predicting import choose_layout


def row(name: str, **changes: Any) -> Row:
    return replace(next(row for row, _ in read_rows() if row.id == name), **changes)


@pytest.mark.parametrize(
    ("text", "num_chips", "stages"),
    [
        ("TP8 + PP", 512, 64),
        ("TP8 CP2 PP", 512, 32),
        ("TP8 + PP", 2048, None),
        ("TP8 + PP", None, None),
        ("PP, EP8", 512, None),
        ("FSDP TP8 PP", None, None),
    ],
)
def test_a_pipeline_without_a_width_is_open_where_the_chips_do_not_tell_it(
    text: str, num_chips: int | None, stages: int | None
) -> None:
    words = layout_words(text, num_chips, most_stages=96)
    assert words.fixed.get("pipeline") == stages
    assert words.is_named == (stages is not None)
    assert any("pipeline and recompute" in note for note in words.notes) == (stages is None)


def test_an_open_pipeline_is_searched_for_and_not_made_of_all_chips() -> None:
    case = case_of(row("korthikanti_175b_full", num_chips=2048, global_batch="2048 seqs"))
    case, layout = choose_layout(case, case.hardware)
    assert layout.tensor == 8
    assert layout.data > 1
    assert not any("smallest layout" in note for note in case.notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8-way model parallel, 16-way pipeline", {"tensor": 8, "pipeline": 16}),
        ("MP8 PP16", {"tensor": 8, "pipeline": 16}),
        ("TP8 PP8 MP64", {"tensor": 8, "pipeline": 8}),
        ("TP8 PP16 MBS2", {"micro_batch": 2}),
        ("TP8 PP16 micro batch size 4", {"micro_batch": 4}),
        ("TP8 PP16, non-interleaved", {"interleave": 1}),
        ("TP8 PP16, not interleaved", {"interleave": 1}),
        ("TP8 PP16 without interleaving", {"interleave": 1}),
        ("TP8 PP16 VP4, interleaved", {"interleave": 4}),
        ("TP8 PP8, virtual pipeline 4", {"interleave": 4}),
        ("TP8 PP8 virtual pipeline parallel size: 6", {"interleave": 6}),
        ("TP8 PP16, selective activation recomputation", {"recompute": "selective"}),
        ("FSDP, selective activation checkpointing", {"recompute": "alternate"}),
        ("DP4 FSDP32 TP8", {"shard": 32, "zero": 3, "tensor": 8}),
        ("ZeRO-3", {"zero": 3, "tensor": 1, "pipeline": 1}),
        ("ZeRO stage 3, TP4", {"zero": 3, "tensor": 4}),
    ],
)
def test_more_words_of_a_layout(text: str, expected: dict[str, Any]) -> None:
    words = layout_words(text, 4096)
    assert expected.items() <= words.fixed.items()


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("TP8 PP16 SP8", ["SP8"]),
        ("TP8, Ulysses 4, HSDP", ["Ulysses 4", "HSDP"]),
        ("TP8 PP8 MP64", ["MP64"]),
        ("full recompute, ring attention", ["ring attention"]),
        ("TP8 CP1 PP16 DP64", []),
        ("TP8, PP8, SP, ZeRO-1 DP", []),
        ("SparseLoCo H=30, 15 peers x 8", ["15 peers"]),
        ("TP8xPP16xDP64, full recompute", []),
        ("FSDP FULL_SHARD, full act ckpt, bf16 sums", []),
        ("TP8 + PP; sequence-parallel + selective recompute", []),
        ("8-way tensor and 16-way pipeline parallelism, zero bubble", []),
        ("DiLoCo H=100 x FSDP8", []),
        ("tp8, no pp, AsyncTP", []),
    ],
)
def test_what_of_a_layout_is_not_read_is_noted(text: str, unread: list[str]) -> None:
    notes = [note for note in layout_words(text, 1024).notes if "nothing is read of" in note]
    wanted = ", ".join(map(repr, unread))
    assert notes == ([f"of the layout {text!r} nothing is read of {wanted}"] if unread else [])


def test_a_width_of_the_data_alone_is_a_layout() -> None:
    case = case_of(row("llama2_7b", parallelism="DP64, ZeRO-1", num_chips=None))
    assert case.num_chips == 64
    assert {"tensor": 1, "pipeline": 1, "zero": 1}.items() <= dict(case.fixed).items()
    _, layout = choose_layout(case, case.hardware)
    assert (layout.data, layout.tensor, layout.pipeline) == (64, 1, 1)


def test_on_more_chips_than_a_width_of_the_data_the_rest_is_searched_for() -> None:
    case = case_of(row("llama3_405b_8k", parallelism="DP64"))
    assert (
        "of the layout only 64 data-parallel replicas are given: the best one that fits is searched for" in case.notes
    )
    assert not case.is_described
    _, layout = choose_layout(case, case.hardware)
    assert layout.data == 64
    assert layout.tensor * layout.pipeline * layout.context == 128


def test_chips_of_a_row_and_of_its_layout_that_differ_are_noted() -> None:
    case = case_of(row("llama3_405b_8k", num_chips=4096))
    assert "the widths of 'TP8 CP1 PP16 DP64' are of 8192 chips: n_chips = 4096 counts" in case.notes
    assert not any("n_chips" in note for note in case_of(row("llama3_405b_8k")).notes)


def test_hybrid_sharding_is_over_the_shards_that_are_named() -> None:
    case = case_of(row("titan_70b_256_fp8", parallelism="DP4 FSDP32 TP8", num_chips=None))
    assert case.num_chips == 1024
    _, layout = choose_layout(case, case.hardware)
    assert (layout.data, layout.shard, layout.zero) == (128, 32, 3)


@pytest.mark.parametrize("words", ["DualPipe", "zero bubble", "Zero-Bubble", "ZB-H1"])
def test_a_filled_bubble_is_read_of_any_row(words: str) -> None:
    throughput = row("mbridge_deepseek-v3_deepseek-v3_gb200_256_mxfp8")
    assert not case_of(throughput).job.zero_bubble
    assert case_of(replace(throughput, parallelism=f"{throughput.parallelism} {words}")).job.zero_bubble
