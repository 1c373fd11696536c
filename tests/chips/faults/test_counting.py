"""A count of what a fault really changed, with faults that are planted beside it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from crosschip.chips.faults import CountingFault, faults_from
from crosschip.chips.simulated import plant


class OnlyTheThird:
    """Changes one bit in the third call of `mul`, sleeps in `exp`, refuses `tanh`, and is honest elsewhere."""

    name = "third"

    def __init__(self) -> None:
        self.seen = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Any) -> Any:
        kind = op._schema.name.split("::")[1].rstrip("_")
        if kind == "tanh":
            raise RuntimeError("no tanh")
        result = compute(*args, **kwargs)
        if kind == "exp":
            time.sleep(0.01)
        if kind == "mul":
            self.seen += 1
            if self.seen == 3:
                result.view(torch.int32).view(-1)[0] ^= 1
        return result


def test_counts_are_by_operator_and_exact() -> None:
    count = CountingFault(OnlyTheThird())
    x = torch.rand(5).to("sim")
    plant([count])
    for _ in range(2):
        x * 2.0
    x.mul_(2.0)  # in place: the honest result must not be taken from what the fault has written
    x * 2.0
    x.exp()
    torch.add(x, 1.0, out=torch.empty(5, device="sim"))
    with pytest.raises(RuntimeError, match="no tanh"):
        x.tanh()
    torch.rand(3, device="sim")
    plant([])
    assert count.calls["mul"] == 4
    assert count.changed == {"mul": 1}
    assert count.raised == {"tanh": 1}
    assert count.late == {"exp": 1}
    assert count.num_affected == 3
    document = count.document()
    assert document["fault"] == "third"
    assert document["changed"] == {"mul": 1}


def test_an_honest_chip_changes_nothing() -> None:
    count = CountingFault(OnlyTheThird())
    x = torch.tensor([torch.nan, -0.0, 1.0]).to("sim")
    plant([count])
    x + x
    x.view(3, 1).t()
    torch._foreach_add_([x, x.clone()], 1.0)
    plant([])
    assert count.num_affected == 0


def test_errors_of_the_honest_chip_are_not_the_faults() -> None:
    count = CountingFault(OnlyTheThird())
    x = torch.rand(3).to("sim")
    plant([count])
    with pytest.raises(RuntimeError):
        torch.mm(x, x)
    plant([])
    assert count.num_affected == 0


def test_counted_fault_gives_the_same_results() -> None:
    a = torch.rand(16, 16).to("sim")
    plant(faults_from("sim:N11,factor=1.5"))
    expected = (a @ a).cpu()
    (fault,) = faults_from("sim:N11,factor=1.5")
    count = CountingFault(fault)
    plant([count])
    assert torch.equal((a @ a).cpu(), expected)
    assert torch.equal(a.mm(a).cpu(), expected)
    plant([])
    assert count.changed == {"mm": 2}
