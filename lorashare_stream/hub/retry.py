"""Retry of requests to the Hub: transient failures are waited out, with a cap; of others it is said what they mean.

Transient are rate limits, errors of the server, and connections that fail. The rest is of one adapter (missing, gated,
private, refused): an `AdapterError`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import AdapterError, MissingFileError, StreamError, UnreachableError
from ..text import printable

T = TypeVar("T")
Meaning = Callable[[Exception, str], Exception]  # an error of the client, and what was asked for -> what it means
PATIENCE = 15 * 60.0  # seconds of waiting for one answer, outages of some minutes included
ANSWER = 120.0  # seconds of a request that failed which count as waiting: one that took longer had an answer
LONGEST = 330.0  # seconds waited at once: the Hub counts requests in windows of 5 minutes
UNHEARD = 60.0  # of the first answer to what may be a mistyped path
FIRST_PAUSE = 1.0  # seconds; doubled each time, up to a minute
MOST_CUTS = 4  # of a transfer that ends too early, by what was announced
SAY_EVERY = 60.0  # seconds
_CUT_SHORT = "a transfer was cut short"
_TRANSIENT = {408, 425, 429}
_NEVER = {"LocalProtocolError", "UnsupportedProtocol"}  # of the client's HTTPErrors, by name: the library differs
_XET = {"XetAuthenticationError": 403, "XetObjectNotFoundError": 404}  # by name: it need not be installed
_OF_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_SAID = {"No space left": errno.ENOSPC, "Permission denied": errno.EACCES}
log = logging.getLogger(__name__)

_heard = [0.0]  # when the Hub has last answered
_said: list[float] = []  # when it was last said that requests wait, unless that is over
_SAY = threading.Lock()


def retry(call: Callable[[], T], what: str, stopped: threading.Event, meaning: Meaning, most: float | None = None) -> T:
    """The result of a request; transient failures are waited out.

    Args:
        call: makes the request.
        what: it is for, in messages.
        stopped: set when a run ends: waiting ends too.
        meaning: of a permanent error of the client, which is raised.
        most: seconds of waiting, requests that fail included; None is `PATIENCE`.

    Raises:
        AdapterError: if it fails again and again while others are answered.
        UnreachableError: if the Hub did not answer for so long.
    """
    most = PATIENCE if most is None else most
    pause, waited, begun, cuts = FIRST_PAUSE, 0.0, time.monotonic(), 0
    while True:
        asked = time.monotonic()
        try:
            result = call()
        except StreamError:  # what it means was said, and what was waited for in it is not waited for again
            raise
        except Exception as e:
            took = min(ANSWER, time.monotonic() - asked)
            why, told = transience(e)
            if why is None:
                error = meaning(e, what)
                if error is e:
                    raise
                raise error from e
            cuts += why == _CUT_SHORT
            waited += took
            left = most - waited - took  # another request takes as long
            seconds = min(pause, left) if told is None else min(LONGEST, told)
            if cuts >= MOST_CUTS or not FIRST_PAUSE <= seconds <= left:
                others = cuts >= MOST_CUTS or _heard[0] > begun + waited / 2
                error = _given_up(why, what, waited, others=others)
                raise (meaning(error, what) if isinstance(error, AdapterError) else error) from e
        else:
            _heard[0] = time.monotonic()
            if waited:
                _say_once(f"the Hub answers again ({what})", over=True)
            return result
        _say_once(f"the Hub: {why}; waiting, {most / 60:.0f} min at most; what is done is kept ({what})")
        if stopped.wait(seconds):
            raise UnreachableError("stopped while waiting for the Hub", found=why)
        waited, pause = waited + seconds, min(2 * pause, 60.0)


def unheard() -> float | None:
    """Seconds of waiting for the Hub's first answer; None once there was one."""
    return None if _heard[0] else UNHEARD


def _given_up(why: str, what: str, waited: float, *, others: bool) -> StreamError:
    """The error for what was waited for in vain; `others` if the Hub has answered other requests meanwhile."""
    if others and "429" not in why:
        return AdapterError(
            f"the Hub fails for it, and not for others: {why}", found=f"{what}, for {waited:.0f} s",
            remedy="Run the same command again another day, or leave it out.",
        )  # fmt: skip
    return UnreachableError(
        "the Hub cannot be reached", found=f"{why}, for {waited:.0f} s",
        remedy="What is done is kept: run the same command again when it can be.",
    )  # fmt: skip


def _say_once(text: str, *, over: bool = False) -> None:
    """Of the many requests that wait for the same, one says so, once a minute; and one that it is over."""
    now = time.monotonic()
    with _SAY:
        if not _said if over else _said and now - _said[0] < SAY_EVERY:
            return
        _said[:] = [] if over else [now]
        log.warning("%s", printable(text))


# -- errors of the client -------------------------------------------------------------------------------


