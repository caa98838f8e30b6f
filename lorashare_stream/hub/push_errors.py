"""Errors of the Hub's client, said of a push."""

from __future__ import annotations

from ..errors import StreamError, UsageError
from .errors import chain_of


def changed_meanwhile(repo: str) -> StreamError:
    """The error for a head that is not what it was."""
    return StreamError(
        "somebody else has pushed to the repository at the same time", found=repo, remedy="Run the same command again."
    )


def hidden(repo: str) -> StreamError:
    """The error for a repository that cannot be seen."""
    return StreamError("no such repository on the Hub, or this token cannot see it", found=repo)


def refused(error: BaseException, repo: str) -> StreamError:
    """The error for what the Hub refuses, of an error of its client."""
    chain = chain_of(error)
    names = {c.__name__ for e in chain for c in type(e).__mro__}
    answer = next((e for e in chain if getattr(e, "response", None) is not None), None)
    status = getattr(getattr(answer, "response", None), "status_code", None)
    said = getattr(answer, "server_message", None)
    if "RevisionNotFoundError" in names:
        return UsageError("no such revision on the Hub", found=repo, remedy="Mend the revision.")
    if status in (409, 412) or "RemoteEntryNotFoundError" in names:
        return changed_meanwhile(repo)
    if status == 401:
        return StreamError(
            "the Hub wants a token that may write, and does not accept this one, or has none", found=repo,
            remedy="Set HF_TOKEN to one with write access, or store it by hf auth login.",
        )  # fmt: skip
    if status == 403:
        return StreamError(
            "this token may not write to the repository", found=repo,
            remedy="Use one that may, push to a repository of your own, or propose a pull request (--create-pr).",
        )  # fmt: skip
    if "RepositoryNotFoundError" in names:
        return hidden(repo)
    details = str(error) if type(error) is ValueError else said  # of a card: the client says what is wrong in it
    return StreamError(f"the Hub refuses the push{f', by status {status}' if status else ''}", found=details or repo)
