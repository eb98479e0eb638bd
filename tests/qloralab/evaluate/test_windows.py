"""Windows: every token is predicted once, from enough context; what would leave tokens out is refused."""

from __future__ import annotations

import pytest

from qloralab.data.encoding import NO_LABEL, Encoded, fingerprint
from qloralab.evaluate.windows import check_window, counted, windows


def document(length: int, first_label: int = 0) -> Encoded:
    """Tokens 0, 1, 2, ... of which those before first_label do not count."""
    ids = list(range(length))
    return Encoded(ids, [NO_LABEL] * first_label + ids[first_label:], "made up")


@pytest.mark.parametrize("length", [2, 3, 6, 7, 8, 9, 10, 25])
@pytest.mark.parametrize(("window", "stride"), [(6, 3), (6, 1), (6, 5), (2, 1), (7, 4), (100, 50)])
def test_each_token_is_predicted_once_with_the_context_that_the_stride_leaves(length, window, stride):
    seen = []
    for one in windows(document(length), window, stride):
        assert len(one.input_ids) == len(one.labels) <= window
        assert one.input_ids == list(range(one.input_ids[0], one.input_ids[-1] + 1))
        for position, label in enumerate(one.labels):
            if position and label != NO_LABEL:
                assert label == one.input_ids[position]
                assert position >= min(window - stride, label)
                seen.append(label)
    assert seen == list(range(1, length))


def test_windows_are_those_of_transformers():
    """The loop of its page on perplexity, over 25 tokens."""
    length, window, stride, previous, theirs = 25, 8, 4, 0, []
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        ids = list(range(begin, end))
        theirs.append((ids, [NO_LABEL] * (len(ids) - (end - previous)) + ids[len(ids) - (end - previous) :]))
        previous = end
        if end == length:
            break
    assert [(one.input_ids, one.labels) for one in windows(document(length), window, stride)] == theirs


def test_a_window_without_a_token_that_counts_is_left_out():
    found = windows(document(25, first_label=14), 8, 4)
    assert [one.input_ids[0] for one in found] == [8, 12, 16, 20][: len(found)]
    assert sum(map(counted, found)) == 11
    assert windows(document(1), 8, 4) == []


@pytest.mark.parametrize(
    ("window", "stride", "positions", "message"),
    [
        (1, 1, None, "--window is 1; it must be at least 2"),
        (8, 0, None, "--stride is 0; it must be from 1 to 7 (window - 1)"),
        (8, 8, None, "--stride is 8; it must be from 1 to 7 (window - 1)"),
        (64, 8, 63, "--window is 64, and the model has 63 positions"),
    ],
)
def test_refused(refusal, window, stride, positions, message):
    assert message in refusal(check_window, window, stride, positions)
    check_window(64, 63, 64)


def test_the_fingerprint_is_of_tokens_counts_and_where_documents_end():
    base = [document(5), document(4)]
    others = [
        [document(4), document(5)],
        [document(5, 2), document(4)],
        [document(5)],
        [document(5), document(4), document(1)],
    ]
    assert fingerprint(base) == fingerprint([document(5), document(4)])
    assert len({fingerprint(one) for one in [base, *others]}) == 5
