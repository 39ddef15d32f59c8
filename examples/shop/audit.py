"""Does every promise hold? The audit of a demo's run: plain SQL over the queue, the orders and what reached
the world.

What SQL cannot see is first written into two tables beside the orders: `receipts`, what the customers were
told (also about the orders that were rolled back), and `effects`, what is in the mailbox, the invoice
folder and the shipments. After that each check is one query, which anyone can repeat in psql.
"""

from __future__ import annotations

import json
import mailbox
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg

from shop.customers import Answer

TABLES = """
CREATE TABLE {shop}.receipts (order_id bigint PRIMARY KEY, status integer NOT NULL, jobs uuid[] NOT NULL);
CREATE TABLE {shop}.effects (task text, order_id bigint, times integer NOT NULL, total numeric, flaw text,
                             PRIMARY KEY (task, order_id));
"""


@dataclass(frozen=True)
class Check:
    """A query, and the columns of its answer that must be 0 in every row."""

    claim: str
    query: str
    zero: tuple[str, ...] = ()


CHECKS = (
    Check(
        "The orders in the database are those that customers were told of",
        """\
SELECT count(*) FILTER (WHERE r.status = 201) AS confirmed,
       count(o.id) AS committed,
       count(*) FILTER (WHERE r.status = 201 AND o.id IS NULL) AS confirmed_but_missing,
       count(*) FILTER (WHERE r.status IS DISTINCT FROM 201 AND o.id IS NOT NULL) AS there_but_not_confirmed
FROM {shop}.receipts r FULL JOIN {shop}.orders o ON o.id = r.order_id""",
        zero=("confirmed_but_missing", "there_but_not_confirmed"),
    ),
    Check(
        "Every committed order has its three jobs, and each of them ended exactly once",
        """\
WITH job AS (
    SELECT r.order_id, told.id, count(a.id) AS places, min(a.state) AS state
    FROM {shop}.receipts r
    CROSS JOIN unnest(r.jobs) AS told(id)
    LEFT JOIN {queue}.all_jobs a ON a.id = told.id
    WHERE r.status = 201
    GROUP BY r.order_id, told.id
)
SELECT count(*) AS jobs,
       count(*) FILTER (WHERE places = 1 AND state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE places = 1 AND state = 'dead') AS dead_lettered,
       count(*) FILTER (WHERE places = 1 AND state NOT IN ('succeeded', 'dead')) AS neither,
       count(*) FILTER (WHERE places > 1) AS in_two_places,
       count(*) FILTER (WHERE places = 0) AS lost,
       (SELECT count(*) FROM {shop}.orders o
        WHERE (SELECT count(*) FROM job WHERE job.order_id = o.id) <> 3) AS orders_without_three_jobs
FROM job""",
        zero=("neither", "in_two_places", "lost", "orders_without_three_jobs"),
    ),
    Check(
        "Of a rolled-back order there is no trace, though its jobs had been enqueued",
        """\
SELECT count(DISTINCT r.order_id) AS rolled_back,
       count(told.id) AS jobs_enqueued_and_rolled_back,
       count(o.id) AS orders_found,
       count(a.id) AS jobs_found
FROM {shop}.receipts r
CROSS JOIN unnest(r.jobs) AS told(id)
LEFT JOIN {shop}.orders o ON o.id = r.order_id
LEFT JOIN {queue}.all_jobs a ON a.id = told.id
WHERE r.status = 402""",
        zero=("orders_found", "jobs_found"),
    ),
    Check(
        "There is no job that nobody ordered",
        """\
SELECT count(*) AS jobs_on_these_queues,
       count(*) FILTER (WHERE j.job_id IS NULL) AS jobs_of_no_order
FROM {queue}.all_jobs a LEFT JOIN {shop}.order_jobs j ON j.job_id = a.id
WHERE a.queue IN ({queues})""",
        zero=("jobs_of_no_order",),
    ),
    Check(
        "Mails delivered, invoices on disk and parcels ordered are those of the jobs that succeeded",
        """\
WITH bill AS (
    SELECT order_id, sum(quantity * unit_price) AS total FROM {shop}.order_lines GROUP BY order_id
), job AS (
    SELECT j.task, j.order_id, a.state, bill.total
    FROM {shop}.order_jobs j JOIN {queue}.all_jobs a ON a.id = j.job_id JOIN bill USING (order_id)
), pair AS (
    SELECT task, order_id, coalesce(job.state = 'succeeded', false) AS succeeded,
           effects.times IS NOT NULL AND flaw IS NULL AS found, effects.times, flaw,
           flaw IS NOT NULL OR coalesce(effects.total <> job.total, false) AS wrong
    FROM job FULL JOIN {shop}.effects USING (task, order_id)
)
SELECT task,
       count(*) FILTER (WHERE succeeded) AS succeeded,
       count(*) FILTER (WHERE found) AS found,
       count(*) FILTER (WHERE succeeded AND NOT found) AS missing,
       count(*) FILTER (WHERE found AND NOT succeeded) AS unexpected,
       count(*) FILTER (WHERE wrong) AS wrong,
       count(*) FILTER (WHERE times > 1) AS more_than_once,
       min(coalesce(flaw, 'order ' || order_id)) FILTER (WHERE succeeded <> found OR wrong) AS example
FROM pair GROUP BY task ORDER BY task""",
        zero=("missing", "unexpected", "wrong"),
    ),
    Check(
        "For the record: which runs failed, and how their jobs ended",
        """\
SELECT j.task, f.error_class, count(*) AS failed_runs, count(DISTINCT f.job_id) AS jobs,
       count(DISTINCT f.job_id) FILTER (WHERE a.state = 'succeeded') AS succeeded_later
FROM {queue}.failures f
JOIN {shop}.order_jobs j USING (job_id)
JOIN {queue}.all_jobs a ON a.id = f.job_id
GROUP BY j.task, f.error_class ORDER BY failed_runs DESC""",
    ),
    Check(
        "For the record: the dead letters",
        """\
SELECT j.order_id, d.dead_letter_queue, d.reason, d.error_message
FROM {queue}.dead_letters d JOIN {shop}.order_jobs j ON j.job_id = d.id
ORDER BY j.order_id""",
    ),
)


