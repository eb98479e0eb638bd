"""Whatever happens to the terminal, a write does not raise; that a line was lost is told once."""

from __future__ import annotations

import errno
import io
import subprocess
import sys

import pytest

from qloralab.terminal import Lasting, lasting_output


class Failing(io.StringIO):
    """A stream whose writes fail, as long as they do."""

    name = "<stdout>"

    def __init__(self, error: Exception):
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (BlockingIOError(errno.EAGAIN, "try again"), "try again"),
        (ValueError("I/O operation on closed file."), "I/O operation on closed file."),
    ],
    ids=["full", "dead", "busy", "closed"],
)
def test_a_failure_is_told_once_and_may_pass(error, why, capsys):
    failing = Failing(error)
    lasting = Lasting(failing)
    assert lasting.failure is None
    print("lost", "lost", file=lasting, flush=True)  # type: ignore[arg-type]
    assert lasting.failure == why
    assert capsys.readouterr() == ("", f"qloralab: stdout cannot be written: {why}; going on without it\n")
    failing.error = None
    print("there", file=lasting)  # type: ignore[arg-type]
    assert failing.getvalue() == "there\n"
    assert not lasting.isatty()


def test_a_handler_may_write_in_the_middle_of_a_line(capsys):
    lasting = Lasting(Failing(RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")))
    assert lasting.write("stopping") == 8
    assert (lasting.failure, capsys.readouterr()) == (None, ("", ""))


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", rb"\xe9 \u6a21 \udcff"), ("utf-8", b"\xc3\xa9 \xe6\xa8\xa1 \\udcff")]
)
def test_what_an_encoding_lacks_is_written_with_backslashes(encoding, written):
    raw = io.BytesIO()
    lasting = Lasting(io.TextIOWrapper(raw, encoding))
    lasting.write("é 模 \udcff")
    lasting.flush()
    assert (raw.getvalue(), lasting.failure) == (written, None)


def test_the_streams_come_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(AttributeError, match="failing"), lasting_output():
        sys.stdout.failing  # type: ignore[attr-defined]  # noqa: B018  # of what a Lasting has not, the stream is asked
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("close", ["", "1", "2", "12"])
@pytest.mark.parametrize("full", ["", "1", "2", "12"])
def test_a_process_ends_well_whatever_its_streams_are(close, full):
    """The end of a Python process flushes its streams, and its status is 120 where that fails."""
    code = (
        "import sys\nfrom qloralab.terminal import lasting_output\n"
        "with lasting_output(): print(1); print(2, file=sys.stderr)"
    )
    with open("/dev/full", "w") as device:
        out, err = (device if number in full else subprocess.PIPE for number in "12")
        closing = " ".join(f"{number}>&-" for number in close)
        words = ["sh", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, code]
        done = subprocess.run(words, stdout=out, stderr=err, text=True)
    assert done.returncode == 0
    assert (done.stdout or "") == ("1\n" if "1" not in full + close else "")
    lost = ["qloralab: stdout cannot be written: No space left on device; going on without it"]
    told = ["2", *(lost if "1" in full and "1" not in close else [])]
    assert sorted((done.stderr or "").splitlines()) == (told if "2" not in full + close else [])
