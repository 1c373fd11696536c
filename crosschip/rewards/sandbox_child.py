"""The inside of the sandbox: `python -I sandbox_child.py CONTROL_FD`, by its path and with the standard library alone.

Three processes. The *launcher*, still as our user, shuts the doors, watches the clock and ends what is left over. The
*init* is the first process of a namespace for processes, where there is one: whatever the candidate starts ends with
it. The *candidate* gives up its user and its rights, says `ready`, runs the code and the tests, and says the token.

What cannot be set up is told as `refused DOOR WHY` before `ready`; what is said later comes from the candidate.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 8192, 16384, 1 << 18
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_HOME_BYTES = 64 << 20
_POLL_S = 0.005
_SWEEPS = 500  # of 10 ms; a fork bomb is gone after a few
_FAILED = 1


class RefusedError(Exception):
    """A door that cannot be shut here."""

    def __init__(self, door: str, why: object) -> None:
        super().__init__(f"refused {door} {why}")


@contextmanager
def _shutting(door: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedError(door, error) from error


def _system(name: str, *arguments: Any) -> None:
    """A call of the C library by its name; an `OSError` where it fails or does not exist."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, f"{name} does not exist here")
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _system("prctl", option, *(ctypes.c_ulong(each) for each in (value, 0, 0, 0)))


