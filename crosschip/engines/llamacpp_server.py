"""llama.cpp over a Hugging Face directory: `python llamacpp_server.py MODEL PORT MAX_LENGTH` in its environment.

Two steps: llama.cpp's own `convert_hf_to_gguf.py` makes the file, then `llama-server` or the module `xllamacpp` serves
it. Both are looked for beside the interpreter and on the PATH; LLAMA_CPP_CONVERT names another converter. Only the
standard library is needed here, and nothing of crosschip.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(model: Path, port: int, max_length: int) -> int:
    """Convert, serve until the process is ended, and return an exit code."""
    converter = os.environ.get("LLAMA_CPP_CONVERT") or _program("convert_hf_to_gguf.py")
    if converter is None:
        print("ImportError: convert_hf_to_gguf.py is neither beside the interpreter nor on the PATH; LLAMA_CPP_CONVERT")
        return 1
    file = model.parent / f"{model.name}.gguf"
    converted = subprocess.run([sys.executable, converter, str(model), "--outfile", str(file), "--outtype", "auto"])
    if converted.returncode != 0:
        print(f"Error: the conversion to GGUF ended with exit code {converted.returncode}")
        return converted.returncode
    server = _program("llama-server")
    if server is not None:
        words = [server, "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-c", str(max_length), "-np", "1"]
        os.execv(server, [*words, "-ctk", "f32", "-ctv", "f32", "-fa", "off"])
    if importlib.util.find_spec("xllamacpp") is None:
        print("ImportError: there is neither llama-server nor the module xllamacpp")
        return 1
    _serve_by_module(file, port, max_length)
    return 0


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def _serve_by_module(file: Path, port: int, max_length: int) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")  # only in llama.cpp's environment
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.port = port  # its host is 127.0.0.1 by default
    settings.n_ctx, settings.n_parallel = max_length, 1
    # Flash attention on a CPU, the default, computes in fp16: 2e-3 nats off with random weights, without it 2e-6.
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    print(f"serving at {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