@dataclass(frozen=True)
class Run:
    """What a run of the demo left behind.

    Attributes:
        schema: Of the shop's tables.
        queue_schema: Of the queue's.
        queues: Names of the queues that nobody else uses.
        folder: Has `mail`, a Maildir; `invoices`, with PDFs; and `shipments`, with JSON files.
    """

    schema: str
    queue_schema: str
    queues: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Finding:
    """A check, the query as it was run, and its answer."""

    check: Check
    query: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    @property
    def problem(self) -> str | None:
        """Why the claim does not hold, None if it does."""
        wrong = [(column, row) for row in self.answers() for column in self.check.zero if row[column] != 0]
        return "; ".join(_must_be_zero(column, row) for column, row in wrong) or None

    def answers(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Total:
    """The audit in one line."""

    orders: int
    rolled_back: int
    jobs: int
    succeeded: int
    dead_lettered: int
    lost: int

    def __str__(self) -> str:
        return (
            f"{self.orders} orders, {self.rolled_back} rolled back, {self.jobs} jobs: "
            f"{self.succeeded} succeeded, {self.dead_lettered} dead-lettered, {self.lost} lost"
        )


@dataclass(frozen=True)
class Effect:
    """Something a job did to the world outside the database.

    Attributes:
        times: How often it is there; more than once only for a mail.
        total: The sum it states, None if it states none.
        flaw: Why it does not count, None if it does.
    """

    task: str
    order_id: int
    times: int = 1
    total: Decimal | None = None
    flaw: str | None = None


def audit(connection: psycopg.Connection[Any], run: Run, answers: Iterable[Answer]) -> Iterator[Finding]:
    """Every finding, one query after the other. Makes the tables `receipts` and `effects` in the run's
    schema.
    """
    cursor = connection.cursor()
    cursor.execute(_render(TABLES, run))
    cursor.executemany(
        _render("INSERT INTO {shop}.receipts VALUES (%s, %s, %s::uuid[])", run),
        [(answer.order_id, answer.status, list(answer.jobs)) for answer in answers],
    )
    cursor.executemany(
        _render("INSERT INTO {shop}.effects VALUES (%s, %s, %s, %s, %s)", run),
        [
            (effect.task, effect.order_id, effect.times, effect.total, effect.flaw)
            for effect in (*mails(run.folder), *invoices(run.folder), *shipments(run.folder))
        ],
    )
    connection.commit()
    for check in CHECKS:
        query = _render(check.query, run)
        rows = cursor.execute(query).fetchall()
        columns = tuple(column.name for column in cursor.description or ())
        yield Finding(check, query.decode(), columns, rows)


def total(findings: Sequence[Finding]) -> Total:
    """The numbers of a whole audit."""
    numbers: dict[str, int] = {}
    for finding in findings[:3]:
        numbers |= finding.answers()[0]
    return Total(
        orders=numbers["confirmed"] + numbers["rolled_back"],
        rolled_back=numbers["rolled_back"],
        jobs=numbers["jobs"],
        succeeded=numbers["succeeded"],
        dead_lettered=numbers["dead_lettered"],
        lost=numbers["lost"],
    )


def mails(folder: Path) -> list[Effect]:
    """One effect per Message-ID in the Maildir, which is how a mailbox knows a message."""
    times: Counter[int] = Counter()
    totals: dict[int, Decimal | None] = {}
    for message in mailbox.Maildir(folder / "mail"):
        order_id = _number(r"<order-(\d+)@shop\.example>", str(message["Message-ID"]))
        times[order_id] += 1
        totals[order_id] = _total_in(bytes(message.get_payload(decode=True)).decode())
    return [Effect("send_email", order_id, times[order_id], total) for order_id, total in totals.items()]


def invoices(folder: Path) -> list[Effect]:
    """One effect per PDF that is in the folder under an order's name; flawed if it cannot be read or is
    another's.
    """
    return [_invoice(path) for path in sorted((folder / "invoices").glob("invoice-*.pdf"))]


def shipments(folder: Path) -> list[Effect]:
    """One effect per parcel that the shipping service was asked for."""
    received = [json.loads(path.read_text()) for path in (folder / "shipments").glob("*.json")]
    return [Effect("notify_shipping", shipment["order"]) for shipment in received]


def _invoice(path: Path) -> Effect:
    from pypdf import PdfReader

    order_id = _number(r"invoice-(\d+)\.pdf", path.name)
    try:
        text = "\n".join(page.extract_text() for page in PdfReader(path).pages)
    except Exception as error:  # whatever a broken PDF makes of the reader is the finding
        return Effect("generate_invoice", order_id, flaw=f"{path.name}: {type(error).__name__}: {error}")
    if _number(r"Invoice for order (\d+)\n", text) != order_id:
        return Effect("generate_invoice", order_id, flaw=f"{path.name} is another order's")
    return Effect("generate_invoice", order_id, total=_total_in(text))


def _number(pattern: str, text: str) -> int:
    """The number in the pattern's group; 0, which is no order's, if it is not there."""
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _total_in(text: str) -> Decimal | None:
    found = re.search(r"Total: ([\d.]+) EUR", text)
    return Decimal(found[1]) if found else None


def _render(query: str, run: Run) -> bytes:
    """The query with the names filled in, as it can be pasted into psql. The names are the demo's own."""
    queues = ", ".join(f"'{queue}'" for queue in run.queues)
    names = {"{shop}": run.schema, "{queue}": run.queue_schema, "{queues}": queues}
    for token, name in names.items():
        query = query.replace(token, name)
    return query.encode()


def _must_be_zero(column: str, answer: dict[str, Any]) -> str:
    where = f" for {answer['task']}, {answer['example']}" if "task" in answer else ""
    return f"{column} must be 0, got {answer[column]}{where}"
