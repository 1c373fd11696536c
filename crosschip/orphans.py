"""A process that ends when the one that started it is gone: a killed launcher leaves nothing behind. No torch.

Ranks that lived on would hold their devices, and go on writing beside the run that is started after them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

__all__ = ["PARENT", "end_with_launcher", "end_with_parent"]

PARENT = "CROSSCHIP_PARENT"  # the process id of who starts a process, told to it in its environment
_PR_SET_PDEATHSIG = 1  # prctl(2)
_SYSTEM = ctypes.CDLL(None) if sys.platform == "linux" else None  # looked up before a fork, not after
_LOOK_EVERY_S = 0.5


def end_with_launcher() -> None:
    """Let this process be killed as soon as the one that launched it ends, which may have told its process id.

    That is taken out of the environment: what this process starts has another parent.
    """
    launcher = os.environ.pop(PARENT, None)
    end_with_parent(None if launcher is None else int(launcher))


def end_with_parent(parent: int | None = None) -> None:
    """Let this process be killed as soon as its parent ends; `parent` is who started it, where that is known.

    Also for the `preexec_fn` of a process. On Linux the kernel does it, also while the interpreter is held up;
    elsewhere a thread looks now and then.
    """
    known = os.getppid() if parent is None else parent
    if _SYSTEM is not None:
        _SYSTEM.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(known,), name="end-with-parent", daemon=True).start()
    if os.getppid() != known:  # it ended before it could be watched
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)
