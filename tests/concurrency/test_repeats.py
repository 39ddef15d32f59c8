"""A connection of our own breaks under an enqueue: the job is there once, whatever became of the COMMIT."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgqueue import DatabaseError, DatabaseUnavailable, EnqueueUncertain, PgQueue, Task
from pgqueue.enqueue import insert_many, insert_one
from pgqueue.request import build_request

READY_FOR_QUERY = b"Z\x00\x00\x00\x05"
LOSE_THE_ANSWER = "the answer"
LOSE_THE_QUERY = "the query"
COMMIT = b"COMMIT\x00"  # not the end of READ COMMITTED

MOVE_TO_HISTORY = """
    with gone as (delete from pgqueue.jobs returning *)
    insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries,
        crashes, rescues, enqueued_at, enqueued_by, headers)
    select id, 'succeeded', queue, task, args, kwargs, priority, 1, 0, 0, 0, enqueued_at, enqueued_by, headers
    from gone
"""
MOVE_TO_DEAD_LETTERS = """
    with gone as (delete from pgqueue.jobs returning *)
    insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries, crashes,
        rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason)
    select id, queue, task, args, kwargs, priority, 1, 0, 0, 0, enqueued_at, enqueued_by, headers, queue,
        'crashed' from gone
"""


class Proxy:
    """Stands between a client and the server, and cuts connections when told to.

    Attributes:
        cuts: Messages to lose: what of them, and the bytes to know them by.
        on_cut: Called when one was lost, before the client notices.
        refuses: New connections are closed at once.
        connections: How many were made.
    """

    def __init__(self, dsn: str) -> None:
        parts = conninfo_to_dict(dsn)
        self._target = (str(parts.get("host") or "127.0.0.1"), int(parts.get("port") or 5432))
        self.cuts: list[tuple[str, bytes]] = []
        self.on_cut: Callable[[], object] = lambda: None
        self.refuses = False
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._sockets: list[socket.socket] = []
        self._threads[0].start()
        self.dsn = self._rewritten(dsn)

    def _rewritten(self, dsn: str) -> str:
        url = urlsplit(dsn)
        user, _, _ = url.netloc.rpartition("@")
        netloc = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
        return urlunsplit(url._replace(netloc=netloc, query="sslmode=disable&gssencmode=disable"))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            self._cut(each)
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                client.close()
                continue
            self.connections += 1
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            state = {"ready": False, "swallow": False}
            for target in (self._to_server, self._to_client):
                thread = threading.Thread(target=target, args=(client, server, state), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _to_server(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                cut = next((cut for cut in self.cuts if state["ready"] and cut[1] in data), None)
                if cut is not None:
                    self.cuts.remove(cut)
                    if cut[0] == LOSE_THE_QUERY:
                        self._cut(server)
                        self.on_cut()
                        self._cut(client)
                        return
                    state["swallow"] = True
                server.sendall(data)
        self._cut(server)

    def _to_client(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                answered = data[-6:-1] == READY_FOR_QUERY
                if state["swallow"] and answered:
                    self._cut(server)
                    self.on_cut()
                    break
                state["ready"] = state["ready"] or answered  # before the client can say something
                if not state["swallow"]:
                    client.sendall(data)
        self._cut(client)

    @staticmethod
    def _cut(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(db: str) -> Iterator[Proxy]:
    proxy = Proxy(db)
    yield proxy
    proxy.close()


@pytest.fixture
def app(proxy: Proxy) -> Iterator[PgQueue]:
    app = PgQueue("tests", dsn=proxy.dsn)
    app.task(name="tests.note")(lambda number: None)
    yield app
    app.close()


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


def rows(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def run(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


def everywhere(dsn: str) -> dict[str, list[str]]:
    """Ids of all jobs by where they are."""
    query = "select id::text, case state when 'ready' then 'live' else state end from pgqueue.all_jobs"
    found: dict[str, list[str]] = {}
    for job_id, state in rows(dsn, query):
        found.setdefault(state, []).append(job_id)
    return found


@pytest.mark.parametrize("lost", [LOSE_THE_ANSWER, LOSE_THE_QUERY])
@pytest.mark.parametrize("warm", [False, True])
def test_a_single_enqueue(db: str, proxy: Proxy, note: Any, lost: str, warm: bool) -> None:
    before = [note.delay(0).id for _ in range(7)] if warm else []  # more than psycopg's prepare_threshold
    proxy.cuts = [(lost, b"tests.note")]
    job_id = note.delay(1).id
    assert proxy.cuts == []
    assert proxy.connections == 2
    assert sorted(everywhere(db)["live"]) == sorted([*before, job_id])


@pytest.mark.parametrize("lost", [LOSE_THE_ANSWER, LOSE_THE_QUERY])
def test_an_async_enqueue(db: str, proxy: Proxy, note: Any, lost: str) -> None:
    proxy.cuts = [(lost, b"tests.note")]
    job_id = asyncio.run(note.adelay(1)).id
    assert proxy.connections == 2
    assert everywhere(db) == {"live": [job_id]}


def test_the_answer_of_the_repeat_is_lost_too(db: str, proxy: Proxy, note: Any) -> None:
    proxy.cuts = [(LOSE_THE_ANSWER, b"tests.note"), (LOSE_THE_ANSWER, COMMIT), (LOSE_THE_QUERY, COMMIT)]
    job_id = note.delay(1).id
    assert proxy.connections == 4
    assert everywhere(db) == {"live": [job_id]}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (LOSE_THE_QUERY, b"COPY"),
        (LOSE_THE_QUERY, b"wake_workers"),
        (LOSE_THE_ANSWER, b"wake_workers"),
        (LOSE_THE_QUERY, COMMIT),
        (LOSE_THE_ANSWER, COMMIT),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bulk_enqueue(
    db: str, proxy: Proxy, app: PgQueue, note: Any, lost: str, message: bytes, asynchronous: bool
) -> None:
    proxy.cuts = [(lost, message)]
    signatures = [note.s(number) for number in range(1_500)]
    ids = asyncio.run(app.aenqueue_many(signatures)) if asynchronous else app.enqueue_many(signatures)
    assert proxy.cuts == []
    assert [row[0] for row in rows(db, "select id::text from pgqueue.jobs order by position")] == ids


def test_a_given_id(db: str, proxy: Proxy, note: Any) -> None:
    mine = str(uuid4())
    proxy.cuts = [(LOSE_THE_ANSWER, COMMIT)]
    assert note.apply_async((1,), job_id=mine).id == mine
    assert everywhere(db) == {"live": [mine]}


@pytest.mark.parametrize(("ends", "where"), [(MOVE_TO_HISTORY, "succeeded"), (MOVE_TO_DEAD_LETTERS, "dead")])
def test_the_job_has_ended_before_the_repeat(
    db: str, proxy: Proxy, app: PgQueue, note: Any, ends: str, where: str
) -> None:
    proxy.cuts = [(LOSE_THE_ANSWER, b"tests.note")]
    proxy.on_cut = lambda: run(db, ends)
    job_id = note.delay(1).id
    assert everywhere(db) == {where: [job_id]}
    proxy.cuts = [(LOSE_THE_ANSWER, COMMIT)]
    ids = app.enqueue_many([note.s(1), note.s(2)])
    assert proxy.cuts == []
    assert {key: sorted(value) for key, value in everywhere(db).items()} == {where: sorted([job_id, *ids])}


@pytest.mark.parametrize(("ends", "where"), [(MOVE_TO_HISTORY, "succeeded"), (MOVE_TO_DEAD_LETTERS, "dead")])
@pytest.mark.parametrize("bulk", [False, True])
def test_the_job_ends_during_the_repeat(
    db: str, app: PgQueue, note: Any, ends: str, where: str, bulk: bool
) -> None:
    job_id = note.delay(1).id
    request = build_request(
        "tests.note", "[1]", "{}", {"job_id": job_id}, queue="default", priority=5, expires=None
    )
    answers: list[object] = []

    def repeat() -> None:
        plan: Any = insert_many([request], repeated=True) if bulk else insert_one(request, repeated=True)
        answers.append(app.client.database.run(plan, atomic=True))

    with psycopg.connect(db) as worker:
        worker.execute(ends)
        thread = threading.Thread(target=repeat)
        thread.start()
        wait_until(lambda: waits_for_a_lock(db))
        worker.commit()
        thread.join()
    assert answers == [[job_id] if bulk else job_id]
    assert everywhere(db) == {where: [job_id]}


def test_a_job_that_ended_is_not_enqueued_by_its_id_again(db: str, app: PgQueue, note: Any) -> None:
    for ends, where in ((MOVE_TO_HISTORY, "succeeded"), (MOVE_TO_DEAD_LETTERS, "dead")):
        job_id = note.delay(1).id
        run(db, ends)
        assert note.apply_async((1,), job_id=job_id).id == job_id
        assert app.enqueue_many([note.s(1).set(job_id=job_id)]) == [job_id]
        assert everywhere(db)[where] == [job_id]
        assert "live" not in everywhere(db)


def test_a_server_that_ended_our_idle_session_is_asked_again(db: str, proxy: Proxy, note: Any) -> None:
    note.delay(1)
    run(db, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgqueue'")
    wait_until(lambda: not rows(db, "select from pg_stat_activity where application_name = 'pgqueue'"))
    note.delay(2)
    assert len(everywhere(db)["live"]) == 2


def test_all_idle_connections_are_given_up_with_a_broken_one(
    db: str, proxy: Proxy, app: PgQueue, note: Any
) -> None:
    def enqueue_meanwhile(channel: Any) -> Any:
        note.delay(1)
        return
        yield

    app.client.database.run(enqueue_meanwhile)
    idle = app.client.database._idle
    assert len(idle) == 2
    proxy.cuts = [(LOSE_THE_QUERY, b"tests.note")]
    note.delay(2)
    assert (len(idle), proxy.connections) == (1, 3)


def test_a_database_that_stays_away_leaves_the_id_to_repeat_with(db: str, proxy: Proxy, note: Any) -> None:
    proxy.cuts = [(LOSE_THE_ANSWER, b"tests.note")]
    proxy.on_cut = lambda: setattr(proxy, "refuses", True)
    start = time.monotonic()
    with pytest.raises(EnqueueUncertain, match="repeat the call with this job_id") as caught:
        note.delay(1)
    assert 2 < time.monotonic() - start < 6
    assert everywhere(db) == {"live": [caught.value.job_id]}
    proxy.refuses = False
    assert note.apply_async((1,), job_id=caught.value.job_id).id == caught.value.job_id
    assert everywhere(db) == {"live": [caught.value.job_id]}


def test_nothing_is_uncertain_when_nothing_was_sent(db: str, proxy: Proxy, note: Any) -> None:
    proxy.refuses = True
    start = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        note.delay(1)
    assert time.monotonic() - start < 2
    assert everywhere(db) == {}


def test_an_error_of_the_statement_is_not_repeated(db: str, proxy: Proxy) -> None:
    app = PgQueue("tests", dsn=f"{proxy.dsn}&options={quote('-c lock_timeout=50')}")
    note = app.task(name="tests.note")(lambda number: None)
    with psycopg.connect(db) as blocker:
        blocker.execute("lock table pgqueue.jobs in access exclusive mode")
        with pytest.raises(DatabaseError, match=r"another session locks a table .* lock timeout; try again"):
            note.delay(1)
        with pytest.raises(DatabaseError, match=r"another session locks a table .* lock timeout; try again"):
            app.enqueue_many([note.s(1)])
    assert proxy.connections == 1
    note.delay(2)
    app.close()
    assert proxy.connections == 1


def test_a_result_is_read_again_after_its_connection_broke(db: str, proxy: Proxy, note: Any) -> None:
    result = note.delay(1)
    proxy.cuts = [(LOSE_THE_ANSWER, b"")]
    assert result.state == "ready"
    assert proxy.connections == 2


def waits_for_a_lock(dsn: str) -> bool:
    query = (
        "select from pg_stat_activity where application_name = 'pgqueue' and wait_event_type = 'Lock'"
        " and datname = current_database()"
    )
    return bool(rows(dsn, query))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
