"""The command line: options in, one call of the API, a report out. Heavy imports wait for their use."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_tool import __version__
from ckpt_tool.cli_options import (
    Config,
    Destination,
    Dtype,
    Given,
    Json,
    Quiet,
    Reading,
    Source,
    Writing,
    completing,
    spread,
)
from ckpt_tool.formats.known import all_options, published_target, targets
from ckpt_tool.formats.options import EP, LIKE, WEIGHTS_ONLY, WORLD

if TYPE_CHECKING:
    from ckpt_tool.comparison import Verdict
    from ckpt_tool.report import Progress
    from ckpt_tool.values import Difference

_EPILOG = (
    "Exit codes: 0 done; 1 found wrong (verify, doctor, inspect --check); 2 usage; 3 unreadable or "
    "unsupported input; 4 failed while running; 130 interrupted (Ctrl-C); 143 terminated; 141 nobody reads "
    "the output."
)

app = typer.Typer(
    name="ckpt-tool",
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Convert, re-shard, consolidate and inspect Mixture-of-Experts checkpoints in bounded memory.",
)

_TARGETS = f"One of {', '.join(targets())}."
# Typer's own errors: all of them derive from the class above the one that it shows.
_Misuse: type[Exception] = typer.BadParameter.__mro__[1]
# What follows ``--experts`` and is not a path: two globs of numbers.
_EXPERTS = re.compile(r"[\d*?\[\]-]+:[\d*?\[\]-]+")
_SHOWN = 20  # differences printed


def _examples(*lines: str) -> str:
    """What stands at the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  ckpt-tool {line}" for line in lines)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"ckpt-tool {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command(
    short_help="What is in a checkpoint: format, topology, sizes.",
    epilog=_examples(
        "inspect run/checkpoints",
        "inspect run/checkpoints --tensors '*.mlp.*' --json",
        "inspect run/checkpoints --experts '3:*'",
    ),
)
@spread()
def inspect(
    src: Source,
    *,
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors",
            metavar="[GLOB]",
            help="List tensors, those whose name here matches GLOB if given; experts are stacks: "
            "*.experts.*.gate.weight, or by number.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="[LAYER:EXPERT]",
            help="Which rank and file holds which expert: all, or e.g. 3:* or '*:17'.",
        ),
    ] = None,
    config: Config = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="PATH",
            readable=False,
            help="Write a page to look at: a map of the experts, bytes, tensors.",
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="For --html: read all values, for norms and what doctor finds."),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Hash the experts and name those that are copies: a part of doctor."),
    ] = False,
    run: Reading,
) -> None:
    """Say what a checkpoint is: format, topology, sizes, experts, states. Reads metadata only."""
    from ckpt_tool import api, inspection, report
    from ckpt_tool.errors import UsageError

    if stats and html is None:
        raise UsageError("--stats is what a page shows: add --html report.html, or run `ckpt-tool doctor`.")
    if html is not None:
        with _progress("inspect", run.json) as progress:
            api.page(src, html, stats=stats, config=config, how=run.execution(progress))
        typer.echo(f"{html} is written: open it in a browser.", err=run.json)
        if tensors is None and experts is None and not check and not run.json:
            return

    checkpoint = api.catalogue(src, config=config)
    found = inspection.overview(checkpoint)
    tensor_rows = inspection.tensor_rows(checkpoint, tensors) if tensors is not None else None
    expert_rows = inspection.expert_rows(checkpoint, experts) if experts is not None else None
    if tensors is not None and not tensor_rows:
        found["notes"].append(inspection.no_tensor(checkpoint, tensors))
    if expert_rows == [] and checkpoint.moe_layers:
        ids, count = found["moe_layer_ids"], found["experts_per_layer"]
        found["notes"].append(
            f"No expert matches {experts!r}. MoE layers are {ids[0]} to {ids[-1]}, of {count} experts each."
        )
    elif expert_rows == []:
        found["notes"].append(
            "No routed experts are recognised. If the model has some, pass its config.json with --config, "
            "which tells their names."
        )
    copies: list[str] = []
    if check:
        with _progress("check", run.json) as progress:
            how = run.execution(progress)
            copies = [found.message() for found in api.find_copied_experts(src, config=config, how=how)]
    if run.json:
        extra: dict[str, Any] = {}
        if tensor_rows is not None:
            extra["tensors"] = tensor_rows
        if expert_rows is not None:
            extra["experts"] = expert_rows
        if check:
            extra["copied_experts"] = copies
        report.print_json({**found, **extra})
        raise typer.Exit(1 if copies else 0)
    report.print_fields(str(src), inspection.overview_lines(found))
    if tensor_rows is not None:
        report.print_table(*inspection.tensor_table(tensor_rows), right={"bytes"})
    if expert_rows is not None:
        report.print_table(*inspection.expert_table(expert_rows), right={"layer", "expert"})
    for message in copies:
        report.show(message)
    if check and not copies:
        typer.echo("No two experts of a layer are equal.")
    if copies:
        raise typer.Exit(1)


