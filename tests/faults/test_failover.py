"""The primary dies, a streaming standby takes over: workers and producers find it by themselves."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from pgqueue import DatabaseUnavailable, EnqueueUncertain, PgQueue
from pgqueue.database.embedded import EmbeddedPostgres
from tests.acceptance.workers import Jobs, Workers, eventually
from tests.faults.relay import Relay
from tests.servers import Server, own_server


class Standby:
    """A server that follows another one by streaming replication.

    Args:
        home: A folder that the user Postgres runs as can enter.
    """

    def __init__(self, primary: Server, home: Path) -> None:
        theirs = primary._embedded._server
        assert theirs is not None
        cluster = home / "cluster"
        cluster.mkdir(mode=0o700)
        if theirs.user:
            theirs.user.own(cluster)
        done = theirs.run(
            "pg_basebackup", "-D", str(cluster), "-R", "-X", "stream", "-c", "fast", "-d", primary.dsn
        )
        assert done.returncode == 0, done.stdout
        # A copy has its origin's password, and its log is its own.
        shutil.copy(primary.home / "password", home / "password")
        (cluster / "server.log").unlink(missing_ok=True)
        self._embedded = EmbeddedPostgres(home, bin_dir=theirs.bin_dir)
        self.dsn = self._embedded.start()

    def promote(self) -> None:
        """Returns when it takes writes."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            assert connection.execute("select pg_promote(true, 30)").fetchone() == (True,)

    def close(self) -> None:
        self._embedded.stop()


@dataclass(frozen=True)
class Pair:
    """A primary and its synchronous standby, which both hold the database `migrated`."""

    primary: Server
    standby: Standby

    @property
    def primary_dsn(self) -> str:
        return self.primary.dsn_of("migrated")

    @property
    def standby_dsn(self) -> str:
        return urlunsplit(urlsplit(self.standby.dsn)._replace(path="/migrated"))

    @property
    def dsn(self) -> str:
        """The standby first: which of them takes writes must be found out."""
        primary, standby = urlsplit(self.primary_dsn), urlsplit(self.standby_dsn)
        hosts = f"{standby.hostname}:{standby.port},{primary.hostname}:{primary.port}"
        user = primary.netloc.rpartition("@")[0]
        return urlunsplit(primary._replace(netloc=f"{user}@{hosts}"))

    def fail_over(self) -> None:
        """kill -9 the primary, promote the standby."""
        self.primary.kill()
        self.standby.promote()


@pytest.fixture
def pair() -> Iterator[Pair]:
    home = Path(tempfile.mkdtemp(prefix="pgqueue-standby-"))
    home.chmod(0o711)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        primary = stack.enter_context(own_server())
        standby = stack.enter_context(closing(Standby(primary, home)))
        with primary.connect() as connection:
            connection.execute("alter system set synchronous_standby_names = '*'")
            connection.execute("select pg_reload_conf()")
            query = "select sync_state from pg_stat_replication"
            eventually(lambda: connection.execute(query).fetchone() == ("sync",), "the standby is in step")
        yield Pair(primary, standby)


class Producer(threading.Thread):
    """Enqueues one job after the other until told to stop, and notes what it was told of each."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._app = PgQueue("tests", dsn=dsn)
        self._stop_it = threading.Event()
        self.acknowledged: list[str] = []
        self.uncertain: list[str] = []
        self.refused = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                try:
                    self.acknowledged.append(self._app.send_task("tests_app.mark", [1]).id)
                except EnqueueUncertain as error:
                    self.uncertain.append(error.job_id)
                except DatabaseUnavailable:
                    self.refused += 1
                    time.sleep(0.05)
        except BaseException as error:
            self.error = error
        finally:
            self._app.close()

    def stop(self) -> None:
        self._stop_it.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def producing(dsn: str) -> Iterator[Producer]:
    producer = Producer(dsn)
    producer.start()
    try:
        yield producer
    finally:
        producer.stop()


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(pair: Pair, tmp_path: Path) -> None:
    with Workers(pair.dsn, tmp_path) as workers, closing(Jobs(pair.standby_dsn)) as jobs:
        worker = workers.start("-c", "2", "--heartbeat", "0.5", "--lease", "3")
        with producing(pair.dsn) as producer:
            eventually(lambda: len(producer.acknowledged) > 100, "jobs are enqueued")
            eventually(lambda: workers.ledger.count() > 50, "they run")
            pair.fail_over()
            before = len(producer.acknowledged)
            eventually(lambda: len(producer.acknowledged) > before + 100, "the producer goes on")
        acknowledged = producer.acknowledged
        assert len(acknowledged) == len(set(acknowledged))
        ended = jobs.ends(acknowledged)
        assert ended == {"succeeded": len(acknowledged)}
        # One that nobody could settle is there once or not at all.
        found = jobs.sql("select id from pgqueue.all_jobs where id = any(%s::uuid[])", producer.uncertain)
        assert len(found) <= len(producer.uncertain) <= 1
        assert workers.ledger.runs().keys() >= set(acknowledged)
        # It listens at the new primary.
        eventually(
            lambda: jobs.sql("select 1 from pg_stat_activity where application_name = 'pgqueue listen'"),
            "it listens",
        )
        assert "Traceback" not in worker.log
        assert "fenced" not in worker.log
        assert worker.stop() == 0


@pytest.mark.slow
def test_an_address_that_moves_before_the_promotion(pair: Pair, tmp_path: Path) -> None:
    # As a virtual address or a pooler does: for a while it leads to a server that is read-only.
    with Relay(pair.primary_dsn) as relay, Workers(relay.dsn, tmp_path) as workers:
        with closing(Jobs(pair.standby_dsn)) as jobs, producing(relay.dsn) as producer:
            worker = workers.start("-c", "1")
            eventually(lambda: workers.ledger.count() > 20, "jobs run")
            pair.primary.stop(signal.SIGINT)
            relay.lead_to(pair.standby_dsn)
            worker.wait_for_log("database_unavailable connection=claim.*")
            eventually(lambda: producer.refused > 0, "the producer is told that it is read-only")
            connections = relay.connections
            eventually(lambda: relay.connections > connections + 3, "they connect again and again")
            pair.standby.promote()
            before = len(producer.acknowledged)
            eventually(lambda: len(producer.acknowledged) > before + 20, "the producer goes on")
            producer.stop()
            ended = jobs.ends(producer.acknowledged)
            assert ended == {"succeeded": len(producer.acknowledged)}
            assert "Traceback" not in worker.log
            assert worker.stop() == 0
