"""What the weights of one engine are called: a name means the same weights for as long as the engine runs.

Answers, caches beside the engine and whoever compares them know weights by that name alone.
"""

from __future__ import annotations

from crosschip.errors import ServeError

__all__ = ["VersionNames"]


class VersionNames:
    """The names that were given, each with what tells its weights from others (`weights_identity`)."""

    def __init__(self, first: str, identity: str) -> None:
        self._identities = {first: identity}

    def choose(self, wanted: str | None, served: str, identity: str) -> str:
        """The name that weights get after `served`: the wanted one, else the next number that is free.

        Raises:
            ServeError: what is served has that name, or other weights had it.
        """
        if wanted is None:
            name = _next(served)
            while name in self._identities:
                name = _next(name)
            return name
        if wanted == served:
            raise ServeError(f"version {wanted!r} is what is served already", "give the new weights another name")
        if self._identities.get(wanted, identity) != identity:
            raise ServeError(
                f"version {wanted!r} has been the name of other weights since this engine was started",
                "give these another name: answers tell which weights they are of by it",
            )
        return wanted

    def keep(self, name: str, identity: str) -> None:
        """Remember what a name was given to."""
        self._identities[name] = identity


def _next(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else f"{version}+1"
