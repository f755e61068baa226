"""One family of errors, one message form.

Every error says `<what failed> for <tensor, layer or file>: expected <X>, got <Y>. <what to do>.`
"""

from __future__ import annotations

_LONGEST = 1200  # characters of a message


class ParingError(Exception):
    """Base of all errors that paring raises on purpose; `exit_code` is what the command line ends with.

    Attributes:
      detail: Lines that the command line prints ahead of the message, such as the traceback of a user's function.
    """

    exit_code = 2
    detail = ""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        todo: str | None = None,
    ) -> None:
        """Builds the one-line message.

        Args:
          what: What failed, e.g. `"cannot read the model"`.
          where: The tensor, layer or file it failed for.
          expected: What was expected there.
          got: What was found instead.
          todo: What the user can do about it, a full sentence without its final stop.

        >>> print(InputError("unknown recipe", where="int9", expected="a name or a file", todo="Run `paring recipes`"))
        unknown recipe for int9: expected a name or a file. Run `paring recipes`.
        """
        parts = what if where is None else f"{what} for {where}"
        found = [f"expected {expected}"] if expected else []
        if got:
            found.append(f"got {got}")
        if found:
            parts += ": " + ", ".join(found)
        if todo:
            parts += f". {todo}"
        message = parts if parts.endswith((".", "?", "!")) else parts + "."
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    """Names come from files and may hold anything: one printable line that no terminal obeys, of bounded length."""
    line = " ".join(message[: 2 * _LONGEST].split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class InputError(ParingError):
    """Bad input or usage: a file, a recipe, data or an argument; exit code 2."""


class MetricError(InputError):
    """A metric of the user's raised, or gave no score; `detail` is its own traceback. Exit code 2."""

    def __init__(self, what: str, *, detail: str = "", **parts: str | None) -> None:
        """Builds the message as every error does; the traceback stays beside it."""
        super().__init__(what, **parts)
        self.detail = detail


class UnsupportedError(InputError):
    """A valid request that this version of paring, or of what it needs, cannot serve; exit code 2."""


class BoundError(ParingError):
    """The work was done but a bound was missed (verification, `--max-error`, `--strict`); exit code 1."""

    exit_code = 1