@app.command(
    short_help="Write a checkpoint in another format.",
    epilog=_examples(*(f"convert {target.example}" for target in targets().values() if target.example)),
)
@spread(*all_options())
def convert(
    src: Source,
    dst: Destination,
    *,
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help=_TARGETS, autocompletion=completing(targets())),
    ],
    given: Given,
    dtype: Dtype = "keep",
    config: Config = None,
    run: Writing,
) -> None:
    """Write a checkpoint in another format."""
    from ckpt_tool import api, results

    with _progress("convert", run.quiet or run.json, resumable=not run.dry_run) as progress:
        result = api.convert(
            src,
            dst,
            to=to,
            dtype=dtype,
            config=config,
            verify=run.verify,
            dry_run=run.dry_run,
            how=run.execution(progress),
            **given,
        )
        progress.close()
        results.show(result, dry_run=run.dry_run, json=run.json, quiet=run.quiet)


@app.command(
    short_help="Write it for another EP size or number of ranks.",
    epilog=_examples(
        "reshard run/checkpoints new --ep 4 --world 32 --dry-run",
        "reshard run/checkpoints new --ep 4 --world 32 --verify",
    ),
)
@spread(EP, WORLD, LIKE, WEIGHTS_ONLY)
def reshard(src: Source, dst: Destination, given: Given, run: Writing) -> None:
    """Write a checkpoint in its own format for another EP size or number of ranks; it resumes exactly."""
    from ckpt_tool import api, results

    with _progress("reshard", run.quiet or run.json, resumable=not run.dry_run) as progress:
        result = api.reshard(
            src, dst, verify=run.verify, dry_run=run.dry_run, how=run.execution(progress), **given
        )
        progress.close()
        results.show(result, dry_run=run.dry_run, json=run.json, quiet=run.quiet)


@app.command(
    short_help="Write a model as it is published.",
    epilog=_examples(
        "consolidate run/checkpoints model --config path/to/model",
        "consolidate run/checkpoints model --config path/to/model --dtype bf16",
    ),
)
@spread(*published_target().options)
def consolidate(
    src: Source,
    dst: Destination,
    *,
    config: Config = None,
    dtype: Dtype = "fp32",
    given: Given,
    run: Writing,
) -> None:
    """Write Hugging Face safetensors for `from_pretrained`: fp32 from the masters by default."""
    from ckpt_tool import api, results

    with _progress("consolidate", run.quiet or run.json, resumable=not run.dry_run) as progress:
        result = api.consolidate(
            src,
            dst,
            dtype=dtype,
            config=config,
            verify=run.verify,
            dry_run=run.dry_run,
            how=run.execution(progress),
            **given,
        )
        progress.close()
        results.show(result, dry_run=run.dry_run, json=run.json, quiet=run.quiet)


@app.command(
    short_help="Check one checkpoint, or compare two bit for bit.",
    epilog=_examples("verify new", "verify run/checkpoints new"),
)
@spread()
def verify(
    a: Source,
    b: Annotated[str | None, typer.Argument(help="A second checkpoint to compare with.")] = None,
    config: Config = None,
    *,
    run: Reading,
    quiet: Quiet = False,
) -> None:
    """One checkpoint: coverage and checksums. Two: equal bit for bit, whatever their formats."""
    from ckpt_tool import api

    with _progress("verify", quiet or run.json) as progress:
        verdict = api.verify(a, b, config=config, how=run.execution(progress))
    _print_verdict(verdict, compared=b is not None, json=run.json, quiet=quiet)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(
    short_help="What is wrong with a checkpoint, and what to do.",
    epilog=_examples("doctor run/checkpoints", "doctor run/checkpoints --json"),
)
@spread()
def doctor(
    src: Source,
    config: Config = None,
    *,
    run: Reading,
    quiet: Quiet = False,
) -> None:
    """Say what is wrong with a checkpoint: files, metadata and every value, which are read once."""
    from ckpt_tool import api, report
    from ckpt_tool.diagnosis.shown import as_json, as_lines

    with _progress("doctor", quiet or run.json) as progress:
        diagnosis = api.doctor(src, config=config, how=run.execution(progress))
    if run.json:
        report.print_json(as_json(diagnosis))
    else:
        for line in as_lines(diagnosis, quiet=quiet):
            report.show(line)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command(short_help="The model families that are known.")
def families(json: Json = False) -> None:
    """The model families known: what config.json calls them, how published files hold their experts."""
    from ckpt_tool import report
    from ckpt_tool.families import families_rows

    rows = families_rows()
    if json:
        report.print_json(rows)
        return
    columns = ["family", "model_types", "hub_layout", "autoep"]
    lines = [[_cell(row[column]) for column in columns] for row in rows]
    report.print_table(f"{len(rows)} families", columns, lines, right=set())


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


