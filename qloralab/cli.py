"""The process of the ``qloralab`` command: from the first import to the exit status.

Ctrl-C ends it with status 130 and one line at any moment, also in the seconds in which torch is imported. So this
module imports nothing but what makes that true, and everything else is imported below ``main``.
"""

from __future__ import annotations

import sys

from .interrupt import LINE, STATUS, no_lost_interrupt, stopping_at_once


def main() -> None:
    """The ``qloralab`` command."""
    with stopping_at_once():
        from .commands import run
    try:
        with no_lost_interrupt():
            status = run()
    except KeyboardInterrupt:
        status = STATUS
    if status == STATUS:
        print(LINE, file=sys.stderr)
    sys.exit(status)
