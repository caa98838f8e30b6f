"""What a command is asked to do: settings and sources from flags, configuration files and saved plans."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.hubid import parse_hub_id
from ..adapters.source import Source
from ..errors import UsageError
from ..files import read_json
from ..pipeline import plan_for
from ..plan.manifests import read_yaml
from ..plan.plan import Plan
from ..plan.sources import resolve
from ..runtime.dask import connected, started, workers_of
from ..runtime.progress import Progress, silent
from ..schema import FORMAT, SkippedFile
from ..settings import LIMITS, TYPES, Settings, overridden
from ..text import listed, name_fault, printable

Args = Mapping[str, Any]
log = logging.getLogger(__name__)
_PLACES: dict[str, type] = {"output": str, "workspace": str, "overwrite": bool, "sources": object}
_GREEDY = {"names": "--names", "base_aliases": "--base-alias"}


def with_config(args: Args) -> dict[str, Any]:
    """Arguments over what `--config` sets; paths in it are as on the command line."""
    chosen = dict(args)
    if not chosen.get("sources"):
        chosen.pop("sources", None)
    if "config" not in args:
        return chosen
    path = Path(args["config"])
    if not path.is_file():
        raise UsageError("no such configuration file", found=path)
    values = read_yaml(path) or {}
    allowed = TYPES.keys() | _PLACES.keys()
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UsageError("the configuration is not a mapping of settings", found=printable(values))
    unknown = sorted(k for k in values if k not in allowed)
    if unknown:
        raise UsageError(
            f"unknown setting in {printable(path)}", found=listed(unknown), expected=listed(sorted(allowed), 20)
        )
    for name, kind in _PLACES.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{name} in {printable(path)} cannot be meant", found=values[name], expected=kind.__name__)
    several = [name for name in ("num_components", *LIMITS) if values.get(name) is not None]
    if len(several) > 1:
        raise UsageError(
            f"{printable(path)} says twice how large it may be", found=listed(several), expected="one of them"
        )
    return overridden(values, chosen)


@contextmanager
def cluster_of(args: Args) -> Iterator[Any]:
    """A client of the cluster that is asked for, until the end of the block; None if none is.

    Raises:
        UnreachableClusterError: if it does not answer, or has no workers.
    """
    if "dask_scheduler" not in args and "dask_local" not in args:
        yield None
        return
    with connected(args["dask_scheduler"]) if "dask_scheduler" in args else started(args["dask_local"]) as cluster:
        yield cluster


def with_workers(chosen: Args, cluster: Any) -> dict[str, Any]:
    """Arguments, with as many tasks at a time in a process as the cluster's have threads, if nothing is said of it."""
    return {**({} if "plan" in chosen else workers_of(cluster)), **chosen}  # a saved plan says something of it


def _settings(chosen: Args) -> Settings:
    return Settings.from_mapping({k: v for k, v in chosen.items() if k in TYPES})


def named_sources(chosen: Args, skipping: bool) -> list[Source]:
    """The adapters that sources and `--names` mean.

    Args:
        chosen: the arguments.
        skipping: whether those that are not there are given all the same, for the catalog to refuse.
    """
    sources = chosen.get("sources")
    if not sources:
        greedy = [flag for name, flag in _GREEDY.items() if name in chosen]
        raise UsageError(
            "no sources",
            expected="adapter folders, folders of them, globs, manifests or Hub ids",
            remedy=f"Write them first: {listed(greedy)} takes all words that follow." if greedy else None,
        )
    if not isinstance(sources, list | dict) or not all(isinstance(s, str) for s in _paths(sources)):
        raise UsageError("sources must be a list of paths, or a mapping of names to paths", found=printable(sources))
    if "names" in chosen:
        names = chosen["names"]
        if isinstance(sources, dict) or len(names) != len(sources):
            raise UsageError("--names needs one name per source", found=len(names), expected=len(sources))
        if len(set(names)) != len(names):
            raise UsageError("--names has a name twice", found=listed(names))
        sources = dict(zip(names, sources, strict=True))
    return resolve(sources, missing_ok=skipping)


def _paths(sources: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(sources.values()) if isinstance(sources, dict) else sources


def make_plan(chosen: Args, workspace: Path | None = None, *, runs: bool = True, progress: Progress = silent) -> Plan:
    """The plan for what was chosen."""
    settings = _settings(chosen)
    if "variance_threshold" in chosen and (settings.num_components != "auto" or settings.limit):
        log.info("without -k auto, variance only decides whether adapters that are added need new bases")
    sources = named_sources(chosen, settings.on_error == "skip")
    return plan_for(sources, settings, workspace, runs=runs, progress=progress)


def planned(chosen: Args, workspace: Path, progress: Progress = silent) -> Plan:
    """The plan of a file, made again from the sources that it names, and equal to it."""
    if "sources" in chosen:
        raise UsageError("both sources and --plan", remedy="The plan names its sources.")
    try:
        saved = read_json(Path(chosen["plan"]))
        if saved.get("format", FORMAT) > FORMAT:
            raise ValueError(f"format {saved['format']}, of a newer version of lorashare-stream")
        sources = [_saved_source(a) for a in saved["adapters"]]
        settings, fingerprint, presumed = dict(saved["settings"]), saved["fingerprint"], bool(saved.get("presumed"))
        refused = [r.error() for r in SkippedFile.model_validate(saved["refused"]).root]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{printable(chosen['plan'])} is not a plan", found=f"{type(e).__name__}: {e}") from e
    settings = overridden(settings, {k: v for k, v in chosen.items() if k in TYPES})
    made = plan_for(sources, Settings.from_mapping(settings), workspace, progress=progress)
    if made.fingerprint_as(presumed=presumed) != fingerprint and not made.refused:
        raise UsageError(
            "the plan no longer holds: adapters or settings have changed since it was made",
            found=made.fingerprint_as(presumed=presumed),
            expected=fingerprint,
            remedy="Make it again by lorashare-stream plan.",
        )
    return replace(made, refused=(*refused, *made.refused))


def names_meant(given: Sequence[str], known: Collection[str]) -> list[str]:
    """Names of adapters, each once; an id of the Hub means the adapter that is named after it."""
    ids = {name: parse_hub_id(name) for name in given if name not in known}
    return list(dict.fromkeys(hub.name if (hub := ids.get(n)) is not None and hub.name in known else n for n in given))


def _saved_source(adapter: Mapping[str, Any]) -> Source:
    name, path, source_id = adapter["name"], adapter.get("path", adapter.get("asked")), adapter["source_id"]
    if not all(isinstance(text, str) for text in (name, path, source_id)) or "\0" in path or name_fault(name):
        raise ValueError(f"an adapter is not described as a plan does: {printable(adapter)}")
    hub = None if "path" in adapter else parse_hub_id(source_id)
    if "asked" in adapter and (hub is None or not hub.pinned):
        raise ValueError(f"an adapter of the Hub is not pinned: {printable(adapter)}")
    return Source(source_id, Path(path), name, hub=hub, asked=path if hub is not None else "")
