"""Frames over a stream, and the board that an executor shares with its supervisor."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue.job import ClaimedJob, Progress
from pgqueue.worker.wire import (
    HEADER,
    MAX_FRAME,
    Board,
    Failed,
    Frames,
    Jobs,
    Outbox,
    Ready,
    Skipped,
    Succeeded,
    decode_from_executor,
    decode_jobs,
    frame,
)


def job(number: int, args: str = "[]") -> ClaimedJob:
    of_the_row = ("id", "default", 5, 1, "task", args, "{}", "{}", 1, 0, None, 0, None)
    return ClaimedJob(*of_the_row, expired=False, cancelled=False, worker="worker", number=number)


@given(st.lists(st.text(max_size=50), max_size=8), st.integers(1, 64))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(texts: list[str], size: int) -> None:
    stream = b"".join(bytes(frame(Jobs([job(1, text)]))) for text in texts)
    frames, out = Frames(), []
    for start in range(0, len(stream), size):
        out += [decode_jobs(payload).jobs[0].args for payload in frames.feed(stream[start : start + size])]
    assert out == texts


@pytest.mark.parametrize(
    "message",
    [
        Ready(4711),
        Succeeded(1, 1.5, 2.5, "[1]", None),
        Failed(2, 1.0, 2.0, "E", "m", "t", 3.0, None, ""),
        Skipped(3),
    ],
)
def test_what_an_executor_says_survives_the_wire(message: Ready | Succeeded | Failed | Skipped) -> None:
    assert decode_from_executor(bytes(frame(message)[HEADER:])) == message


def test_a_stream_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_FRAME}"):
        list(Frames().feed(b"GET / HTTP/1.1\r\n"))


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board]]:
    """The executor's and the supervisor's view of one board."""
    descriptor = Board.create()
    (executor,), (supervisor,) = Board.map(descriptor), Board.map(descriptor)
    os.close(descriptor)
    yield executor, supervisor
    executor.close()
    supervisor.close()


def test_the_supervisor_sees_what_the_executor_started(boards: tuple[Board, Board]) -> None:
    executor, supervisor = boards
    assert supervisor.started == 0
    assert executor.start(7)
    assert supervisor.started == 7


def test_recalled_jobs_do_not_start_and_later_ones_do(boards: tuple[Board, Board]) -> None:
    executor, supervisor = boards
    assert executor.start(1)
    assert supervisor.recall(upto=5) == 2
    assert [executor.start(number) for number in (2, 3, 4, 5, 6)] == [False, False, False, True, True]


def test_a_second_recall_covers_the_jobs_sent_since(boards: tuple[Board, Board]) -> None:
    executor, supervisor = boards
    executor.start(1)
    supervisor.recall(upto=3)
    assert executor.start(3)
    assert supervisor.recall(upto=6) == 4
    assert [executor.start(number) for number in (4, 5, 6)] == [False, False, True]


def test_a_job_that_starts_during_the_recall_stays_with_the_executor(boards: tuple[Board, Board]) -> None:
    """Every interleaving of one start with the recall's steps: the job runs, or the supervisor has it, or is
    told.
    """
    executor, supervisor = boards
    executor.start(1)

    class Racing(Board):
        def __init__(self) -> None:
            self.memory = supervisor.memory
            self._cells = Cells(supervisor._cells)  # type: ignore[assignment]

    class Cells:
        """Starts job 2 before the nth access to the shared cells."""

        def __init__(self, cells: memoryview) -> None:
            self.cells = cells

        def _race(self) -> None:
            nonlocal countdown, ran
            countdown -= 1
            if countdown == 0:
                ran = executor.start(2)

        def __getitem__(self, index: int) -> int:
            self._race()
            return int(self.cells[index])

        def __setitem__(self, index: int, value: int) -> None:
            self._race()
            self.cells[index] = value

    outcomes = set()
    for when in range(1, 5):
        countdown, ran = when, False
        supervisor._cells[Board._STARTED] = 1
        supervisor._cells[Board._FROM] = supervisor._cells[Board._UPTO] = 0
        first = Racing().recall(upto=5)
        outcomes.add((ran, first))
        assert first > 2, (
            "job 2 had started before the recall ended: the supervisor must not give it to another"
        )
    assert {ran for ran, _ in outcomes} == {True, False}


class TestOutbox:
    @pytest.fixture
    def outboxes(self) -> Iterator[tuple[Outbox, Outbox]]:
        """The executor's and the supervisor's view of one outbox, behind two boards."""
        descriptor = Board.create(2)
        executor, supervisor = (Outbox(Board.map(descriptor, 2)) for _ in range(2))
        os.close(descriptor)
        yield executor, supervisor
        executor.close()
        supervisor.close()

    def test_what_was_not_sent_is_there_when_the_executor_is_gone(
        self, outboxes: tuple[Outbox, Outbox]
    ) -> None:
        executor, supervisor = outboxes
        assert supervisor.unsent == b""
        assert executor.put(frame(Skipped(1)))
        assert executor.put(frame(Skipped(2)))
        found = [decode_from_executor(payload) for payload in Frames().feed(supervisor.unsent)]
        assert found == [Skipped(1), Skipped(2)]
        executor.clear()
        assert supervisor.unsent == b""

    def test_it_refuses_what_it_has_no_room_for(self, outboxes: tuple[Outbox, Outbox]) -> None:
        executor, supervisor = outboxes
        assert executor.put(bytes(Outbox.ROOM - 1))
        assert not executor.put(b"xx")
        assert executor.put(b"x")
        assert len(supervisor.unsent) == Outbox.ROOM

    def test_what_stays_is_found_at_the_second_look_and_once(self, outboxes: tuple[Outbox, Outbox]) -> None:
        executor, supervisor = outboxes
        executor.put(b"one")
        assert [supervisor.stuck() for _ in range(3)] == [b"", b"one", b""]
        executor.put(b"two")
        assert [supervisor.stuck() for _ in range(3)] == [b"", b"onetwo", b""]
        executor.clear()
        executor.put(b"threes")
        assert [supervisor.stuck() for _ in range(3)] == [b"", b"threes", b""], "as long as what was there"

    def test_what_is_written_over_while_it_is_read_is_left(self, outboxes: tuple[Outbox, Outbox]) -> None:
        executor, supervisor = outboxes
        executor.put(b"one")
        assert supervisor.stuck() == b""

        class Overtaken(Outbox):
            @property
            def unsent(self) -> bytes:
                executor.clear()
                executor.put(b"two")
                return b"owe"

        supervisor.__class__ = Overtaken
        assert supervisor.stuck() == b""
        supervisor.__class__ = Outbox
        assert [supervisor.stuck() for _ in range(2)] == [b"", b"two"]


class TestProgress:
    @pytest.mark.parametrize(
        "progress",
        [Progress(0), Progress(1.5, 3.0), Progress(2**53, None, "x" * 200), Progress(1, 2, "\u00e9\ud55c")],
    )
    def test_what_is_written_is_read(self, progress: Progress) -> None:
        descriptor = Board.create(2)
        (_, executor), (first, second) = Board.map(descriptor, 2), Board.map(descriptor, 2)
        os.close(descriptor)
        assert second.progress is None
        executor.report(7, progress)
        assert second.progress == (7, progress)
        assert first.progress is None
        executor.report(8, Progress(1))
        assert second.progress == (8, Progress(1)), "nothing is left of the note before"
