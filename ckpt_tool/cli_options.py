"""Options that several commands share, and those that formats declare, as typer reads them.

A command takes a group of options as one parameter, whose type is a named tuple of this module, and the
options of formats as ``given: Given``; ``spread`` shows typer each option by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from ckpt_tool.formats.options import DTYPES, Option, Size
from ckpt_tool.sizes import parse_size, size_text

if TYPE_CHECKING:
    from ckpt_tool.api import Execution
    from ckpt_tool.report import Progress

# Text, not a Path, which would make one slash of a URL's two.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A checkpoint: its tag directory, the parent with a `latest` file, or a file.",
    ),
]
Destination = Annotated[str, typer.Argument(metavar="DST", help="The new directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print what is wrong, and nothing else.")]
MaxMemory = Annotated[
    str,
    typer.Option("--max-memory", metavar="SIZE", help="Bytes all buffers may hold together: 512MiB, 2GB."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", help="Threads. Default: two per core, at most 8."),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="The model's config.json, or the directory with it, whose tokenizer is carried over, too.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help=f"What weights are cast to: one of {', '.join(DTYPES)}.",
        autocompletion=lambda incomplete: completing(DTYPES)(incomplete),
    ),
]
_MEMORY = "1GiB"
_METAVARS: Mapping[type, str] = {int: "N", Path: "PATH"}


class Reading(NamedTuple):
    """Options of the commands that read values and write none."""

    max_memory: MaxMemory = _MEMORY
    workers: Workers = None
    json: Json = False

    def execution(self, progress: Progress) -> Execution:
        from ckpt_tool.api import Execution

        return Execution(parse_size(self.max_memory), self.workers, meter=progress)


class Writing(NamedTuple):
    """Options of the commands that write a checkpoint."""

    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare the result with the source, bit for bit, before publishing it."
        ),
    ] = False
    max_memory: MaxMemory = _MEMORY
    workers: Workers = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and check everything, print totals, write nothing.")
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the destination if it exists.")
    ] = False
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait for the disk before publishing.")
    ] = False
    json: Json = False
    quiet: Quiet = False

    def execution(self, progress: Progress) -> Execution:
        from ckpt_tool.api import Execution

        memory = parse_size(self.max_memory)
        return Execution(
            memory, self.workers, not self.no_fsync, self.overwrite, progress, progress.published
        )


class Given(dict[str, Any]):
    """The options that formats declare, by name, with the values of this call."""


def spread(*declared: Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes groups of options, and ``declared`` ones as ``Given``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        shown: list[inspect.Parameter] = []
        groups: dict[str, Callable[[dict[str, Any]], Any]] = {}
        for parameter in inspect.signature(command).parameters.values():
            kind = hints[parameter.name]
            if kind is Given:
                shown += map(_parameter, declared)
                groups[parameter.name] = functools.partial(_given, declared)
            elif kind in (Reading, Writing):
                shown += _members(kind)
                groups[parameter.name] = functools.partial(_group, kind)
            else:
                shown.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

        def called(**values: Any) -> None:
            gathered = {name: gather(values) for name, gather in groups.items()}
            command(**values, **gathered)

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {one.name: one.annotation for one in shown}
        called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return called

    return decorate


def _group(kind: type[Reading | Writing], values: dict[str, Any]) -> Reading | Writing:
    """A group of the options in ``values``, which are taken out."""
    return kind(**{name: values.pop(name) for name in kind._fields})


def _given(declared: Iterable[Option], values: dict[str, Any]) -> Given:
    """The declared options in ``values``, which are taken out."""
    found = Given()
    for option in declared:
        value = values.pop(option.name)
        is_size = option.kind is Size and value is not None
        found[option.name] = parse_size(value) if is_size else value
    return found


def _members(kind: type[Reading | Writing]) -> list[inspect.Parameter]:
    """The options of a group as typer reads them."""
    hints = get_type_hints(kind, include_extras=True)
    only = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, only, default=kind._field_defaults[name], annotation=hints[name])
        for name in kind._fields
    ]


def _parameter(option: Option) -> inspect.Parameter:
    """A declared option as typer reads it."""
    kind: Any = str if option.kind in (Size, Path) else option.kind  # a path may be a URL
    # A size that is the default's is still one that was given, which another format's target refuses.
    default = None if option.kind is Size else option.default
    shown = f" Default: {size_text(option.default)}." if option.kind is Size and option.default else ""
    about = typer.Option(
        *option.flags,
        help=option.help + (f" One of {', '.join(option.choices)}." if option.choices else "") + shown,
        metavar=option.metavar or _METAVARS.get(option.kind),
        autocompletion=completing(option.choices) if option.choices else None,
    )
    if default is None:
        kind = kind | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, about],
    )


def completing(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell offers for a value that has been begun."""
    known = tuple(choices)

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in known if choice.startswith(incomplete)]

    return complete
