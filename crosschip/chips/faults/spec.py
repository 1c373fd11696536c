"""From the words of the command line to faults: `sim`, `sim:N1,limit=512`, `sim:N20+W1`, `sim:some.module:NAME`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from crosschip.chips.faults.catalogue import CATALOGUE, PLANTED_ELSEWHERE
from crosschip.chips.faults.variants import VARIANTS
from crosschip.errors import ChipError

__all__ = ["faults_from"]

_HONEST = ("", "0")
_EXAMPLES = "for example sim, sim:N1, sim:N1,limit=512, sim:N20+W1,slowdown=30 or sim:some.module:NAME"


def faults_from(spec: str) -> list[Any]:
    """The faults that a chip's name asks for, outermost first.

    `sim` and `sim:0` are the honest chip. `sim:NAME,parameter=value+NAME` names rows of the catalogue, honest variants,
    or objects of a module, as `package.module:name`: a fault is taken as it is, a class or function is called with the
    parameters. Modules are also looked for in the current directory.

    Raises:
        ChipError: there is no such fault, parameter or module, or a value that the fault does not take.
    """
    kind, _, rest = spec.partition(":")
    if kind != "sim":
        raise ChipError(f"{spec!r} is no name of the simulated chip", f"begin with sim: {_EXAMPLES}")
    if rest in _HONEST:
        if spec == "sim:":
            raise ChipError(f"{spec!r} names nothing after the colon", f"write {_EXAMPLES}")
        return []
    # A plus that begins a fault is followed by its name; in a number (1e+3) it is followed by a digit.
    return [_one(part) for part in re.split(r"\+(?!\d)", rest)]


def _one(part: str) -> Any:
    name, *settings = (word.strip() for word in part.split(","))
    texts = dict(_setting(setting, part) for setting in settings)
    if ":" in name:
        return _from_module(name, texts)
    if name in CATALOGUE:
        return _made(name, CATALOGUE[name].make, texts)
    if name in VARIANTS:
        return _made(name, VARIANTS[name], texts)
    raise _unknown(name)


def _setting(setting: str, part: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ChipError(
            f"{setting!r} in {part!r} is no parameter", f"write parameters as name=value after a comma: {_EXAMPLES}"
        )
    return key.strip(), value.strip()


def _unknown(name: str) -> ChipError:
    if name in PLANTED_ELSEWHERE:
        what, where = PLANTED_ELSEWHERE[name]
        return ChipError(
            f"the fault {name} is in the catalogue ({what}) but is not planted in a chip or in files",
            f"it is planted by {where}; here plant one of {', '.join(CATALOGUE)}",
        )
    known = [*CATALOGUE, *VARIANTS]
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], 1, cutoff=0.5)
    meant = [each for each in known if near and each.lower() == near[0]]
    if "." in name:
        module, _, last = name.rpartition(".")
        meant = [f"{module}:{last}"]
    hint = f"did you mean {meant[0]}? " if meant else ""
    return ChipError(
        f"the simulated chip knows no fault {name!r}",
        f"{hint}faults: {', '.join(CATALOGUE)}; honest variants: {', '.join(VARIANTS)}; others as package.module:name",
    )


def _from_module(name: str, texts: dict[str, str]) -> Any:
    module_name, _, path = name.partition(":")
    target = _import(module_name, name)
    for part in path.split("."):
        if not hasattr(target, part):
            public = ", ".join(each for each in vars(target) if not each.startswith("_")) or "nothing"
            raise ChipError(f"{name!r}: {module_name} has no {path!r}", f"it holds {public}")
        target = getattr(target, part)
    if _is_fault(target) and not isinstance(target, type):
        if texts:
            raise ChipError(
                f"{name} is a fault already made, so it takes no parameters, but {', '.join(texts)} was given",
                "leave the parameters out, or name its class",
            )
        return target
    if not callable(target):
        raise _no_fault(name, target)
    made = _made(name, target, texts)
    if not _is_fault(made):
        raise _no_fault(name, made)
    return made


def _import(module_name: str, name: str) -> types.ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a command that pip installed has its own directory there instead
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise ChipError(f"{name!r}: {module_name} imports {missing!r}, which is not there", "install it") from error
        raise ChipError(
            f"{name!r}: there is no module {module_name!r}",
            f"start in the directory that holds it (now {os.getcwd()}) or put that directory on PYTHONPATH",
        ) from None
    except (Exception, SystemExit) as error:  # the module's own failure, of whatever kind; a script may end itself
        problem = f"{name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        raise ChipError(problem, "mend the module") from error


def _is_fault(target: Any) -> bool:
    methods = (getattr(target, method, None) for method in ("operator", "collective", "files"))
    return hasattr(target, "name") and any(callable(method) for method in methods)


def _no_fault(name: str, target: Any) -> ChipError:
    return ChipError(
        f"{name!r} is no fault: {target!r} lacks a `name`, or has neither a method `operator` nor `collective` nor "
        "`files`",
        "docs/simulated-chip.md shows a fault in ten lines",
    )


def _made(name: str, make: Callable[..., Any], texts: dict[str, str]) -> Any:
    """Call a class or function with parameters typed as its signature says."""
    known = inspect.signature(make).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    hints = _hints(make)
    values = {}
    for key, text in texts.items():
        if key not in known and not takes_any:
            raise ChipError(f"the fault {name} has no parameter {key!r}", _describe(name, known))
        default = known[key].default if key in known else None
        values[key] = _typed(name, key, text, hints.get(key, type(default)))
    try:
        return make(**values)
    except (TypeError, ValueError) as error:
        raise ChipError(f"the fault {name} cannot be made: {error}", _describe(name, known)) from error
    except (Exception, SystemExit) as error:  # its own failure, of whatever kind
        raise ChipError(f"the fault {name} cannot be made: {type(error).__name__}: {error}", "mend it") from error


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    target = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):  # names that only a type checker sees, or a callable without hints
        return {}


def _describe(name: str, known: typing.Mapping[str, inspect.Parameter]) -> str:
    shown = [
        each.name if each.default is each.empty else f"{each.name} (default {each.default})" for each in known.values()
    ]
    return f"its parameters: {', '.join(shown)}" if shown else f"{name} has no parameters"


def _typed(name: str, key: str, text: str, wanted: Any) -> Any:
    choices = typing.get_args(wanted) if typing.get_origin(wanted) is typing.Literal else ()
    if choices:
        found = [choice for choice in choices if str(choice) == text]
        if not found:
            raise ChipError(f"{key}={text!r} of the fault {name} is none of its values", f"one of {_listed(choices)}")
        return found[0]
    kinds = [each for each in typing.get_args(wanted) or (wanted,) if each in _READERS]
    if type(None) in typing.get_args(wanted) and text.lower() == "none":
        return None
    for kind in kinds or (bool, int, float, str):
        try:
            return _READERS[kind](text)
        except ValueError:
            continue
    words = " or ".join(_WORDS[kind] for kind in kinds)
    raise ChipError(f"{key}={text!r} of the fault {name} is not {words}", f"give {words}")


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(map(str, choices))


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_READERS: dict[Any, Callable[[str], Any]] = {bool: _read_bool, int: int, float: float, str: str}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
