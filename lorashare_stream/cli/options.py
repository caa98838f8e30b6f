"""The commands as a shell sees them: a signature is the arguments and options, beside those that commands share.

An option that sets a setting shows what `settings` says of it. What a command does is in `commands`, `edit` and `hub`,
which are imported when it runs.
"""

# ruff: noqa: B008 - typer takes what an option is from the default of a parameter

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args, get_origin

import typer
import typer.core
import typer.main

from ..errors import UsageError
from ..settings import HUB, LIMITS, MEANS, SOURCES, STORED, TYPES, choices_of, flags_of, shown
from ..text import printable
from ..version import __version__

PROGRAM = "lorashare-stream"
_EPILOG = "Exit codes: 0 done, 1 permanent error, 2 usage, 3 done but adapters were left out, 75 stopped: run it again."
_HELP = {"help_option_names": ["-h", "--help"]}
_ONE_OF = (
    ("num_components", *LIMITS), ("quiet", "verbose"), ("dask_scheduler", "dask_local"), ("adapter", "all"),
    ("private", "public"),
)  # fmt: skip

Flag = bool | None  # None: not given, here and below
Text = str | None
Number = int | None
Words = list[str] | None


def _option(text: str, metavar: str = "", *flags: str, group: str | None = None, **more: Any) -> Any:
    """An option that may be left out; its flag is its name, unless others are given."""
    return typer.Option(None, *flags, help=text, metavar=metavar, rich_help_panel=group, show_default=False, **more)


def _needed(text: str, metavar: str, *flags: str) -> Any:
    return typer.Option(..., *flags, help=text, metavar=metavar)


def _argument(metavar: str, text: str, default: Any = ...) -> Any:
    return typer.Argument(default, metavar=metavar, help=text, show_default=False)


_CHECKPOINT = _argument("CHECKPOINT", "its folder")
_ANYWHERE = _argument("CHECKPOINT", "its folder, or an id of the Hub")
_ADDRESS = "work on a running Dask cluster, whose workers see the same storage; or its --scheduler-file"
_SOURCE = "adapter folder, folder of them, glob, manifest, or Hub id: org/name, org/name@revision, org/name//folder"
_SHARED: Mapping[str, tuple[Any, Any]] = {  # options of several commands that are no settings
    "names": (Words, _option("of the sources, which are then adapter folders", "NAME", group=SOURCES)),
    "config": (Text, _option("the same settings from a file; flags win", "FILE.yaml", group=SOURCES)),
    "workspace": (Text, _option("folder of resumable state (default: beside the checkpoint)", "DIR", group=MEANS)),
    "dask_scheduler": (Text, _option(_ADDRESS, "ADDRESS", group=MEANS)),
    "dask_local": (Number, _option("work in N processes of this machine, each with --memory", "N", group=MEANS)),
    "take_lock": (
        Flag,
        _option("take over the lock of a host that is known to be dead", "", "--take-lock", group=MEANS),
    ),
    "json": (Flag, _option("print one JSON object on stdout, and nothing else", "", "--json")),
    "quiet": (Flag, _option("no progress and no notes; results, warnings and errors remain", "", "-q", "--quiet")),
    "verbose": (Flag, _option("say more", "", "-v", "--verbose")),
}
_LIMIT = ("num_components", *LIMITS, "variance_threshold")
_RUN = ("workspace", "memory", "workers", "device", "disk_budget", "offline")
_CLUSTER = ("dask_scheduler", "dask_local", "take_lock")
_ADAPTERS = ("names", "on_error", "base_aliases", "any_base")
_ALL = (
    "config", "base_model", *_ADAPTERS, *_LIMIT, "directions", "objective", "center", "moment_dtype", "dtype",
    "share_initial", *_RUN,
)  # fmt: skip
_ON_ONLY = ("offline", "discard_moments")  # switches that no option turns off
_MAKE, _READ, _CHANGE = "Compress", "Look, check and restore", "Change a checkpoint"


class _Help:
    """Help that shows `SIZE` where typer shows a type of Python, and `--[no-]center` in place of two options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; a command does nothing else then."""
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            word = param.metavar if isinstance(param, typer.core.TyperOption) else None
            vars(param)["display_type_rich"] = lambda ctx, word=word: word
            if param.secondary_opts:
                param.opts, param.secondary_opts = [param.opts[0].replace("--", "--[no-]")], []
        with suppress(SystemExit):  # of rich, if the reader has gone
            super().format_help(ctx, formatter)  # type: ignore[misc]


class _Command(_Help, typer.core.TyperCommand):
    pass


class _Commands(_Help, typer.core.TyperGroup):
    pass


app = typer.Typer(
    help="Compress thousands of LoRA adapters of one base model: each coded alone, or all on shared bases (SHARE).",
    epilog=_EPILOG, rich_markup_mode="rich", context_settings=_HELP, cls=_Commands,
)  # fmt: skip


