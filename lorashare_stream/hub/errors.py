"""Errors of the Hub's client: what may pass, and what each of the others means for an adapter."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from typing import Any

from ..errors import AdapterError, MissingFileError, StreamError

CUT_SHORT = "a transfer was cut short"
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
    for seen in chain_of(error):
        response = getattr(seen, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            waits = status in _TRANSIENT or status >= 500
            return (f"it answers {status}", _asked_to_wait(response)) if waits else (None, None)
        if type(seen).__name__ in _NEVER:
            return None, None
        modules = {c.__module__.split(".")[0] for c in type(seen).__mro__}
        if modules & _TRANSPORT or isinstance(seen, ConnectionError | TimeoutError):
            return f"the connection failed ({type(seen).__name__})", None
        if "Consistency check failed" in str(seen):
            return CUT_SHORT, None
        if isinstance(seen, json.JSONDecodeError):
            return "it answers with what is no JSON", None
        if _is_of_xet(seen):
            status = _status_in(str(seen))
            waits = _errno_in(str(seen)) is None and (status is None or status in _TRANSIENT or status >= 500)
            return ("its storage (Xet) fails", None) if waits else (None, None)
    return None, None


def chain_of(error: BaseException) -> list[BaseException]:
    """An error, and what it was raised from."""
    chain = [error]
    while (under := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(under)
    return chain


def _is_of_xet(error: BaseException) -> bool:
    """Whether an error comes of the storage client, which is in Rust and gives text only."""
    text = str(error)
    return type(error) is RuntimeError and bool(re.search(r"CAS|Task error|reconstruction|\bxet", text, re.IGNORECASE))


def _status_in(text: str) -> int | None:
    found = re.search(r"\b([45]\d\d)\b", text)
    return int(found.group(1)) if found else None


def _errno_in(text: str) -> int | None:
    """Of this machine: a full disk, a folder that may not be written."""
    found = re.search(r"os error (\d{1,3})\b", text)
    local = int(found.group(1)) if found else errno.ENOSPC if "No space left" in text else None
    local = errno.EACCES if local is None and "Permission denied" in text else local
    return local if local in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM) else None


def _asked_to_wait(response: Any) -> float | None:
    """Seconds, of `RateLimit: "api";r=0;t=55` or `Retry-After`, in numbers or as a date."""
    headers = response.headers
    limit = re.search(r"(?:^|;)\s*r=0\b.*?;\s*t=(\d{1,6})", headers.get("RateLimit", ""))
    if response.status_code == 429 and limit:
        return float(limit.group(1)) + 1
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", after):
        return float(after) + 1
    from email.utils import parsedate_to_datetime  # late: it imports a dozen modules

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
    chain = chain_of(error)
    names = [c.__name__ for e in chain for c in type(e).__mro__]
    for name, (problem, remedy) in _PERMANENT.items():
        if name in names:
            return AdapterError(problem + _without_token(), found=what, remedy=remedy)
    if "RemoteEntryNotFoundError" in names:
        return MissingFileError("no such file on the Hub", found=what, remedy="Mend the name, or leave it out.")
    if "OfflineModeIsEnabled" in names or (offline and "LocalEntryNotFoundError" in names):
        return not_cached(what)
    xet = next((str(e) for e in chain if _is_of_xet(e)), None)
    if xet is not None and (number := _errno_in(xet)) is not None:
        return OSError(number, os.strerror(number))
    answer = next((r for e in chain if (r := getattr(e, "response", None)) is not None), None)
    status = _status_in(xet) if xet is not None else getattr(answer, "status_code", None)
    if isinstance(status, int):
        return _refused(status, answer, what)
    # The text of the client is not told: it has addresses, which may have passwords and signatures.
    if "LocalEntryNotFoundError" in names:
        return AdapterError(
            "what answers is not the Hub, or does not say what its client needs", found=what,
            remedy="Look after HF_ENDPOINT and what is between; or leave it out.",
        )  # fmt: skip
    if isinstance(error, StreamError | MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    return StreamError(
        "the client of the Hub failed", found=f"{what}: {type(error).__name__}",
        remedy="Look after HF_ENDPOINT, HF_TOKEN and the proxy settings.",
    )  # fmt: skip


def _without_token() -> str:
    from huggingface_hub import get_token

    return "" if get_token() else " (no token is set)"


def _refused(status: int, answer: Any, what: str) -> StreamError:
    said = answer.headers.get("X-Error-Message", "") if answer is not None else ""
    if status == 401 and "credentials" in said.lower():
        return StreamError(
            "the Hub does not accept the token", found=what, remedy="Mend HF_TOKEN, or the stored one by hf auth login."
        )
    if status == 416:
        return AdapterError("an empty file", found=what, remedy="Leave it out.")
    return AdapterError(
        f"the Hub refuses it, by status {status}", found=what, remedy="Look at its page; or leave it out."
    )


class NoSecrets(logging.Filter):
    """Takes passwords and signatures out of the addresses in a log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, without them."""
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


def without_secrets(text: str) -> str:
    """A text whose addresses have neither user information nor query.

    >>> without_secrets("GET http://user:pw@host/a?X-Amz-Signature=1 failed")
    'GET http://host/a failed'
    """
    return re.sub(r"(\w+://)(?:[^\s/@]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