def transience(error: Exception) -> tuple[str | None, float | None]:
    """The reason of a transient failure, and the seconds that the server asks to wait; None where there is none."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    for seen in _chain(error):
        response = getattr(seen, "response", None)
        if (status := _status(seen)) is not None:
            asked = None if response is None else _asked_to_wait(response)
            return (f"it answers {status}", asked) if status in _TRANSIENT or status >= 500 else (None, None)
        if isinstance(seen, OfflineModeIsEnabled) or type(seen).__name__ in _NEVER:
            return None, None
        if isinstance(seen, HTTPError | ConnectionError | TimeoutError):
            return f"the connection failed ({type(seen).__name__})", None
        if "client has been closed" in str(seen):  # a RuntimeError: it closes for all threads where one cannot connect
            return "another request has closed the connection", None
        if "Consistency check failed" in str(seen):  # an OSError of the client, which has no class of its own
            return _CUT_SHORT, None
        if isinstance(seen, json.JSONDecodeError):
            return "it answers with what is no JSON", None
        if _is_of_xet(seen):
            return (None, None) if _errno_in(str(seen)) else ("its storage (Xet) fails", None)
    return None, None


def _asked_to_wait(response: Any) -> float | None:
    """Seconds, of `RateLimit: "api";r=0;t=55` or `Retry-After`, in numbers or as a date."""
    from email.utils import parsedate_to_datetime  # late: it imports a dozen modules

    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(min(limit.reset_in_seconds, 86400) + 1)
    after = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", after):
        return float(after) + 1
    try:
        return max(1.0, parsedate_to_datetime(after).timestamp() - time.time() + 1)
    except (TypeError, ValueError, OverflowError):
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def first_of(error: Exception, *kinds: type[BaseException]) -> BaseException | None:
    """The error, or the first that it was raised from, of one of these kinds."""
    return next((seen for seen in _chain(error) if isinstance(seen, kinds)), None)


def status_of(error: Exception) -> int | None:
    """The status of the answer that an error of the client comes of; None if there was none."""
    return next(filter(None, map(_status, _chain(error))), None)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", _XET.get(type(error).__name__))
    if status is None and _is_of_xet(error) and not _errno_in(str(error)):
        found = re.search(r"\b([45]\d\d)\b", str(error))
        status = int(found[1]) if found else None
    return status if isinstance(status, int) else None


def _is_of_xet(error: BaseException) -> bool:
    """Whether an error comes of the storage client (Xet), which is in Rust and gives text only."""
    text = str(error)
    return type(error) is RuntimeError and bool(re.search(r"CAS|Task error|reconstruction|\bxet", text, re.IGNORECASE))


def _errno_in(text: str) -> int | None:
    """Of this machine: a full disk, a folder that may not be written."""
    found = re.search(r"os error (\d{1,3})\b", text)
    if found:
        return int(found[1]) if int(found[1]) in _OF_MACHINE else None
    return next((number for words, number in _SAID.items() if words in text), None)


def of_machine(error: Exception) -> Exception | None:
    """The error of this machine, or of this package, that an error is; None if it is one of the Hub."""
    for seen in _chain(error):
        if _is_of_xet(seen) and (number := _errno_in(str(seen))) is not None:
            return OSError(number, os.strerror(number))
    ours = isinstance(error, StreamError | MemoryError) or (isinstance(error, OSError) and error.errno is not None)
    return error if ours else None


# -- their meaning for an adapter -----------------------------------------------------------------------


def not_cached(what: str) -> MissingFileError:
    """The error for what is asked for offline, and is not in the cache."""
    return MissingFileError(
        "not in the cache of the Hub's files, and this is offline",
        found=what,
        remedy="Run once without --offline and HF_HUB_OFFLINE, or name a folder.",
    )


def of_adapter(error: Exception, what: str, *, offline: bool = False) -> Exception:
    """What a permanent error of the client means for an adapter; one of this machine stays what it is.

    Nothing of the client's text is told: it has addresses, which may have passwords and signatures.
    """
    from huggingface_hub import errors, get_token

    for kind, (problem, remedy) in _PERMANENT.items():
        if first_of(error, getattr(errors, kind)):
            return AdapterError(problem + ("" if get_token() else " (no token is set)"), found=what, remedy=remedy)
    if first_of(error, errors.RemoteEntryNotFoundError):
        return MissingFileError("no such file on the Hub", found=what, remedy="Mend the name, or leave it out.")
    if first_of(error, errors.OfflineModeIsEnabled) or (offline and first_of(error, errors.LocalEntryNotFoundError)):
        return not_cached(what)
    if (local := of_machine(error)) is not None:
        return local
    if (status := status_of(error)) is not None:
        return _refused(status, first_of(error, errors.HfHubHTTPError), what)
    if first_of(error, errors.LocalEntryNotFoundError):
        return AdapterError(
            "what answers is not the Hub, or does not say what its client needs", found=what,
            remedy="Look after HF_ENDPOINT and what is between; or leave it out.",
        )  # fmt: skip
    return StreamError(
        "the client of the Hub failed", found=f"{what}: {type(error).__name__}",
        remedy="Look after HF_ENDPOINT, HF_TOKEN and the proxy settings.",
    )  # fmt: skip


_PERMANENT = {  # class of the client's error, the special before the general -> problem and remedy
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


def _refused(status: int, error: BaseException | None, what: str) -> StreamError:
    response = getattr(error, "response", None)
    said = "" if response is None else response.headers.get("X-Error-Message", "")
    if status == 401 and "credentials" in said.lower():
        return StreamError(
            "the Hub does not accept the token", found=what, remedy="Mend HF_TOKEN, or the stored one by hf auth login."
        )
    if status == 416:
        return AdapterError("an empty file", found=what, remedy="Leave it out.")
    return AdapterError(
        f"the Hub refuses it, by status {status}", found=what, remedy="Look at its page; or leave it out."
    )


# -- logs -----------------------------------------------------------------------------------------------


def no_secrets(record: logging.LogRecord) -> bool:
    """Filter of logs that takes passwords and signatures out of addresses."""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def without_secrets(text: str) -> str:
    """A text whose addresses have neither user information nor query.

    >>> without_secrets("GET http://user:pw@host/a?X-Amz-Signature=1 failed")
    'GET http://host/a failed'
    """
    return re.sub(r"(\w+://)(?:[^\s/@]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
