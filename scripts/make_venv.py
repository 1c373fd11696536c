"""Make `.venv` and install crosschip into it, once. The Makefile calls it before each target.

    python3 scripts/make_venv.py run     # what crosschip needs
    python3 scripts/make_venv.py dev     # and what its tests and linters need

A second call finds the stamp and installs nothing. The stamp holds two keys: where and from which interpreter the
environment was made (another one: it is made again) and the contents of pyproject.toml and this file (changed: pip
runs again). An environment whose set-up was interrupted is made again from nothing.

There is never a second torch. The first of these rules that applies decides where torch comes from:

1. `TORCH_INSTALL="..."` in the environment is handed to pip as it is (another index, a ROCm or XPU build).
2. The base interpreter has a torch in range, or a vendor's plug-in for torch: its packages are kept in sight.
3. Linux with an Nvidia GPU, and macOS: the plain wheel of the configured index.
4. Linux without one: the CPU wheel, from the configured index or else from download.pytorch.org.

This file is also read by interpreters that are too old, so that they can be told so: no syntax newer than Python 3.6.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "crosschip-setup.json"
PYTHON_IN_VENV = VENV / "bin" / "python"
EXTRAS = {"run": "", "dev": "[dev]"}
LOWEST_PYTHON = (3, 11)
TORCH_RANGE = ((2, 11), (2, 14))  # the same as in pyproject.toml; a test compares them
TORCH_REQUIREMENT = "torch>=2.11,<2.14"
CPU_TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VENDOR_PLUGINS = (
    "torch_npu",
    "torch_mlu",
    "torch_musa",
    "torch_sdaa",
    "torch_gcu",
    "habana_torch_plugin",
    "torch_neuronx",
)


class SetupError(Exception):
    """Something the user has to mend; the message says what and how."""


def say(line):
    """Print a line of progress."""
    print("set-up: " + line, flush=True)


def installed_version(distribution):
    """The version of a distribution of this interpreter, without importing it; None when it is absent."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def torch_in_range(version):
    """Whether pip would take this version for `TORCH_REQUIREMENT`; a pre-release of the lowest one is below it."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(a|b|rc|\.dev)?", version)
    if match is None:
        return False
    minor = (int(match.group(1)), int(match.group(2)))
    if minor == TORCH_RANGE[0] and int(match.group(3) or 0) == 0 and match.group(4):
        return False
    return TORCH_RANGE[0] <= minor < TORCH_RANGE[1]


def keeps_base_packages():
    """Whether the base interpreter's torch (or a vendor's plug-in beside it) is to be used; says why."""
    torch = installed_version("torch")
    plugins = ", ".join(name for name in VENDOR_PLUGINS if installed_version(name))
    if torch and torch_in_range(torch):
        say(f"the interpreter has torch {torch}{' with ' + plugins if plugins else ''}: it is kept")
        return True
    if plugins:
        raise SetupError(
            f"{plugins} is installed beside torch {torch or '(none)'}, and crosschip needs {TORCH_REQUIREMENT}.\n"
            "  what to do: install the plug-in's line for one of these torch versions, or choose another interpreter "
            "with PYTHON=..."
        )
    if torch:
        say(f"the interpreter's torch {torch} is outside {TORCH_REQUIREMENT}: it stays there, .venv gets its own")
    return False


def has_nvidia_gpu():
    """Whether this machine has an Nvidia GPU with a driver."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return listing.returncode == 0 and b"GPU " in listing.stdout


def run_pip(*arguments, **options):
    """Call the environment's `pip install`; its progress bars are shown on a terminal only."""
    command = [str(PYTHON_IN_VENV), "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        command.append("--quiet")
    return subprocess.run([*command, *arguments], **options)


def pip(*arguments):
    """Call the environment's `pip install` and raise when it fails."""
    if run_pip(*arguments).returncode:
        raise SetupError(
            "pip install {} failed; its own message stands above.\n  what to do: check the network and pip's "
            "index settings (`pip config list`), then run the same command again".format(" ".join(arguments))
        )


def install_torch():
    """Install the one torch of an environment that does not use the base interpreter's."""
    wanted = os.environ.get("TORCH_INSTALL")
    if wanted:
        say("installing torch as TORCH_INSTALL says: " + wanted)
        pip(*wanted.split())
    elif platform.system() != "Linux":
        say("installing torch for " + platform.system())
        pip(TORCH_REQUIREMENT)
    elif has_nvidia_gpu():
        say("an Nvidia GPU is here: installing the CUDA build of torch")
        pip(TORCH_REQUIREMENT)
    else:
        if Path("/dev/kfd").exists():
            say(
                "an AMD GPU is here; for it, call make again with TORCH_INSTALL='--index-url "
                "https://download.pytorch.org/whl/rocm6.4 torch' (or your ROCm version) after `make clean`"
            )
        install_cpu_torch()


def install_cpu_torch():
    """Install the CPU build, without the gigabytes of CUDA that the plain wheel brings."""
    requirement = f"torch=={CPU_TORCH}+cpu"
    say("no GPU that torch's plain wheel serves: installing " + requirement)
    first_try = run_pip(requirement, stderr=subprocess.PIPE)
    if first_try.returncode == 0:
        return
    say("the configured index does not have it: taking it from " + CPU_INDEX)
    try:
        pip("--index-url", CPU_INDEX, "torch==" + CPU_TORCH)
    except SetupError:
        sys.stderr.write("the first attempt said:\n" + first_try.stderr.decode(errors="replace"))
        raise


def torches_in_venv():
    """Versions of every torch the environment can see, its own first."""
    code = """
import json, os
from importlib.metadata import distributions
torches = [d for d in distributions() if (d.metadata["Name"] or "").lower() == "torch"]
print(json.dumps(list({os.path.realpath(d.locate_file("")): d.version for d in torches}.values())))
"""
    listing = subprocess.run([str(PYTHON_IN_VENV), "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(listing.stdout.decode())


def make_empty_venv(system_site_packages):
    """Make `.venv`, marked as unfinished from its first moment on."""
    VENV.mkdir()
    write_stamp({"unfinished": True})
    options = ["--system-site-packages"] if system_site_packages else []
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    if not has_ensurepip:
        options.append("--without-pip")
    if (
        importlib.util.find_spec("venv") is None
        or subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)]).returncode
    ):
        raise SetupError(
            "python's venv module is missing or failed.\n  what to do: install it (Debian, Ubuntu: "
            "apt install python3-venv), or choose another interpreter with PYTHON=..."
        )
    if not has_ensurepip:  # Debian splits ensurepip off; the interpreter's own pip can do its work
        command = [sys.executable, "-m", "pip", "--python", str(PYTHON_IN_VENV), "install", "--quiet", "pip"]
        if subprocess.run(command).returncode:
            raise SetupError(
                "neither ensurepip nor a pip of 22.3 or newer is here.\n  what to do: install one (Debian, "
                "Ubuntu: apt install python3-venv), or choose another interpreter with PYTHON=..."
            )


