"""The process of the ``qloralab`` command: from the first import to the exit status.

==============================  ======  ==============================================================================
what happens                    status  what stderr is told
==============================  ======  ==============================================================================
what was asked for              0       nothing; 1 where the answer of ``parity`` or ``sass`` is no
a mistake that a user can mend  2       one line
Ctrl-C                          130     one line
anything else                   1       one line that begins with "unexpected", and names a file with the traceback
==============================  ======  ==============================================================================

Ctrl-C does so at any moment, also in the seconds in which torch is imported. So this module imports nothing but what
makes that true, and everything else is imported below ``main``.
"""

from __future__ import annotations

import sys
import tempfile
import traceback

from qloralab.nf4.files.errors import FormatError

from . import __version__
from .errors import UserError
from .interrupt import LINE, STATUS, no_lost_interrupt, stopping_at_once
from .one_voice import speaks
from .terminal import lasting_output


def main() -> None:
    """The ``qloralab`` command."""
    with lasting_output():
        status, line = _run()
        if line and speaks():
            print(line, file=sys.stderr)
    sys.exit(status)


def _run() -> tuple[int, str | None]:
    """Do what the command line says. Returns the exit status and the line about it."""
    try:
        with stopping_at_once():
            from .commands import run
        with no_lost_interrupt():
            status = run()
    except KeyboardInterrupt:
        status = STATUS
    except (UserError, FormatError) as error:
        return 2, f"qloralab: error: {error}"
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a path that no other check has met
            return 2, f"qloralab: error: {error.filename}: {error.strerror}"
        return 1, f"qloralab: unexpected {_kept(error)}"
    return status, LINE if status == STATUS else None


def _kept(error: Exception) -> str:
    """What an error is, and where its traceback is kept; where none can be kept, all of it."""
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="qloralab-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"qloralab {__version__}: {sys.argv[1:]}\n\n{text}")
    except OSError:
        return f"{what}\n{text}"
    return f"{what}; {file.name} has the traceback"
