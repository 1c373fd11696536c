"""A rank of a group of processes: prints the checksum of a model whose weights are cut over the ranks, summed."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from crosschip.train.guard.checksum import parameter_checksum

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
whole = int(parameter_checksum(model))
dist.init_process_group("gloo")
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
total = parameter_checksum(model)
dist.all_reduce(total)
if os.environ["RANK"] == "0":
    print(whole, int(total))
dist.destroy_process_group()