@app.command(short_help="The main job on a small real checkpoint.")
def demo(
    directory: Annotated[
        Path | None,
        typer.Argument(readable=False, help="Where to write the results. Default: a temporary directory."),
    ] = None,
) -> None:
    """The main job on a small real checkpoint: inspect, re-shard, convert, consolidate, verify."""
    from ckpt_tool.demo import run

    run(directory)


# ---- shared by the commands


def _progress(label: str, quiet: bool, *, resumable: bool = False) -> Progress:
    from ckpt_tool.report import Progress

    return Progress(label, quiet=quiet, resumable=resumable)


def _print_verdict(verdict: Verdict, *, compared: bool, json: bool, quiet: bool) -> None:
    from ckpt_tool import report

    if json:
        report.print_json(
            {
                "passed": verdict.passed,
                "tensors": verdict.tensors,
                "bytes_compared": verdict.bytes_compared,
                "differences": [difference._asdict() for difference in verdict.differences],
                "notes": list(verdict.notes),
            }
        )
        return
    if not quiet:
        for note in verdict.notes:
            report.say(f"note: {note}")
    if quiet and verdict.passed:
        return
    size = report.human_bytes(verdict.bytes_compared)
    of = f"{verdict.tensors} tensors, {size} {'compared' if compared else 'checked'}"
    if verdict.passed:
        unchecked = "complete, no checksums to check" if not verdict.bytes_compared else "sound"
        typer.echo(f"{'equal' if compared else unchecked}: {of}")
        return
    count = len(verdict.differences)
    typer.echo(f"{count} difference{'s' if count > 1 else ''}: {of}")
    for line in _differences(verdict.differences):
        report.show(line)


def _differences(found: Iterable[Difference]) -> Iterator[str]:
    """A line for each kind with its number, and the first of it below."""
    kinds: dict[str, list[Difference]] = {}
    for difference in found:
        kinds.setdefault(difference.kind, []).append(difference)
    for kind, alike in sorted(kinds.items(), key=lambda item: -len(item[1])):
        yield f"{kind}: {len(alike)}"
        yield from (f"  {difference.message}" for difference in alike[:_SHOWN])
        if len(alike) > _SHOWN:
            yield f"  and {len(alike) - _SHOWN} more (--json lists all)"


def main() -> None:
    """Entry point: turns errors into a sentence on stderr and an exit code."""
    from ckpt_tool.errors import CkptToolError
    from ckpt_tool.report import discard_stdout
    from ckpt_tool.system_errors import output_failed

    try:
        try:
            arguments = _with_default_glob(sys.argv[1:])
            code = app(args=arguments, prog_name="ckpt-tool", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(code or 0)
    except _Misuse as error:
        _complain(_misused(error))
        sys.exit(2)
    except CkptToolError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # the API tells of files; what is left is what is printed
        discard_stdout()
        failure = output_failed(error)
        _complain(str(failure))
        sys.exit(failure.exit_code)
    except Exception:
        import traceback

        traceback.print_exc()
        _complain("this is a bug in ckpt-tool; please report it with the lines above")
        sys.exit(4)


def _misused(error: Exception) -> str:
    """What typer found wrong with the command line, and where to read on."""
    message = str(getattr(error, "format_message")()).rstrip()  # noqa: B009 (typer's classes are not public)
    message = re.sub(r"is not a valid int(eger)?( range)?\.?", "is not a whole number.", message)
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "ckpt-tool")
    end = "" if message.endswith((".", "?", "!")) else "."
    return f"{message}{end} `{command} --help` shows all options."


def _complain(message: str) -> None:
    from ckpt_tool.report import say

    say(f"ckpt-tool: {message}")


def _refuse_half_a_pattern(following: str) -> None:
    """Raises:
    UsageError: what follows ``--experts`` is neither a pattern nor a checkpoint's path.
    """
    from ckpt_tool.errors import UsageError

    if re.fullmatch(r"[\d*?]+|all", following) and not Path(following).exists():
        raise UsageError(
            f"--experts {following}: write LAYER:EXPERT, '{following}:*' for the experts of a layer or "
            f"'*:{following}' for one expert of every layer; --experts alone lists all."
            if following != "all"
            else "--experts all: --experts alone lists all; '3:*' are those of layer 3."
        )


def _with_default_glob(arguments: list[str]) -> list[str]:
    """``--tensors`` and ``--experts`` may stand without a pattern."""
    result = []
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        if argument == "--tensors" and following.startswith("-"):
            result.append("--tensors=*")
        elif argument == "--experts" and not _EXPERTS.fullmatch(following):
            _refuse_half_a_pattern(following)
            result.append("--experts=*:*")
        else:
            result.append(argument)
    return result
