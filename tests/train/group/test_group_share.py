from typing import Any

import pytest
import torch

from crosschip.data import NOT_TRAINED
from crosschip.errors import RecipeError
from crosschip.model import ModelConfig
from crosschip.recipe import ParallelSettings, StageSettings, parse_recipe
from crosschip.train.group.layout import check_batch_size, check_experts, check_layout
from crosschip.train.group.share import share_of_batch
from crosschip.train.group.world import ALONE, Alone
from tests.train.group.ranks import PAD, MadeStream


class OneOf(Alone):
    """A rank of several, without the others; the widest batch is known."""

    def __init__(self, rank: int, size: int, width: int) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "_width", width)

    def largest(self, number: int) -> int:
        return max(number, self._width)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_shares_of_all_ranks_are_the_whole_batch(size: int) -> None:
    stream: Any = MadeStream(masked=True)
    whole = stream.batch(24, 8)
    width = whole.input_ids_BT.shape[1]
    shares = [share_of_batch(stream, 24, 8, PAD, OneOf(rank, size, width)) for rank in range(size)]
    assert torch.equal(torch.cat([share.input_ids_BT for share in shares]), whole.input_ids_BT)
    assert torch.equal(torch.cat([share.labels_BT for share in shares]), whole.labels_BT)


def test_what_is_filled_up_is_not_trained() -> None:
    stream: Any = MadeStream(masked=True)
    own = stream.batch(0, 1)
    share = share_of_batch(stream, 0, 4, 9, OneOf(0, 4, 30))
    filled = share.labels_BT[:, own.labels_BT.shape[1] :]
    assert filled.numel()
    assert (filled == NOT_TRAINED).all()
    assert (share.input_ids_BT[:, own.input_ids_BT.shape[1] :] == 9).all()


def test_a_batch_that_cannot_be_shared_says_which_can() -> None:
    stage = StageSettings(steps=100, batch_size=16, gradient_accumulation=2)
    check_batch_size("train", stage, 4)
    with pytest.raises(
        RecipeError,
        match=r"train.batch_size = 16 is not a multiple of 6 \(groups.num_groups = 1 x 3 ranks x "
        r"train.gradient_accumulation = 2\)\n.*train.batch_size = 12 or 18",
    ):
        check_batch_size("train", stage, 3)
    with pytest.raises(RecipeError, match=r"sft.batch_size = 32,"):
        check_batch_size("sft", stage, 16)


def test_a_share_of_a_group_must_be_shared_by_its_ranks() -> None:
    document = {"name": "x", "data": {"source": "arithmetic"}, "groups": {"num_groups": 2}}
    recipe = parse_recipe({**document, "train": {"steps": 100, "batch_size": 6}}, "here")
    check_layout(recipe, 1)
    check_layout(recipe, 3)
    with pytest.raises(
        RecipeError, match=r"6 is not a multiple of 4 \(groups.num_groups = 2 x 2 ranks x .*\n.*= 4 or 8"
    ):
        check_layout(recipe, 2)


@pytest.mark.parametrize(
    ("experts", "ranks", "config", "told"),
    [
        (4, 6, {}, r"expert_parallel = 4 does not divide the number of ranks, 6\n.*--nproc 4"),
        (3, 6, {}, r"expert_parallel = 3 does not divide model.n_routed_experts = 8"),
        (2, 6, {"hidden_size": 256}, r"hidden_size = 256 is not a multiple of 3, .*6 ranks"),
        (2, 10, {"hidden_size": 320}, r"moe_intermediate_size = 256 is not a multiple of 5"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(experts: int, ranks: int, config: dict[str, int], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_experts(ParallelSettings(expert_parallel=experts), ModelConfig(vocab_size=64, **config), ranks)


def test_layouts_that_can_be() -> None:
    for experts, ranks in ((1, 1), (1, 3), (2, 2), (2, 8), (8, 8)):
        check_experts(ParallelSettings(expert_parallel=experts), ModelConfig(vocab_size=64), ranks)


def test_expert_parallelism_needs_ranks() -> None:
    with pytest.raises(RecipeError, match=r"the number of ranks, 1\n"):
        check_experts(ParallelSettings(expert_parallel=2), ModelConfig(vocab_size=64), 1)


def test_a_process_alone_agrees_with_itself() -> None:
    tensor = torch.arange(3.0)
    assert ALONE.sum(tensor) is tensor
    assert ALONE.norm(tensor) is tensor
    assert ALONE.totals([1, 2]) == [1, 2]
    assert ALONE.largest(7) == 7
    assert ALONE.from_rank_zero(lambda: "made") == "made"
    assert ALONE.from_all("made") == ["made"]
    with ALONE.rank_zero_first():
        pass
