"""Which chip a rank takes."""

from __future__ import annotations

import pytest
import torch

from crosschip.errors import ChipError, RecipeError
from crosschip.train.group.device import find_rank_chip

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about a machine without accelerators")


@pytest.fixture
def second_of_two(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CROSSCHIP_SIM", raising=False)


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_all_ranks_share_the_cpu(second_of_two, wanted: str) -> None:
    assert find_rank_chip(wanted).device == torch.device("cpu")


def test_a_rank_takes_the_chip_of_its_own_number(second_of_two) -> None:
    with pytest.raises(ChipError, match="cuda"):
        find_rank_chip("cuda")  # there is none; with one chip, the message would name cuda:1


def test_one_chip_is_not_enough_for_several_ranks(second_of_two) -> None:
    with pytest.raises(RecipeError, match=r"chips.train = 'npu:0' is one chip, and 2 ranks want one each\n.*'npu'"):
        find_rank_chip("npu:0")
