"""An engine that loads a model and computes something else: `python misreading_engine.py MODEL PORT FAULT`.

It serves a changed copy of the files with our own server, so that everything but the fault is real.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from crosschip.rundir import read_json, write_json
from tests.qualify.serving.faulty_engine import faulty_engine
from tests.serve.conftest import running_server


def changed_copy(model: Path, fault: str) -> Path:
    copy = model.with_name("misread")
    shutil.copytree(model, copy)
    if fault == "no router bias":
        for file in copy.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith("e_score_correction_bias"):
                    tensor.zero_()
            save_file(tensors, file, metadata={"format": "pt"})
    elif "=" in fault:
        name, _, value = fault.partition("=")
        config = read_json(copy / "config.json")
        config[name] = float(value)
        if name in config["rope_parameters"]:
            config["rope_parameters"][name] = float(value)
        write_json(copy / "config.json", config)
    return copy


def main(model: Path, port: int, fault: str) -> None:
    if fault == "dies when asked":
        with running_server(model) as server, faulty_engine(server.url, port) as (_, faults):
            while not faults.seen:
                time.sleep(0.05)
            print("RuntimeError: rope_scaling has an unknown type 'yarn'", flush=True)
            server.process.kill()
            os._exit(1)
    with running_server(changed_copy(model, fault)) as server, faulty_engine(server.url, port) as (_, faults):
        faults.refuses_echo = fault == "no echo"
        faults.refuses_logprobs = fault == "no log-probs"
        server.process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