def clear_the_place():
    """Remove our own unfinished or outdated environment; set one that is not ours aside, never delete it."""
    if not VENV.exists() and not VENV.is_symlink():
        return
    if STAMP.exists() or (VENV.is_dir() and not any(VENV.iterdir())):
        shutil.rmtree(str(VENV))
        return
    aside = ROOT / (".venv.aside-" + time.strftime("%Y%m%d-%H%M%S"))
    VENV.rename(aside)
    say(f".venv was not made by this set-up; it is now {aside.name}")


def read_stamp():
    """The stamp; an absent or damaged one counts as unfinished."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {"unfinished": True}
    return stamp if isinstance(stamp, dict) else {"unfinished": True}


def write_stamp(stamp):
    """Write the stamp so that it is there as a whole or not at all."""
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=2) + "\n")
    temporary.replace(STAMP)


def current_keys():
    """What an environment depends on: `made_by` decides if it is made again, `packages` if pip runs again."""
    made_by = [sys.executable, sys.version, str(VENV), os.environ.get("TORCH_INSTALL", "")]
    contents = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return {"made_by": made_by, "packages": hashlib.sha256(contents).hexdigest()}


def is_usable(stamp, keys):
    """Whether the environment that is there can be kept."""
    if (
        stamp.get("unfinished")
        or stamp.get("made_by") != keys["made_by"]
        or not os.access(str(PYTHON_IN_VENV), os.X_OK)
    ):
        return False
    return subprocess.run([str(PYTHON_IN_VENV), "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0


def install(extra, stamp, keys):
    """Bring the environment to what `extra` needs and stamp it."""
    started = time.time()
    if not is_usable(stamp, keys):
        clear_the_place()
        keep = not os.environ.get("TORCH_INSTALL") and keeps_base_packages()
        say("making .venv with Python " + platform.python_version())
        make_empty_venv(keep)
        if not keep:
            install_torch()
        stamp = {}
    write_stamp(dict(stamp, unfinished=True))
    torches = torches_in_venv()
    if len(torches) != 1:
        raise SetupError(
            f"the environment sees {len(torches)} installations of torch ({', '.join(torches)}) instead of one.\n"
            "  what to do: remove all but one from the interpreter, then `make clean`"
        )
    constraints = VENV / "crosschip-constraints.txt"
    constraints.write_text(f"torch=={torches[0]}\n")
    say(f"installing crosschip{EXTRAS[extra]} with torch {torches[0]}")
    try:
        pip("--constraint", str(constraints), "--editable", str(ROOT) + EXTRAS[extra])
        assert torches_in_venv() == torches, "pip changed torch in spite of the constraint"
    except SetupError:
        if stamp:  # pip found no way before it changed anything: what was there still works
            write_stamp(stamp)
        raise
    done = sorted({extra} | set(stamp.get("extras", []) if stamp.get("packages") == keys["packages"] else []))
    write_stamp(dict(keys, extras=done, torch=torches[0]))
    say("done in %.0f s" % (time.time() - started))


def leave_virtual_environment():
    """Go on as the base interpreter when called from inside a virtual environment, which may be `.venv` itself."""
    base = getattr(sys, "_base_executable", sys.executable)
    if sys.prefix != sys.base_prefix and base != sys.executable:
        if Path(sys.prefix).resolve() != VENV.resolve():
            say(f"{sys.prefix} is a virtual environment; its base {base} makes .venv, so its packages are not used")
        os.execv(base, [base, *sys.argv])


def main():
    """Make the environment or find it made."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        raise SetupError("usage: python3 scripts/make_venv.py run|dev")
    if sys.version_info < LOWEST_PYTHON:
        raise SetupError(
            f"Python {platform.python_version()} at {sys.executable} is too old: crosschip needs 3.11 or newer.\n"
            "  what to do: install one and call make PYTHON=/path/to/python3.11"
        )
    leave_virtual_environment()
    extra = sys.argv[1]
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second one waits and then finds the stamp
        stamp, keys = read_stamp(), current_keys()
        has_extra = extra in stamp.get("extras", []) or "dev" in stamp.get("extras", [])
        if not (is_usable(stamp, keys) and stamp["packages"] == keys["packages"] and has_extra):
            install(extra, stamp, keys)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        sys.exit("\nset-up: interrupted; the next call starts it again")