def _parameter(name: str) -> inspect.Parameter:
    """A shared option; of one that sets a setting, the settings refuse what is none of its choices, as in Python."""
    if name in _SHARED:
        kind, option = _SHARED[name]
    else:
        what, choices, flags, declared = shown(name), choices_of(name), flags_of(name), get_args(TYPES[name])[0]
        kind = bool if declared is bool else list[str] if get_origin(declared) is tuple else what.kind
        if kind is bool and name not in _ON_ONLY:
            flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
        text = f"{{{','.join(choices)}}}: {what.help}" if choices else what.help
        completion = {"autocompletion": lambda: choices} if choices else {}
        kind, option = kind | None, _option(text, what.metavar, *flags, group=what.group, **completion)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=option)


def command(group: str, *shared: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function without a body a command of a group, with options that it shares besides its own."""

    def register(of: Callable[..., None]) -> Callable[..., None]:
        def given(**values: Any) -> dict[str, Any]:
            return {"command": of.__name__} | {k: v for k, v in values.items() if v is not None and v != []}

        own = inspect.signature(of, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        parameters += map(_parameter, (*shared, "json", "quiet", "verbose"))
        vars(given)["__signature__"] = inspect.Signature(parameters)
        what: Any = {"help": of.__doc__, "rich_help_panel": group, "epilog": _EPILOG, "context_settings": _HELP}
        app.command(of.__name__, cls=_Command, **what)(given)
        return of

    return register


@command(_MAKE, *_ALL)
def plan(
    sources: Words = _argument("SOURCE", _SOURCE, None),
    output: Text = _option("write the plan, for compress --plan", "PLAN.json", "-o", "--output", group=STORED),
    analyze: Flag = _option(
        "read a sample, too: bytes against error, coded and for every k; for a limit, fetch it if need be",
        "", "--analyze", group=SOURCES,
    ),
    sample: Number = _option("adapters of the sample (default: 64 at most)", "N", group=SOURCES),
) -> None:  # fmt: skip
    """Read headers only: what will be read, computed and written, and what is refused.

    For a limit a sample is coded, too, which foretells bytes and errors.
    """


@command(_MAKE, *_ALL, "discard_moments", *_CLUSTER)
def compress(
    sources: Words = _argument("SOURCE", _SOURCE, None),
    plan: Text = _option("run this plan", "PLAN.json", group=SOURCES),
    output: Text = _option("the checkpoint's folder", "OUT", "-o", "--output", group=STORED),
    overwrite: Flag = _option("replace a checkpoint of another run", group=STORED),
    layer_by_layer: Flag = _option("no effect: adapters are always streamed", "", "--layer-by-layer"),
    chunk_size: Number = _option("no effect: adapters are always streamed", "N"),
) -> None:
    """Compress adapters: -k into a SHARE checkpoint, a limit into a coded one. The same command again goes on."""


@command(_CHANGE, *_ADAPTERS, *_RUN, *_CLUSTER)
def add(
    checkpoint: str = _CHECKPOINT,
    sources: list[str] = _argument("SOURCE", "as for compress"),
    accept: float | None = _option(
        "share of an adapter's dW energy that the bases must keep, else all are fitted again (0.95)",
        "T", "--variance", group=STORED,
    ),
) -> None:  # fmt: skip
    """Add adapters to a checkpoint: on its bases if these hold them well enough, else on new ones; or coded alone."""


@command(_CHANGE, *_RUN, *_CLUSTER)
def remove(
    checkpoint: str = _CHECKPOINT,
    adapters: Words = _argument("NAME", "none is for --refit of what was taken out before", None),
    refit: Flag = _option("compute moments and bases anew without them", "", "--refit"),
) -> None:
    """Take adapters out of a checkpoint, and say where their trace is left."""


@command(_CHANGE, *_LIMIT, "directions", *_RUN, "discard_moments", *_CLUSTER)
def refit(
    place: str = _argument("CHECKPOINT|WORKSPACE", "k or a limit that is not given is as it was"),
    output: str = _needed("the new checkpoint; may be the old one", "OUT", "-o", "--output"),
    overwrite: Flag = _option("replace a checkpoint of another run", "", "--overwrite"),
) -> None:
    """Another k from the same moments, or a limit from the sources; or bases for all that was added and taken out."""


@command(_READ, "offline")
def info(checkpoint: str = _ANYWHERE) -> None:
    """What a checkpoint holds, how large it is, how far off."""


@command(_READ, "offline")
def report(checkpoint: str = _ANYWHERE, output: str = _needed("the page", "REPORT.html", "-o", "--output")) -> None:
    """Write one page of pictures: errors, spectra, bytes, what was left out, provenance."""


@command(_READ, "offline")
def reconstruct(
    checkpoint: str = _ANYWHERE,
    output: str = _needed("where to write", "DIR", "-o", "--output"),
    adapter: Words = _option("one adapter is written into DIR, several into DIR/NAME", "NAME"),
    all: Flag = _option("all adapters", "", "--all"),  # noqa: A002 - the option's name
    uniform: Flag = _option("one rank and scale 1 for all modules, with the same dW", "", "--uniform"),
    rank: Number = _option("of all modules, uniform (default: the largest of each adapter)", "R"),
    engine: Text = _option(
        "{vllm,sglang,lorax,llama.cpp,peft}: uniform, refused if that engine does not take all of it", "ENGINE", "--for"
    ),
) -> None:
    """Write adapters of a checkpoint as PEFT adapter folders, for PEFT or, uniform, for other engines."""


@command(_READ, "offline")
def verify(
    checkpoint: str = _ANYWHERE,
    sources: Words = _option("the originals; else those of the workspace", "SOURCE"),
    workspace: Text = _option("that knows the originals; else the one beside the checkpoint", "DIR"),
) -> None:
    """Measure errors against the originals, per adapter, worst first."""


@command(HUB, "offline")
def discover(
    base_model: str = _needed("of which they are adapters", "ID", "--base-model"),
    output: str = _needed("the manifest to write", "MANIFEST.jsonl", "-o", "--output"),
    base_aliases: Words = _option("its mirrors and quantised copies", "ID", "--base-alias"),
    author: Text = _option("of this account only", "A"),
    search: Text = _option("whose names have this", "S"),
    limit: Number = _option("how many adapters at most, those with most downloads", "N"),
    min_downloads: Number = _option("of a repository", "N"),
) -> None:
    """List the adapters of a base model on the Hub, pinned, in a manifest for compress."""


@command(HUB)
def push(
    checkpoint: str = _CHECKPOINT,
    repo_id: str = _argument("ORG/NAME", "a repository, which is made if it is not there"),
    private: Flag = _option("the default if a source is gated or private", "", "--private"),
    public: Flag = _option("even if a source is gated or private", "", "--public"),
    revision: Text = _option("to this branch, which is made if it is not there", "BRANCH"),
    create_pr: Flag = _option("as a pull request", "", "--create-pr"),
    overwrite: Flag = _option("replace a checkpoint of other adapters", "", "--overwrite"),
    message: Text = _option("of the commit", "TEXT", "-m", "--message"),
) -> None:
    """Upload a checkpoint to the Hub, its configuration last. Run again, it goes on where it was."""


COMMANDS = {known.name for known in app.registered_commands}


def _show_version(wanted: Flag) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Flag = _option("the version", "", "--version", is_eager=True, callback=_show_version)) -> None:
    pass


def parsed(words: Sequence[str]) -> dict[str, Any] | int:
    """The command and what was given to it, by name; an exit code if all that was asked for has been shown, as help.

    Raises:
        UsageError: on words that are no command, option or value.
    """
    top: Any = typer.main.get_command(app)
    one = top.commands.get(words[0]) if words else None
    try:  # the command by itself: for options of `top` that are not there typer would import pydantic, for --help, too
        found: dict[str, Any] | int = (
            top.main(words, PROGRAM, standalone_mode=False)
            if one is None
            else one.main(_each(words[1:], one.params), f"{PROGRAM} {one.name}", standalone_mode=False)
        )
    except typer.TyperException as e:
        raise UsageError(printable(e.format_message(), 1000).rstrip(".")) from e
    return found


def _each(words: Sequence[str], params: Sequence[Any]) -> list[str]:
    """`--names a --names b` of `--names a b`: typer knows no option that takes all words that follow.

    Raises:
        UsageError: on an option whose value is missing, for which typer would take the next option.
    """
    takes = {flag: param.multiple for param in params if not getattr(param, "is_flag", True) for flag in param.opts}
    given: list[str] = []
    greedy = ""
    for at, word in enumerate(words):
        if word == "--":
            return [*given, *words[at:]]
        value = _is_value(word)
        greedy = greedy if value else word if takes.get(word) else ""
        if word in takes and not any(map(_is_value, words[at + 1 : at + 2])):
            raise UsageError(f"{word} needs a value", found=" ".join(words[at + 1 : at + 2]) or None)
        given += [greedy, word] if greedy and value else [] if greedy else [word]
    return given


def _is_value(word: str) -> bool:
    return re.match("-[^0-9]", word) is None


def demand_one_of_each(args: Mapping[str, Any]) -> None:
    """Check the options of which each excludes the others.

    Raises:
        UsageError: if two of them were given.
    """
    for names in _ONE_OF:
        flags = [flags_of(n)[0] if n in TYPES else f"--{n.replace('_', '-')}" for n in names if n in args]
        if len(flags) > 1:
            raise UsageError(f"{flags[1]} is not allowed with {flags[0]}", remedy="Give only one of them.")
