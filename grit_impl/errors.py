"""The one exception that users see: one line that names the thing and the remedy."""

from __future__ import annotations


class GRITError(ValueError):
    """Bad input or an impossible request.

    The message is one clear line. The command line and the pytest plugin print it without a traceback and exit
    with status 2; a library caller catches it like any `ValueError`.
    """


class RunFailed(GRITError):
    """Training began and could not go on: a finding about the run, where a plain `GRITError` is about its input."""
