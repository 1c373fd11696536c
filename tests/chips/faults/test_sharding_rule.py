"""W4: DTensor's rule for an operator goes away when ranks meet on the chip, and only that rule."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crosschip.chips.faults.sharding import ShardingRuleMissing

ALONE = """
import tempfile, torch, torch.distributed as dist
from crosschip.chips.simulated import activate
activate("sim:{fault}")
dist.init_process_group("sim_ccl", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
mesh = init_device_mesh("sim", (1,))
x = distribute_tensor(torch.ones(4, device="sim"), mesh, [Shard(0)])
print((x + 1).sum().full_tensor().item())
try:
    print(torch.sqrt(x).full_tensor().cpu().tolist())
except NotImplementedError as error:
    print(error)
print(torch.sqrt(torch.ones(1, device="sim")).item())
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("W4,operator=sqrt", "Operator aten.sqrt.default does not have a sharding strategy registered."),
        ("W4,operator=exp", "[1.0, 1.0, 1.0, 1.0]"),
    ],
)
def test_one_operator_has_no_rule(fault: str, told: str) -> None:
    script = ALONE.replace("{fault}", fault)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines() == ["8.0", told, "1.0"], found.stderr


def test_an_operator_that_never_had_a_rule_is_our_mistake() -> None:
    with pytest.raises(RuntimeError, match="no sharding rule for 'no_such_thing'"):
        ShardingRuleMissing("no_such_thing").collective("connect", [], lambda tensors: tensors)
