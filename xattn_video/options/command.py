"""Builds a command from a function; dataclasses among its arguments become options."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

import typer

from xattn_video.pipelines.job_ranks import JobRanks, launched_count
from xattn_video.reporting.console import TYPED_OPTIONS, expands_paths, log_choices
from xattn_video.reporting.endings import ErrorsToExitCodes

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}
# Marks the option of a file that is read; other files are written.
_READS = "reads"
_VERBOSE = "Log decisions, and print the traceback of an error."
_QUIET = "Print only results, warnings and errors, without progress."

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
"""The option of every command that prints a table."""


@dataclass(frozen=True, slots=True)
class Group:
    """Several options that become one argument of a command.

    Attributes:
        options: The options by name.
        make: Function from the values of all options of the command, by name, to the argument.
    """

    options: dict[str, inspect.Parameter]
    make: Callable[[dict[str, Any]], Any]


def knob(text: str, default: Any = None, *names: str, **metadata: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        text: The help text.
        default: The default; ``...`` if the option must be given.
        names: The names of the option, if they differ from the field's name.
        metadata: ``panel`` (of the help), ``shown_default``, and ``reads`` (a file that is read).
    """
    metadata |= {"help": text, "names": names}
    return field(default=MISSING if default is ... else default, metadata=metadata)


def option(source: "Field[Any]", **changes: Any) -> inspect.Parameter:
    """The option for a dataclass field, with the field's type, default and help.

    Args:
        source: The field; its metadata is as in `knob`.
        changes: Metadata to replace, and ``name``, ``kind`` or ``default``.
    """
    told = {**source.metadata, **changes}
    default = told.get("default", source.default)
    # A typed value is plain: it has the type of the default, whatever else the field accepts.
    plain = source.type if source.default in (None, MISSING) else type(source.default)
    kind = told.get("kind", plain)
    declared = typer.Option(
        *told.get("names", ()),
        help=told["help"],
        rich_help_panel=told.get("panel"),
        show_default=told.get("shown_default", True),
    )
    mark = _READS if told.get("reads") else None
    return inspect.Parameter(
        told.get("name", source.name),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, declared, mark],
    )


def group_of(cls: Any) -> Group:
    """The options of a dataclass whose fields are all knobs."""
    options = {source.name: option(source) for source in fields(cls)}
    return Group(options, lambda values: cls(**{name: values[name] for name in options}))


def given_options(context: typer.Context) -> list[tuple[str, str]]:
    """For every option that was typed, the name of its argument and the option's first name."""
    return [
        (str(parameter.name), parameter.opts[0])
        for parameter in context.command.params
        if getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]


@dataclass(frozen=True, slots=True)
class _Messages:
    verbose: bool = knob(_VERBOSE, False, "--verbose")
    quiet: bool = knob(_QUIET, False, "--quiet", "-q")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command whose options are made from the arguments of ``function``.

    An argument that is a dataclass or is annotated with a `Group` stands for several options.
    Arguments of type `ErrorsToExitCodes` (the context in which the command runs), `JobRanks` (this
    process among several) and `typer.Context` (what was typed) are passed in. Every other argument
    is one option. Every command has ``--verbose`` and ``--quiet``. Its errors become one line,
    with the options as they are typed, and an exit code.
    """
    groups: dict[str, Group] = {}
    options: dict[str, inspect.Parameter] = {}
    running, several, typed = [], [], []
    for name, parameter in inspect.signature(function).parameters.items():
        metadata = (*get_args(parameter.annotation)[1:], None)
        if parameter.annotation is ErrorsToExitCodes:
            running.append(name)
        elif parameter.annotation is JobRanks:
            several.append(name)
        elif parameter.annotation is typer.Context:
            typed.append(name)
        elif isinstance(metadata[0], Group) or is_dataclass(parameter.annotation):
            groups[name] = metadata[0] or group_of(parameter.annotation)
            options |= groups[name].options
        else:
            options[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    single = [name for name in options if name in inspect.signature(function).parameters]
    options |= group_of(_Messages).options
    names = _typed_names(options.values())
    reads = {name for name, one in options.items() if _READS in get_args(one.annotation)}
    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )

    def run(context: typer.Context, **values: Any) -> None:
        log_choices(values["verbose"], values["quiet"])
        TYPED_OPTIONS.set(names)
        ranks = context.obj or JobRanks()
        with ErrorsToExitCodes(values["verbose"], ranks.first_failure) as errors:
            # Scripts do not join the ranks of commands that are for one process.
            count = max(ranks.count, launched_count())
            if count > 1 and not several:
                raise ValueError(
                    f"{context.command_path} runs as one process, got {count} ranks; "
                    "start it without torchrun or accelerate launch."
                )
            ranks.agree("options", values)
            # What all ranks refuse, the first one says.
            with ranks.first_ahead():
                _check_files(values, names, reads)
                arguments = {name: values[name] for name in single}
                arguments |= {name: group.make(values) for name, group in groups.items()}
            arguments |= dict.fromkeys(running, errors) | dict.fromkeys(several, ranks)
            arguments |= dict.fromkeys(typed, context)
            function(**arguments)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature([context, *options.values()])  # type: ignore[attr-defined]
    return expands_paths(run)


def _check_files(values: dict[str, Any], names: dict[str, str], reads: set[str]) -> None:
    """Raise ValueError if a file that the command writes is one that it reads."""
    files = {name: path for name, path in values.items() if isinstance(path, Path)}
    for read in reads & files.keys():
        for written in files.keys() - reads:
            if files[read].resolve() == files[written].resolve():
                raise ValueError(
                    f"{names[read]} and {names[written]} both name {str(files[read])!r}, which "
                    f"would be replaced; give {names[written]} another file."
                )


def _typed_names(options: Iterable[inspect.Parameter]) -> dict[str, str]:
    """{name of a field or argument: option as typed}."""
    typed = {}
    for parameter in options:
        declared = (*get_args(parameter.annotation)[1:], None)[0]
        # In an annotation, typer takes the first name for the default.
        told = (
            getattr(declared, "default", None),
            *(getattr(declared, "param_decls", None) or ()),
        )
        names = [name for name in told if isinstance(name, str) and name.startswith("--")]
        names = names or [f"--{parameter.name.replace('_', '-')}"]
        for name in (parameter.name, *names):
            typed[name.strip("-").replace("-", "_")] = names[0]
    return typed
