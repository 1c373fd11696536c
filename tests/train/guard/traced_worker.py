"""A rank that trains a small layer on the simulated chip, its operators traced where that is asked for."""

import sys
from pathlib import Path

import torch

from crosschip.chips.simulated import activate
from crosschip.train.guard.heartbeat import open_heartbeat
from crosschip.train.guard.operator_trace import StepTracing

state = Path(sys.argv[1])
torch.set_num_threads(1)
heartbeat = open_heartbeat(start_allowance_s=60.0, slack_s=1.5)
activate(sys.argv[2])
tracing = StepTracing(heartbeat)
layer = torch.nn.Linear(8, 8).to("sim")
(state / "attempts").open("a").write("one\n")
for step in range(1, 13):
    heartbeat.beat("forward-backward", step)
    with tracing.step():
        torch.nn.functional.gelu(layer(torch.ones(4, 8, device="sim"))).sum().backward()
heartbeat.leave(0)
