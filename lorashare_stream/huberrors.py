"""Errors of the Hub's client: what may pass, and what each of the others means for an adapter."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

from .errors import AdapterError, MissingFileError, StreamError

_TRANSIENT = {408, 425, 429}
_NEVER = {"OfflineModeIsEnabled", "HFValidationError", "LocalProtocolError", "InvalidURL", "UnsupportedProtocol"}
_TRANSPORT = {"httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "requests"}


def not_cached(what: str) -> MissingFileError:
    """The error for what is asked for offline, and is not in the cache."""
    return MissingFileError(
        "not in the cache of the Hub's files, and this is offline",
        found=what,
        remedy="Run once without --offline and HF_HUB_OFFLINE, or name a folder.",
    )


def passing(error: BaseException) -> tuple[str | None, float | None]:
    """Why a request failed if that may pass, and how long to wait if the server says so; else None."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            passing = status in _TRANSIENT or status >= 500
            return (f"it answers {status}", _asked_to_wait(response)) if passing else (None, None)
        if type(seen).__name__ in _NEVER:
            return None, None
        modules = {c.__module__.split(".")[0] for c in type(seen).__mro__}
        if modules & _TRANSPORT or isinstance(seen, ConnectionError | TimeoutError):
            return f"the connection failed ({type(seen).__name__})", None
        if "Consistency check failed" in str(seen) or (isinstance(seen, RuntimeError) and "xet" in str(seen).lower()):
            return "a transfer was cut short", None
        seen = seen.__cause__ or seen.__context__
    return None, None


def _asked_to_wait(response: Any) -> float | None:
    """Seconds, of `RateLimit: "api";r=0;t=55` or `Retry-After`, in numbers or as a date."""
    headers = response.headers
    limit = re.search(r"(?:^|;)\s*r=0\b.*?;\s*t=(\d{1,6})", headers.get("RateLimit", ""))
    if response.status_code == 429 and limit:
        return float(limit.group(1)) + 1
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", after):
        return float(after) + 1
    try:
        return max(1.0, parsedate_to_datetime(after).timestamp() - time.time() + 1)
    except (TypeError, ValueError, OverflowError):
        return None


_PERMANENT = {
    "GatedRepoError": (
        "gated: its owner has not given this account access",
        "Ask for access on its page with the account of HF_TOKEN, then run again; or leave it out.",
    ),
    "DisabledRepoError": ("the Hub has disabled the repository", "Leave it out."),
    "RevisionNotFoundError": ("no such revision on the Hub", "Mend the revision, or leave it out."),
    "RepositoryNotFoundError": (
        "no such folder here, and no such repository on the Hub, or a private one that this token cannot see",
        "Mend the name; set HF_TOKEN for a private one; or leave it out.",
    ),
}


def permanent(error: Exception, what: str, *, offline: bool) -> Exception:
    """The error for one adapter, of an error of the client; what is no matter of the Hub stays what it is."""
    chain: list[BaseException] = [error]
    while (under := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(under)
    names = [c.__name__ for e in chain for c in type(e).__mro__]
    for name, (problem, remedy) in _PERMANENT.items():
        if name in names:
            return AdapterError(problem, found=what, remedy=remedy)
    if "RemoteEntryNotFoundError" in names:
        return MissingFileError("no such file on the Hub", found=what, remedy="Mend the name, or leave it out.")
    if "OfflineModeIsEnabled" in names or (offline and "LocalEntryNotFoundError" in names):
        return not_cached(what)
    if "LocalEntryNotFoundError" in names:
        return AdapterError("the Hub does not say what the client needs", found=f"{what}: {chain[-1]}")
    status = next((r.status_code for e in chain if (r := getattr(e, "response", None)) is not None), None)
    if status == 401:
        return StreamError(
            "the Hub does not accept the token", found=what, remedy="Mend HF_TOKEN, or the stored one by hf auth login."
        )
    if isinstance(status, int):
        return AdapterError(f"the Hub refuses it, by status {status}", found=what, remedy="Leave it out.")
    return error
