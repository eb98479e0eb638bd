"""Long documents, cut into windows that overlap.

A model is given at most a window of tokens at a time, and the windows start a stride apart. Each window predicts only
what the one before has not, so that every token is predicted once, and the rest of the window is context (here a window
of 6 and a stride of 3; ``·`` is context, ``-`` is not in the window):

    token      0 1 2 3 4 5 6 7 8 9
    window 0   · 1 2 3 4 5 - - - -
    window 1   - - - · · · 6 7 8 -
    window 2   - - - - - - · · · 9

So a token is predicted from at least ``window - stride`` tokens, unless it stands nearer to the start of its document;
the first token of a document is predicted from none, and does not count. This is the sliding window of transformers
("Perplexity of fixed-length models"), with one difference: there, windows that do not overlap leave out the first token
of each; here the stride is at most ``window - 1``, which leaves out none.
"""

from __future__ import annotations

from ..data.encoding import NO_LABEL, Encoded
from ..errors import UserError


def check_window(window: int, stride: int, positions: int | None = None) -> None:
    """Refuse windows that leave tokens out.

    Args:
        window, stride: tokens.
        positions: that the model has room for; None: no end.

    Raises:
        UserError: they are out of range.
    """
    if window < 2:
        raise UserError(f"--window is {window}; it must be at least 2: a token, and the one that it predicts")
    if not 1 <= stride < window:
        raise UserError(
            f"--stride is {stride}; it must be from 1 to {window - 1} (window - 1): "
            "the first token of a window has no context"
        )
    if positions is not None and window > positions:
        raise UserError(f"--window is {window}, and the model has {positions} positions")


def windows(document: Encoded, window: int, stride: int) -> list[Encoded]:
    """The windows of a document that predict something.

    Args:
        document: its tokens, and the labels of those that count.
        window: tokens of a window, at most.
        stride: tokens from the start of a window to that of the next; from 1 to window - 1.

    Returns:
        windows whose labels, those at position 0 left out, are those of the document, each once.
    """
    ids, labels, known, found = document.input_ids, document.labels, 0, []
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        context = known - start
        found.append(Encoded(ids[start:end], [NO_LABEL] * context + labels[known:end], document.source))
        if end == len(ids):
            break
        known = end
    return [one for one in found if counted(one)]


def counted(one: Encoded) -> int:
    """How many tokens of a document or a window are predicted and count."""
    return sum(label != NO_LABEL for label in one.labels[1:])
