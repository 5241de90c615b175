"""The one type of error that people can cause and mend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Checked = TypeVar("Checked", bound="BaseModel")


class UserError(Exception):
    """A mistake in the input, told in four parts and shown without a traceback.

    Args:
        wanted: what was being attempted or required.
        found: what was there instead.
        allowed: what would have been accepted.
        next_step: the command or the change that mends it.
    """

    def __init__(self, *, wanted: str, found: str, allowed: str, next_step: str):
        self.wanted, self.found, self.allowed, self.next_step = wanted, found, allowed, next_step
        super().__init__(wanted, found, allowed, next_step)

    def __str__(self) -> str:
        return f"wanted:  {self.wanted}\nfound:   {self.found}\nallowed: {self.allowed}\nnext:    {self.next_step}"

    def __reduce__(self):
        # Exceptions with keyword-only arguments do not survive a process boundary without this.
        return _rebuild, (type(self), self.wanted, self.found, self.allowed, self.next_step)


def _rebuild(kind: type[UserError], wanted: str, found: str, allowed: str, next_step: str) -> UserError:
    return kind(wanted=wanted, found=found, allowed=allowed, next_step=next_step)


class BudgetError(UserError):
    """A budget that cannot be met, or a method that broke its own: it ends the run instead of failing one sample."""


def choose(argument: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if allowed.

    Raises:
        UserError: naming the allowed values.
    """
    if value not in allowed:
        options = ", ".join(allowed)
        raise UserError(
            wanted=f"{argument}={value}", found="no such choice", allowed=options, next_step=f"choose one of: {options}"
        )
    return value


def checked(
    model: type[Checked], data: Any, *, wanted: str, allowed: str | None = None, next_step: str | None = None
) -> Checked:
    """`data` as a pydantic model.

    Args:
        model: what it should be.
        data: what somebody wrote.
        wanted: as in `UserError`.
        allowed: as in `UserError`; by default what pydantic says of each value that it refuses.
        next_step: as in `UserError`; by default to correct the values, by name.

    Raises:
        UserError: naming every value that is refused by its place in `data`.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as error:
        refused = {".".join(map(str, part["loc"])): part for part in error.errors(include_url=False)}
        raise UserError(
            wanted=wanted,
            found=", ".join(_found(place, part) for place, part in list(refused.items())[:10]),
            allowed=allowed or "; ".join(_allowed(model, place, part) for place, part in list(refused.items())[:10]),
            next_step=next_step or f"correct {', '.join(list(refused)[:10])}",
        ) from error


def _found(place: str, part: Mapping[str, Any]) -> str:
    if part["type"] == "missing":
        return f"no {place}"
    if part["type"] == "extra_forbidden":
        return f"{place}, which is unknown"
    value = part["input"]
    if not isinstance(value, (str, int, float, bool)) and value is not None:
        value = f"a {type(value).__name__}"  # what is deep or refers to itself is not printed
    shown = str(value)
    return (f"{place}=" if place else "") + (shown if len(shown) <= 100 else f"{shown[:100]}...")


def _allowed(model: type[BaseModel], place: str, part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind == "extra_forbidden":
        return f"{', '.join(model.model_fields)}" if "." not in place else f"no {place}"
    if kind == "literal_error":
        text = part["ctx"]["expected"].replace("' or '", "', '").replace("'", "")
    else:
        text = {
            "missing": "something in its place",
            "int_parsing": "a whole number",
            "int_from_float": "a whole number",
            "float_parsing": "a number",
            "bool_parsing": "true or false",
            "string_type": "text",
        }.get(kind, part["msg"].removeprefix("Value error, ").removeprefix("Input should be "))
    return f"{place}: {text}" if place else text


@contextlib.contextmanager
def leave_with() -> Iterator[None]:
    """Around code that lmms-eval calls: under its own command a `UserError` ends the process as it should.

    That command turns exceptions into a traceback and exit status 0, which SystemExit escapes. All other callers get
    the `UserError` itself.
    """
    if host_command_runs():
        with exit_on_user_error():
            yield
    else:
        yield


def host_command_runs() -> bool:
    """Whether this process was started as `python -m lmms_eval`, so by `accelerate launch` too, or as `lmms-eval`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return str(getattr(module, "name", "")).startswith("lmms_eval.") or Path(sys.argv[0]).name == "lmms-eval"


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into four lines on standard error and exit status 2; Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f"error\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; the same command continues it", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (told := _of_another_package(error)) is None:
            raise
        print(f"error\n{told}", file=sys.stderr)
        sys.exit(1)


def _of_another_package(error: Exception) -> UserError | None:
    """An exception that another package raised, in four parts; `None` if this package raised it."""
    import traceback
    from importlib import metadata

    from rcb_lmms.files import write_atomic
    from rcb_lmms.resources import cache_dir, tested_versions

    if isinstance(error, ImportError) and error.name:  # what is missing, not who missed it
        module = error.name.partition(".")[0]
    else:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        module = next(
            (
                str(frame.f_globals.get("__name__")).partition(".")[0]
                for frame in reversed(frames)
                if "site-packages" in frame.f_code.co_filename or "rcb_lmms" in frame.f_code.co_filename
            ),
            "rcb_lmms",
        )
    names = metadata.packages_distributions().get(module, [module])
    if module in ("rcb_lmms", "__main__"):
        return None
    name = names[0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "not installed"
    tested = tested_versions().get(name.lower().replace("_", "-"))
    log = write_atomic(cache_dir() / "traceback.txt", "".join(traceback.format_exception(error)))
    as_tested = version == tested
    return UserError(
        wanted=f"{name}, which this command uses",
        found=f"{version}, which raised {type(error).__name__}: {' '.join(str(error).split())}"[:500],
        allowed=f"{name} {tested}, the tested version" if tested else f"a version of {name} that does not raise this",
        next_step=f"read {log}: the installed version is the tested one"
        if as_tested or not tested
        else f'pip install "{name}=={tested}" (the whole traceback: {log})',
    )
