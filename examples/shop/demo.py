"""`pgqueue demo`: run the shop for real, then prove with SQL that nothing was lost.

Real processes, all on this machine: Postgres (the caller's, or an embedded one), the web application under
uvicorn, a worker, a mail server and a shipping service; and customers who place orders over HTTP. They are
started in that order and stopped in the opposite one, the worker by SIGTERM, so it drains. Everything a run
makes has the run's name: the schema of the shop's tables and the queues. So neither an earlier run nor
other people's jobs are in the way, and the audit is about this run.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from textwrap import indent
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console

from pgqueue.config import Config
from pgqueue.database import migrate
from pgqueue.database.embedded import EmbeddedPostgres
from pgqueue.job import new_id
from shop.audit import Finding, Run, Total, audit, total
from shop.customers import Answer, Customers, write_orders
from shop.models import create_tables
from shop.processes import Child, Children, Interruptions
from shop.screen import Gauge, make_screen

QUEUES = ("email", "invoices", "shipping")
OUTAGE = 2.0
"""Seconds for which the shipping service refuses connections, from when somebody first felt it."""
STALL_TIMEOUT = 60
"""Seconds in which nothing moves, after which the run is given up."""
LOOK_INTERVAL = 0.2
ROWS_SHOWN = 15


class DemoFailed(Exception):
    """The run came to no end, or a promise does not hold."""


class Demo:
    """One run of the shop.

    Args:
        config: Which database, and the schema of the queue. Without a DSN: an embedded server, gone when the
            run ends.
        orders: How many to place.
        concurrency: The worker's.
        seed: Of the orders.
        console: Where to report.
    """

    def __init__(self, config: Config, *, orders: int, concurrency: int, seed: int, console: Console) -> None:
        self._config = config
        self._orders = write_orders(orders, seed)
        self._concurrency = concurrency
        self._console = console
        self._name = f"shop_demo_{secrets.token_hex(4)}"
        self._queues = tuple(f"{self._name}.{queue}" for queue in QUEUES)
        self._first_id = new_id()

    def run(self) -> Total:
        """Run it, and stop everything that was started; what the audit counted.

        Raises:
            DemoFailed: With the reason.
            ChildFailed: A process ended by itself, or did not come up.
            OrderFailed: The shop did not answer an order as it should.
            Interrupted: By a signal.
        """
        with ExitStack() as stack:
            interruptions = stack.enter_context(Interruptions())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgqueue-demo-")))
            dsn = self._config.dsn or self._start_postgres(stack)
            connection = stack.enter_context(self._books(dsn))
            self._say(f"orders and queues of this run: {self._name}; {describe(connection)}")
            answers = self._trade(dsn, folder, connection, interruptions)
            findings = self._audit(connection, folder, answers, interruptions)
            if self._config.dsn:
                self._say(f"the orders of this run stay; to remove them: DROP SCHEMA {self._name} CASCADE")
        broken = [f"{finding.check.claim}: {finding.problem}" for finding in findings if finding.problem]
        if broken:
            raise DemoFailed("\n".join(["the audit does not hold", *broken]))
        return total(findings)

    def _start_postgres(self, stack: ExitStack) -> str:
        began = time.monotonic()
        server = stack.enter_context(EmbeddedPostgres())
        self._say(f"embedded PostgreSQL started in {time.monotonic() - began:.1f} s")
        return server.dsn

    @contextmanager
    def _books(self, dsn: str) -> Iterator[psycopg.Connection[Any]]:
        """A connection, with this run's tables made; a run that comes to no end takes its rows with it."""
        migrate.upgrade(dsn, schema=self._config.schema)
        create_tables(dsn, schema=self._name)
        with psycopg.connect(
            dsn, autocommit=True, application_name="pgqueue demo", connect_timeout=10
        ) as connection:
            try:
                yield connection
            except BaseException as error:
                with suppress(psycopg.Error):
                    self._remove(connection)
                if isinstance(error, psycopg.Error):
                    raise DemoFailed(f"the database failed us: {error}") from error
                raise

    def _trade(
        self, dsn: str, folder: Path, connection: psycopg.Connection[Any], interruptions: Interruptions
    ) -> list[Answer]:
        """Start the shop, let the customers in, wait until every job has ended, and close the shop."""
        (folder / "invoices").mkdir()
        with Children(folder, self._environment(dsn, folder)) as children:
            services = children.start("mail and shipping", "-m", "shop.services", str(folder), "--down")
            web = children.start(
                "web application", "-m", "uvicorn", "shop.web:web", "--port", "0", "--no-access-log"
            )
            smtp, shipping = services.await_line(r"smtp (\S+) shipping (\S+)\n", interruptions.pause)
            children.environment |= {"SHOP_SMTP": smtp, "SHOP_SHIPPING_URL": shipping}
            # With weights, so that no kind of job waits for all of another kind.
            queues = ",".join(f"{queue}:1" for queue in self._queues)
            worker = children.start(
                "worker", "-m", "pgqueue.cli.main", "-A", "shop.app:app",
                "worker", "-Q", queues, "-c", str(self._concurrency),
            )  # fmt: skip
            (url,) = web.await_line(r"running on (http://\S+)", interruptions.pause)
            self._say(f"shop {url}  mail {smtp}  shipping {shipping}, down at first")
            outage = Outage(
                Gauge(connection, self._config.schema, self._queues[-1:], self._first_id), services
            )
            answers = self._drive(url, children, worker, outage, connection, interruptions)
            # First the producers, then the worker, then what the worker's jobs talk to.
            web.stop()
            worker.drained()
            services.stop()
        return answers

    def _drive(
        self,
        url: str,
        children: Children,
        worker: Child,
        outage: Outage,
        connection: psycopg.Connection[Any],
        interruptions: Interruptions,
    ) -> list[Answer]:
        """Place the orders and wait for their jobs; what the customers were told."""
        gauge = Gauge(connection, self._config.schema, self._queues, self._first_id)
        last, since = None, time.monotonic()
        with Customers(url, self._orders) as customers, make_screen(self._console) as screen:
            while True:
                moment = gauge.read(len(self._orders), customers.answers())
                screen.show(moment)
                if moment.done:
                    return customers.answers()
                children.check()
                outage.look()
                if moment != last:
                    last, since = moment, time.monotonic()
                elif time.monotonic() - since > STALL_TIMEOUT:
                    raise DemoFailed(worker.with_log(f"nothing moved for {STALL_TIMEOUT} seconds; {moment}"))
                interruptions.pause(LOOK_INTERVAL)

    def _audit(
        self,
        connection: psycopg.Connection[Any],
        folder: Path,
        answers: list[Answer],
        interruptions: Interruptions,
    ) -> list[Finding]:
        self._say("")
        findings = []
        for finding in audit(connection, Run(self._name, self._config.schema, self._queues, folder), answers):
            interruptions.pause(0)
            findings.append(finding)
            self._say(show(finding))
        return findings

    def _remove(self, connection: psycopg.Connection[Any]) -> None:
        """Leave no job to a queue that nobody will serve, and no orders that nobody will look at."""
        jobs = sql.Identifier(self._config.schema, "jobs")
        connection.execute(
            sql.SQL("DELETE FROM {} WHERE queue = ANY (%s)").format(jobs), [list(self._queues)]
        )
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(self._name)))

    def _environment(self, dsn: str, folder: Path) -> dict[str, str]:
        """For the children: nothing that steers pgqueue or the shop but what is set here."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PGQUEUE_", "SHOP_"))
        }
        examples = Path(__file__).resolve().parent.parent
        places = [examples]
        if examples.parent.joinpath("pgqueue").is_dir():  # a checkout, which need not be installed
            places.append(examples.parent)
        # Made absolute: the children run in another folder.
        inherited_places = inherited.get("PYTHONPATH", "").split(os.pathsep)
        places += [Path(place).absolute() for place in inherited_places if place]
        return inherited | {
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "PGQUEUE_DSN": dsn,
            "PGQUEUE_SCHEMA": self._config.schema,
            "SHOP_SCHEMA": self._name,
            "SHOP_QUEUE_PREFIX": f"{self._name}.",
            "SHOP_INVOICES": str(folder / "invoices"),
        }

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Outage:
    """Ends the shipping service's outage, which is no use if it is over before anybody felt it.

    Args:
        gauge: Of the jobs that call the service.
        services: The process it runs in.
    """

    def __init__(self, gauge: Gauge, services: Child) -> None:
        self._gauge = gauge
        self._services = services
        self._felt: float | None = None
        self._over = False

    def look(self) -> None:
        """To be called again and again."""
        now = time.monotonic()
        if self._felt is None:
            if self._gauge.read(0, []).retries:
                self._felt = now
        elif not self._over and now - self._felt >= OUTAGE:
            self._over = True
            self._services.send(signal.SIGUSR1)


def describe(connection: psycopg.Connection[Any]) -> str:
    """Which server this is, without its password."""
    info = connection.info
    version = info.parameter_status("server_version")
    return f"PostgreSQL {version} at {info.host}:{info.port}, database {info.dbname}"


def show(finding: Finding) -> str:
    """The claim, the query as it can be pasted into psql, and its answer."""
    shown = [finding.columns, *(tuple(map(in_words, row)) for row in finding.rows[:ROWS_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        finding.check.claim,
        indent(f"{finding.query};", "    "),
        *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in shown),
    ]
    if len(finding.rows) > ROWS_SHOWN:
        lines.append(f"  and {len(finding.rows) - ROWS_SHOWN} more")
    if finding.check.zero:
        lines.append(f"  -> does not hold: {finding.problem}" if finding.problem else "  -> holds")
    return "\n".join([*lines, ""])


def in_words(value: object) -> str:
    return "" if value is None else str(value)
