"""Settings, sources and plans of a command, from flags, configuration files and saved plans."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.hubid import parse_hub_id
from ..adapters.source import Source
from ..errors import UsageError
from ..pipeline import plan_for
from ..plan.file import AGAIN, read_plan
from ..plan.plan import Plan
from ..plan.sources import read_yaml, resolve
from ..runtime.dask import connected, started, workers_of
from ..runtime.progress import Progress, silent
from ..settings import SIZES, TYPES, Settings, overridden
from ..text import listed, printable

Args = Mapping[str, Any]  # what was given, by the names of `options`
log = logging.getLogger(__name__)
_PLACES: dict[str, type] = {"output": str, "workspace": str, "overwrite": bool, "sources": object}
_GREEDY = {"names": "--names", "base_aliases": "--base-alias"}


def with_config(args: Args) -> dict[str, Any]:
    """Arguments over what `--config` sets; paths in it are as on the command line."""
    if "config" not in args:
        return dict(args)
    path = Path(args["config"])
    if not path.is_file():
        raise UsageError("no such configuration file", found=path)
    values = read_yaml(path) or {}
    allowed = TYPES.keys() | _PLACES.keys()
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UsageError("the configuration is not a mapping of settings", found=printable(values))
    unknown = sorted(values.keys() - allowed)
    if unknown:
        raise UsageError(
            f"unknown setting in {printable(path)}", found=listed(unknown), expected=listed(sorted(allowed), 20)
        )
    for name, kind in _PLACES.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{name} in {printable(path)} cannot be meant", found=values[name], expected=kind.__name__)
    several = [name for name in SIZES if values.get(name) is not None]
    if len(several) > 1:
        raise UsageError(
            f"{printable(path)} says twice how large it may be", found=listed(several), expected="one of them"
        )
    return overridden(values, args)


def cluster_of(args: Args) -> AbstractContextManager[Any]:
    """A client of the cluster that is asked for, until the end of the block; None if none is.

    Raises:
        UnreachableClusterError: if it does not answer, or has no workers.
    """
    if "dask_scheduler" in args:
        return connected(args["dask_scheduler"])
    return started(args["dask_local"]) if "dask_local" in args else nullcontext()


def with_workers(chosen: Args, cluster: Any) -> dict[str, Any]:
    """Arguments, with as many tasks at a time in a process as the cluster's have threads, if nothing is said of it."""
    return {**({} if "plan" in chosen else workers_of(cluster)), **chosen}  # a saved plan says something of it


def named_sources(chosen: Args, skipping: bool) -> list[Source]:
    """The adapters that sources and `--names` mean; if skipping, also what is not there, for the catalog to refuse."""
    sources = chosen.get("sources")
    if not sources:
        greedy = [flag for name, flag in _GREEDY.items() if name in chosen]
        raise UsageError(
            "no sources",
            expected="adapter folders, folders of them, globs, manifests or Hub ids",
            remedy=f"Write them first: {listed(greedy)} takes all words that follow." if greedy else None,
        )
    paths = list(sources.values()) if isinstance(sources, dict) else sources
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UsageError("sources must be a list of paths, or a mapping of names to paths", found=printable(sources))
    if "names" in chosen:
        names = chosen["names"]
        if isinstance(sources, dict) or len(names) != len(sources):
            raise UsageError("--names needs one name per source", found=len(names), expected=len(sources))
        if len(set(names)) != len(names):
            raise UsageError("--names has a name twice", found=listed(names))
        sources = dict(zip(names, sources, strict=True))
    return resolve(sources, missing_ok=skipping)


def make_plan(chosen: Args, workspace: Path | None = None, *, runs: bool = True, progress: Progress = silent) -> Plan:
    """The plan for what was chosen."""
    settings = Settings.from_mapping(_settings_in(chosen))
    if "variance_threshold" in chosen and (settings.num_components != "auto" or settings.limit):
        log.info("without -k auto, variance only decides whether adapters that are added need new bases")
    sources = named_sources(chosen, settings.on_error == "skip")
    return plan_for(sources, settings, workspace, runs=runs, progress=progress)


def _settings_in(chosen: Args) -> dict[str, Any]:
    return {k: v for k, v in chosen.items() if k in TYPES}


def planned(chosen: Args, workspace: Path, progress: Progress = silent) -> Plan:
    """The plan of a file, made again from the sources that it names, and equal to it."""
    if "sources" in chosen:
        raise UsageError("both sources and --plan", remedy="The plan names its sources.")
    saved = read_plan(Path(chosen["plan"]))
    sources = [adapter.source() for adapter in saved.adapters]
    settings = overridden(saved.settings, _settings_in(chosen))
    made = plan_for(sources, Settings.from_mapping(settings), workspace, progress=progress)
    fingerprint = made.fingerprint_as(presumed=saved.presumed)
    if fingerprint != saved.fingerprint and not made.refused:
        raise UsageError(
            "the plan no longer holds: adapters or settings have changed since it was made",
            found=fingerprint,
            expected=saved.fingerprint,
            remedy=AGAIN,
        )
    return replace(made, refused=(*(item.error() for item in saved.refused), *made.refused))


def names_meant(given: Sequence[str], known: Collection[str]) -> list[str]:
    """Names of adapters, each once; an id of the Hub means the adapter that is named after it."""
    ids = {name: parse_hub_id(name) for name in given if name not in known}
    return list(dict.fromkeys(hub.name if (hub := ids.get(n)) is not None and hub.name in known else n for n in given))
