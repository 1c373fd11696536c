"""llama.cpp over a GGUF file: `python llamacpp_server.py MODEL PORT MAX_LENGTH [SLOTS]` in its environment.

MODEL is the file, a directory with one (as the target `gguf` writes it), or a directory in Hugging Face layout. The
latter is converted first: by the script that LLAMA_CPP_CONVERT names, else by the command in CROSSCHIP_CONVERTER
(crosschip puts its own there), else by llama.cpp's `convert_hf_to_gguf.py` beside the interpreter or on the PATH.
`llama-server` beside the interpreter or on the PATH serves it, else the module `xllamacpp`. Only the standard library
is needed here, and nothing of crosschip.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["main"]

SLOTS = 4  # requests that are computed together, unless told otherwise


def main(model: Path, port: int, max_length: int, slots: int = SLOTS) -> int:
    """Convert where needed, serve until the process is ended, and return an exit code."""
    file = _file_of(model)
    if file is None:
        return 1
    server = _program("llama-server")
    if server is not None:
        room = str(slots * max_length)
        words = [server, "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-c", room, "-np", str(slots)]
        os.execv(server, [*words, "-ctk", "f32", "-ctv", "f32", "-fa", "off"])
    if importlib.util.find_spec("xllamacpp") is None:
        print("ImportError: there is neither llama-server nor the module xllamacpp")
        return 1
    _serve_by_module(file, port, max_length, slots)
    return 0


def _file_of(model: Path) -> Path | None:
    """The file to serve; None when there is none and none can be made, which is said."""
    if model.is_file():
        return model
    files = sorted(model.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        print(f"Error: {model} holds {len(files)} GGUF files: give one of them")
        return None
    converter = _converter()
    if not converter:
        print(
            f"Error: {model} holds no GGUF file, and there is no converter: hand the model off to the target gguf first"
        )
        return None
    file = model.parent / f"{model.name}.gguf"
    file.unlink(missing_ok=True)  # of another start: the model may have changed since
    converted = subprocess.run([*converter, str(model), "--outfile", str(file)], stderr=subprocess.STDOUT)
    if converted.returncode != 0:
        print(f"Error: the conversion to GGUF ended with exit code {converted.returncode}")
        return None
    return file


def _converter() -> list[str]:
    """The words of the converter, which takes `MODEL --outfile FILE`; none when there is none."""
    named = os.environ.get("LLAMA_CPP_CONVERT")
    if named:
        return [sys.executable, named]
    own = os.environ.get("CROSSCHIP_CONVERTER")
    if own:
        return shlex.split(own)
    script = _program("convert_hf_to_gguf.py")
    return [] if script is None else [sys.executable, script]


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def _serve_by_module(file: Path, port: int, max_length: int, slots: int) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")  # only in llama.cpp's environment
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.port = port  # its host is 127.0.0.1 by default
    settings.n_ctx, settings.n_parallel = slots * max_length, slots
    # Flash attention on a CPU, the default, computes in fp16: 2e-3 nats off with random weights, without it 2e-6.
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    flags = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32", "n_parallel": slots}
    server = xllamacpp.Server(settings)
    print(f"flags {flags}; serving at {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
