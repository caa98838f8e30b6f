"""The arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from ..settings import CHOICES
from ..text import printable
from ..version import __version__

_EPILOG = "Exit codes: 0 done, 1 permanent error, 2 usage, 3 done but adapters were left out, 75 stopped: run it again."


class Parser(argparse.ArgumentParser):
    """Shows foreign arguments escaped."""

    def error(self, message: str) -> NoReturn:
        """Print usage and a message, and exit with 2."""
        super().error(printable(message, 1000))


def parser() -> argparse.ArgumentParser:
    """All commands and their options. Options that were not given are absent from the result."""
    top = Parser(prog="lorashare-stream", epilog=_EPILOG)
    top.description = (
        "Compress thousands of LoRA adapters of one base model: each coded alone, or all on shared bases (SHARE)."
    )
    top.add_argument("--version", action="version", version=f"lorashare-stream {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
        loud = p.add_mutually_exclusive_group()
        loud.add_argument(
            "-q", "--quiet", action="store_true", help="no progress and no notes; results, warnings and errors remain"
        )
        loud.add_argument("-v", "--verbose", action="store_true", help="say more")
        return p

    _add_plan(command)
    p = command(
        "compress",
        "Compress adapters: -k into a SHARE checkpoint, a limit into a coded one. The same command again goes on.",
    )
    _add_sources(p)
    p.add_argument("-o", "--output", metavar="OUT", help="the checkpoint's folder")
    p.add_argument("--plan", metavar="PLAN.json", help="run this plan")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, help="replace a checkpoint of another run")
    p.add_argument("--layer-by-layer", action="store_true", help="no effect: adapters are always streamed")
    p.add_argument("--chunk-size", type=int, metavar="N", help="no effect: adapters are always streamed")
    p.add_argument("--discard-moments", action="store_true", help="free moments as soon as bases are fitted: less disk")
    _add_lock(p)
    _add_cluster(p)
    _add_edits(command)
    _add_readers(command)
    _add_hub(command)
    return top


def _one_of(name: str) -> str:
    """The values that a setting may have; what is none of them, the settings refuse, as in Python."""
    return f"{{{','.join(CHOICES[name])}}}"


def _add_plan(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command(
        "plan",
        "Read headers only: what will be read, computed and written, and what is refused. For a limit a sample is "
        "coded, too, which foretells bytes and errors.",
    )
    _add_sources(p)
    p.add_argument("-o", "--output", metavar="PLAN.json", help="write the plan, for compress --plan")
    p.add_argument(
        "--analyze",
        action="store_true",
        help="read a sample, too: bytes against error, coded and for every k; for a limit, fetch it if need be",
    )
    p.add_argument("--sample", type=int, metavar="N", help="adapters of the sample (default: 64 at most)")


def _add_edits(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command(
        "add",
        "Add adapters to a checkpoint: on its bases if these hold them well enough, else on new ones; or coded alone.",
    )
    p.add_argument("checkpoint")
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="as for compress")
    p.add_argument("--names", nargs="+", metavar="NAME", help="names of the sources, which are then adapter folders")
    p.add_argument(
        "--variance", type=float, metavar="T", dest="accept",
        help="share of an adapter's dW energy that the bases must keep, else all are fitted again (0.95)",
    )  # fmt: skip
    _add_on_error(p)
    _add_base(p)
    _add_means(p)
    p = command("remove", "Take adapters out of a checkpoint, and say where their trace is left.")
    p.add_argument("checkpoint")
    p.add_argument("adapters", nargs="*", metavar="NAME", help="none is for --refit of what was taken out before")
    p.add_argument("--refit", action="store_true", help="compute moments and bases anew without them")
    _add_means(p)
    p = command(
        "refit",
        "Another k from the same moments, or a limit from the sources; or bases for all that was added and taken out.",
    )
    p.add_argument("place", metavar="CHECKPOINT|WORKSPACE")
    _add_limit(p, "components per group, or auto (default: as it was)")
    p.add_argument("-o", "--output", metavar="OUT", required=True, help="the new checkpoint; may be the old one")
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint of another run")
    p.add_argument("--discard-moments", action="store_true", help="free moments as soon as bases are fitted: less disk")
    _add_means(p)


def _add_readers(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command("info", "What a checkpoint holds, how large it is, how far off.")
    p.add_argument("checkpoint", help="its folder, or an id of the Hub, as for reconstruct and verify")
    _add_offline(p)
    p = command("report", "Write one page of pictures: errors, spectra, bytes, what was left out, provenance.")
    p.add_argument("checkpoint", help="its folder, or an id of the Hub")
    p.add_argument("-o", "--output", metavar="REPORT.html", required=True)
    _add_offline(p)
    p = command("reconstruct", "Write adapters of a checkpoint as PEFT adapter folders.")
    p.add_argument("checkpoint")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--adapter", nargs="+", metavar="NAME", help="one adapter is written into DIR, several into DIR/NAME"
    )
    which.add_argument("--all", action="store_true", help="all adapters")
    p.add_argument("-o", "--output", metavar="DIR", required=True)
    _add_offline(p)
    p = command("verify", "Measure errors against the originals, per adapter, worst first.")
    p.add_argument("checkpoint")
    p.add_argument("--sources", nargs="+", metavar="SOURCE", help="the originals; else those of the workspace")
    p.add_argument("--workspace", metavar="DIR", help="that knows the originals; else the one beside the checkpoint")
    _add_offline(p)


def _add_hub(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command("discover", "List the adapters of a base model on the Hub, pinned, in a manifest for compress.")
    p.add_argument("--base-model", metavar="ID", required=True, help="of which they are adapters")
    p.add_argument(
        "--base-alias", nargs="+", metavar="ID", dest="base_aliases", help="its mirrors and quantised copies"
    )
    p.add_argument("--author", metavar="A", help="of this account only")
    p.add_argument("--search", metavar="S", help="whose names have this")
    p.add_argument("--limit", type=int, metavar="N", help="how many adapters at most, those with most downloads")
    p.add_argument("--min-downloads", type=int, metavar="N", help="of a repository")
    p.add_argument("-o", "--output", metavar="MANIFEST.jsonl", required=True)
    _add_offline(p)
    p = command("push", "Upload a checkpoint to the Hub, its configuration last. Run again, it goes on where it was.")
    p.add_argument("checkpoint")
    p.add_argument("repo_id", metavar="ORG/NAME")
    seen = p.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="the default if a source is gated or private")
    seen.add_argument("--public", action="store_false", dest="private", help="even if a source is gated or private")
    p.add_argument("--revision", metavar="BRANCH", help="to this branch, which is made if it is not there")
    p.add_argument("--create-pr", action="store_true", help="as a pull request")
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint of other adapters")
    p.add_argument("-m", "--message", metavar="TEXT", help="of the commit")


def _add_sources(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="adapter folder, folder of them, glob, manifest, or Hub id: org/name, org/name@revision, org/name//folder",
    )
    p.add_argument("--names", nargs="+", metavar="NAME", help="names of the sources, which are then adapter folders")
    _add_limit(p, "components per group, or auto (default: 32)")
    p.add_argument(
        "--objective",
        metavar=_one_of("objective"),
        help="delta: least error of dW (default); factors: A and B on their own",
    )
    p.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        help="subtract the mean, as the published method does; factors only",
    )
    p.add_argument("--moment-dtype", metavar=_one_of("moment_dtype"), help="of what is summed (default: float32)")
    _add_resources(p)
    _add_on_error(p)
    p.add_argument(
        "--dtype",
        metavar=_one_of("dtype"),
        help="of what is stored (default: auto, the precision of the sources); a limit has no use for it",
    )
    p.add_argument("--base-model", metavar="ID", help="what the adapters are adapters of (default: what most name)")
    _add_base(p)
    p.add_argument(
        "--share-initial",
        action=argparse.BooleanOptionalAction,
        help="compress adapters whose factors hold a part of the base (PiSSA, OLoRA, ...), else kept exact",
    )
    p.add_argument("--config", metavar="FILE.yaml", help="the same settings from a file; flags win")


def _add_limit(p: argparse.ArgumentParser, of_k: str) -> None:
    size = p.add_mutually_exclusive_group()
    size.add_argument("-k", "--num-components", metavar="K", help=of_k)
    size.add_argument("--max-bytes", metavar="SIZE", help="the best checkpoint of at most this size on disk")
    size.add_argument(
        "--ratio", type=float, metavar="R", help="the best one that is R times smaller than the originals"
    )
    size.add_argument(
        "--max-error", type=float, metavar="E",
        help="the smallest one in which no adapter's relative dW error is above E",
    )  # fmt: skip
    p.add_argument("--trim-rank", action="store_true", help=argparse.SUPPRESS)  # gone, which the settings say
    p.add_argument(
        "--variance", type=float, metavar="T", dest="variance_threshold", help="share that auto keeps (0.95)"
    )


def _add_on_error(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--on-error",
        metavar=_one_of("on_error"),
        help="raise (default), or skip: go on without adapters that cannot be compressed, or are not there",
    )


def _add_base(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base-alias", nargs="+", metavar="ID", dest="base_aliases", help="other names of the base model")
    p.add_argument("--any-base", action=argparse.BooleanOptionalAction, help="accept adapters that name any base model")


def _add_resources(p: argparse.ArgumentParser) -> None:
    p.add_argument("--workspace", metavar="DIR", help="folder of resumable state (default: beside the checkpoint)")
    p.add_argument(
        "--memory",
        metavar="SIZE",
        help="what the process may use, or each worker of a cluster (default: 4GiB, or what its control group has)",
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="tasks at a time (default: one per core that it may use, or thread of a worker)",
    )
    p.add_argument("--device", metavar=_one_of("device"), help="where to compute (default: auto)")
    p.add_argument(
        "--disk-budget",
        metavar="SIZE",
        help="fetch adapters of the Hub in batches, and again to project them (default: all, into its cache)",
    )
    _add_offline(p)


def _add_cluster(p: argparse.ArgumentParser) -> None:
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--dask-scheduler",
        metavar="ADDRESS",
        help="work on a running Dask cluster, whose workers see the same storage; or its --scheduler-file",
    )
    where.add_argument(
        "--dask-local", type=int, metavar="N", help="work in N processes of this machine, each with --memory"
    )


def _add_offline(p: argparse.ArgumentParser) -> None:
    p.add_argument("--offline", action="store_true", help="never ask the Hub: what is in its cache must do")


def _add_lock(p: argparse.ArgumentParser) -> None:
    p.add_argument("--take-lock", action="store_true", help="take over the lock of another host, known to be dead")


def _add_means(p: argparse.ArgumentParser) -> None:
    _add_resources(p)
    _add_lock(p)
    _add_cluster(p)
