"""A serving failure as one Python file that needs the standard library only: it asks the engine and judges."""

from __future__ import annotations

import pprint
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.qualify.reproducing.self_contained import self_contained
from crosschip.qualify.serving import shown
from crosschip.rundir import write_text

__all__ = ["Reproduction", "write_serving_reproducer"]

_MOST_CHARACTERS = 2_000_000  # a longer file is of no use to anyone


@dataclass(frozen=True)
class Reproduction:
    """A check of `shown` with its parameters, which are literals as in JSON. `confirm`: whether to try it first."""

    check: Callable[..., shown.Outcome]
    parameters: dict[str, Any]
    confirm: bool = True

    @classmethod
    def answered(cls, path: str, body: dict[str, Any] | None, timeout_s: float) -> Reproduction:
        """That a request is not properly answered. It is not tried again: it may take as long as before."""
        return cls(shown.answer_is_proper, {"path": path, "body": body or {}, "timeout_s": timeout_s}, confirm=False)


_TEMPLATE = '''"""{title}

Found on: {engine}
How to run: python {name} --url {url}
It needs Python 3.10 or newer and nothing else. It prints what was expected and what the engine answered; the check is
`{function}`, with PARAMETERS, both at the end of this file.
Exit code: 1 when the engine is wrong, 0 when it is right, 2 when it cannot be asked.
"""

from __future__ import annotations

{imports}


{definitions}


PARAMETERS = {parameters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default={url!r}, help="the engine's address, without /v1")
    options = parser.parse_args()
    try:
        wrong, expected, got = {function}(options.url, **PARAMETERS)
    except Exception as error:
        print(f"no proper answer from {{options.url}}: {{type(error).__name__}}: {{error}}")
        return 2
    print("expected:", expected)
    print("got:     ", got)
    print("verdict: ", "WRONG" if wrong else "right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
'''


def write_serving_reproducer(
    directory: Path, slug: str, title: str, engine: str, url: str, reproduction: Reproduction
) -> str | None:
    """Write the file and give its name; None when the engine does not show the failure again, or it is too long."""
    if reproduction.confirm and not _shows(reproduction, url):
        return None
    name = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")[:80] + ".py"
    imports, definitions = self_contained([reproduction.check])
    text = _TEMPLATE.format(
        title=_in_docstring(title),
        engine=_in_docstring(engine),
        name=name,
        url=url,
        function=reproduction.check.__name__,
        imports="\n".join(sorted({*imports, "import argparse", "import sys"})),
        definitions="\n\n\n".join(definitions),
        parameters=pprint.pformat(reproduction.parameters, width=116, compact=True, sort_dicts=False),
    )
    if len(text) > _MOST_CHARACTERS:
        return None
    write_text(directory / name, text)
    return name


def _in_docstring(text: str) -> str:
    """Engines name themselves, and what they answer stands in titles: neither may end the docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _shows(reproduction: Reproduction, url: str) -> bool:
    try:
        return reproduction.check(url, **reproduction.parameters)[0]
    except Exception:  # the engine fails in another way now: whatever it sends, the check stumbles over it
        return False