def _mount(source: str, target: str, flags: int, kind: str = "none", options: str = "") -> None:
    _system("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


# --- the launcher ---


def _shut_doors(job: dict[str, Any]) -> None:
    doors = job["doors"]
    if os.geteuid() != 0 and doors and doors != ["user"]:
        with _shutting("network" if "network" in doors else "files"):
            _enter_user_namespace()
    if "network" in doors:
        with _shutting("network"):
            _system("unshare", _CLONE_NEWNET)
    if "files" in doors:
        with _shutting("files"):
            _system("unshare", _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC)
            _shut_files(job["nobody"])


def _enter_user_namespace() -> None:
    """The right to the other namespaces for a user without rights, under whose number we go on."""
    user, group = os.geteuid(), os.getegid()
    _system("unshare", _CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _shut_files(nobody: list[int] | None) -> None:
    """Make everything read-only but the working directory, which becomes 64 MB in memory, and hide the processes."""
    home = os.getcwd()
    _mount("none", "/", _MS_REC | _MS_PRIVATE)  # or all of this would happen outside as well
    if nobody is not None:
        _open_library(home)
    read_only = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    number, where, how = (ctypes.c_long(each) for each in (_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE))
    size = ctypes.c_size_t(ctypes.sizeof(read_only))
    _system("syscall", number, where, b"/", how, ctypes.byref(read_only), size)
    user, group = nobody or (os.geteuid(), os.getegid())
    options = f"size={_HOME_BYTES},mode=0700,uid={user},gid={group}"
    _mount("tmpfs", home, _MS_NOSUID | _MS_NODEV, "tmpfs", options)
    os.chdir(home)
    _mount("tmpfs", "/proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "tmpfs")  # it shows our environment to our user


def _open_library(home: str) -> None:
    """Let Python's files be reached where they lie in a directory that is closed to others, as `/root` often is.

    The closed directory is covered by an empty one that holds the way to Python's files and nothing else.
    """
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    closed = {prefix: ancestor for prefix in prefixes if (ancestor := _closed_ancestor(prefix))}
    aside = {prefix: f"{home}/{number}" for number, prefix in enumerate(sorted(closed))}
    for prefix, place in aside.items():
        os.mkdir(place)
        _mount(prefix, place, _MS_BIND | _MS_REC)
    for ancestor in sorted(set(closed.values())):
        _mount("tmpfs", ancestor, _MS_NOSUID | _MS_NODEV, "tmpfs", "mode=0755,size=1m")
    for prefix, place in aside.items():
        os.makedirs(prefix, exist_ok=True)
        _mount(place, prefix, _MS_MOVE)


def _closed_ancestor(path: str) -> str | None:
    for ancestor in reversed(Path(path).parents):
        if not ancestor.stat().st_mode & stat.S_IXOTH:
            return str(ancestor)
    return None


def _fork(has_init: bool) -> int:
    """The process to watch, in the launcher; 0 in the candidate."""
    watched = os.fork()
    if watched or not has_init:
        return watched
    _die_with_parent()
    candidate = os.fork()  # signals that it sends itself do not reach the first process, so that one only waits
    if candidate == 0:
        return 0
    while True:
        ended, status = os.wait()
        if ended == candidate:
            os._exit(_exit_code(status))


def _watch(watched: int, wall_s: float) -> NoReturn:
    """Wait for the candidate within its time, end everything that it has started, and end as it did."""
    deadline = time.monotonic() + wall_s
    is_told: list[int] = []  # to end earlier: too much output, or our parent is gone
    signal.signal(signal.SIGTERM, lambda number, _: is_told.append(number))
    code: int | None = None
    while code is None and time.monotonic() < deadline and not is_told:
        ended, status = os.waitpid(watched, os.WNOHANG)
        if ended:
            code = _exit_code(status)
        else:
            time.sleep(_POLL_S)
    _sweep({watched} if code is None else set())
    os._exit(_FAILED if code is None else code)


def _sweep(known: set[int]) -> None:
    """Kill our children until there are none: those that lost their parent have become ours."""
    for _ in range(_SWEEPS):
        for child in known | _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                known.discard(ended)
            time.sleep(0.01)
            continue
        return


def _children() -> set[int]:
    with suppress(OSError):  # hidden where there is an init, which takes them with it
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return {int(child) for child in listed.split()}
    return set()


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _die_with_parent(number: int = signal.SIGKILL) -> None:
    with suppress(OSError):
        _prctl(_PR_SET_PDEATHSIG, number)


# --- the candidate ---


def _give_up_rights(job: dict[str, Any], other_tasks: int) -> None:
    """Set the limits, become nobody where we are root, and drop every capability; there is no way back."""
    limits = job["limits"]
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + other_tasks),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if job["nobody"] is not None:
        user, group = job["nobody"]
        with _shutting("user"):
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
            os.listdir(os.path.dirname(os.__file__))  # Python's library, of which the candidate will import
    with suppress(OSError):
        _system("capset", ctypes.byref((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)), (ctypes.c_uint32 * 6)())
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _die_with_parent()  # last, because a change of user undoes it


def _tasks_of(user: int) -> int:
    """The threads of a user's processes: RLIMIT_NPROC counts all of them, wherever they were started."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == user:
                count += len(os.listdir(process / "task"))
    return count


def _run_script(code: str, control: int) -> None:
    os.close(control)
    exec(compile(code, "<candidate>", "exec"), {"__name__": "__main__"})


def _run_tests(code: str, tests: str, token: bytes, control: int) -> NoReturn:
    """Run the candidate, then the tests in its namespace; the token goes out only behind the last line of them.

    What is called behind the candidate is taken hold of before, and the builtins are put back as they were.
    """
    write, leave, execute, names = os.write, os._exit, exec, vars(builtins)
    saved, restore, original = dict(names), names.update, builtins
    try:
        compiled_tests = compile(tests, "<tests>", "exec")
        namespace: dict[str, Any] = {"__name__": "candidate"}
        execute(compile(code, "<candidate>", "exec"), namespace)
        restore(saved)
        namespace["__builtins__"] = original
        execute(compiled_tests, namespace)
    except BaseException:
        leave(_FAILED)
    write(control, token)
    leave(0)


def _be_candidate(job: dict[str, Any], control: socket.socket, other_tasks: int) -> None:
    try:
        _give_up_rights(job, other_tasks)
    except RefusedError as refused:
        _refuse(control, refused)
    descriptor = control.detach()
    os.set_inheritable(descriptor, False)
    os.write(descriptor, b"ready\n")
    if job["tests"] is None:
        _run_script(job["code"], descriptor)
    else:
        _run_tests(job["code"], job["tests"], job["token"].encode(), descriptor)


def _refuse(control: socket.socket, refused: RefusedError) -> NoReturn:
    control.sendall(str(refused).encode())
    os._exit(_FAILED)


def main() -> None:
    """Read the task from the control socket and run it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    with control.makefile("rb") as stream:
        job = json.loads(stream.readline())
    _die_with_parent(signal.SIGTERM)  # so that it still ends what was started
    with suppress(OSError):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Before the processes are hidden. A user namespace of our own counts its own ones only.
    user = os.geteuid() if job["nobody"] is None else job["nobody"][0]
    has_own_count = os.geteuid() != 0 and job["doors"] != []
    other_tasks = 0 if has_own_count else _tasks_of(user)
    try:
        _shut_doors(job)
    except RefusedError as refused:
        _refuse(control, refused)
    has_init = "files" in job["doors"]
    watched = _fork(has_init)
    if watched:
        control.close()
        _watch(watched, job["limits"]["wall_s"])
    _be_candidate(job, control, other_tasks)


if __name__ == "__main__":
    main()
