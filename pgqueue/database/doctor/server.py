"""Checks of the server, of the way to it, and of the clocks: they need no schema."""

from __future__ import annotations

import secrets
import time
from contextlib import closing
from typing import Any, Final

import psycopg
from psycopg import sql

from pgqueue.database.doctor.report import Finding, Level, identifier, literal, some, span
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.dsn import is_pooled
from pgqueue.database.session import Row, Session, connect

OLDEST_SERVER: Final = 15
HEAR_WITHIN: Final = 1.0
"""Seconds a notification of our own may take before it counts as lost."""
CLOCK_WARNS, CLOCK_FAILS = 5.0, 86_400.0
"""Seconds between two clocks. A look-up by id takes the time in the id for right to a day."""
CLOCK_TRIES: Final = 3
CLOCK_JUMP: Final = 0.1
"""Seconds by which a clock that was set during a measurement differs from one that cannot be."""
OLD_SLOT: Final = 10_000_000
"""Transactions that a slot may hold up before it is an error; it does not say since when."""


def check_connection(visit: Visit) -> Seen:
    """The server's version, how far it is, and whether it takes writes."""
    server = visit.server
    trip = min(trip for _, trip in _clocks(visit))
    findings = judge_version(server["number"], server["version"])
    if server["standby"]:
        findings.append(
            Finding(
                "error",
                "the server is a standby",
                "it takes no writes, so nothing can be enqueued or run here",
                "name all servers in the dsn: postgresql://db1,db2/…?target_session_attrs=read-write",
                "standby",
            )
        )
    elif server["read_only"]:
        role, database = (identifier(server[name]) for name in ("role", "database"))
        findings.append(
            Finding(
                "error",
                "default_transaction_read_only is on",
                "transactions take no writes unless they ask for it, so nothing can be enqueued or run",
                f"ALTER DATABASE {database} RESET default_transaction_read_only; "
                f"ALTER ROLE {role} RESET default_transaction_read_only",
                "read_only",
            )
        )
    where = visit.session.connection.info.host or "this machine"
    fact = f"PostgreSQL {server['version'].split()[0]} on {where}, {1000 * trip:.1f} ms away"
    return f"{fact}, as role {server['role']} in database {server['database']}", findings


def judge_version(number: int, version: str) -> list[Finding]:
    """Whether the server is new enough; `number` as in server_version_num."""
    if number >= 10_000 * OLDEST_SERVER:
        return []
    return [
        Finding(
            "error",
            f"the server is PostgreSQL {version}",
            f"pgqueue needs PostgreSQL {OLDEST_SERVER} or newer",
            "upgrade the server, with pg_upgrade",
            facts={"version": version},
        )
    ]


def check_pooler(visit: Visit) -> Seen:
    """Whether there is a pooler in between, and whether LISTEN hears through it."""
    pooled = is_pooled(visit.server["pid"], visit.session.connection)
    if not visit.listen:
        return f"{_way(pooled)}; workers poll (--no-listen)", []
    if not pooled and visit.listen_dsn is None:
        return _way(pooled), []
    if _hears(visit):
        heard = "the listen_dsn hears notifications" if visit.listen_dsn else "LISTEN works through it"
        return f"{_way(pooled)}; {heard}", []
    facts = {"pooled": pooled, "listen_dsn": visit.listen_dsn is not None, "hears": False}
    if visit.listen_dsn is not None:
        finding = Finding(
            "warning",
            "the listen_dsn hears nothing of what is notified through the dsn",
            "workers poll, so a job starts up to half a second late",
            "PGQUEUE_LISTEN_DSN=postgresql://…   # a direct connection to the same database",
            facts=facts,
        )
    else:
        finding = Finding(
            "warning",
            "there is a pooler in between, and LISTEN hears nothing through it (pool_mode = transaction)",
            "workers that connect like this poll, so a job starts up to half a second late",
            f"{visit.worker_command} --listen-dsn postgresql://…   # a direct connection; or --no-listen",
            facts=facts,
        )
    return _way(pooled), [finding]


def _way(pooled: bool) -> str:
    return "a pooler is in between" if pooled else "no pooler in between"


def _hears(visit: Visit) -> bool:
    """Whether what is notified through the DSN arrives where workers listen."""
    channel = f"{visit.schema}_{secrets.token_hex(6)}"
    name = sql.Identifier(channel)
    with closing(connect(visit.listen_dsn or visit.dsn)) as ears:
        other = Session(ears, visit.schema, visit.session.statement_timeout, visit.session.lock_timeout)
        with other.transaction():
            ears.execute(sql.SQL("LISTEN {}").format(name))
        with visit.session.transaction():
            visit.session.connection.execute("SELECT pg_notify(%s, '')", [channel])
        heard = bool(list(ears.notifies(timeout=HEAR_WITHIN, stop_after=1)))
        with other.transaction():
            ears.execute(sql.SQL("UNLISTEN {}").format(name))
    return heard


def check_clock(visit: Visit) -> Seen:
    """How far this machine's clock is from the database's."""
    skew, trip = min(_clocks(visit), key=lambda measured: measured[1])
    facts = {"skew_seconds": round(skew, 3), "round_trip_seconds": round(trip, 6)}
    off = f"this machine's clock is {_off(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the database's"
    if abs(skew) < CLOCK_WARNS + trip / 2:
        return off, []
    finding = Finding(
        "error" if abs(skew) > CLOCK_FAILS else "warning",
        off,
        "job ids made here carry its time, and looking up a job by id takes that for right to a day: beyond, "
        "ended jobs are not found"
        if abs(skew) > CLOCK_FAILS
        else "times that are worked out here (eta=, --since) are wrong by as much; the queue itself goes by "
        "the database's clock",
        "timedatectl set-ntp true   # on the machine whose clock is wrong",
        facts=facts,
    )
    return off, [finding]


def _off(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else span(seconds)


def _clocks(visit: Visit) -> list[tuple[float, float]]:
    """How far our clock is ahead, and how long it took to ask, a few times."""
    found: list[tuple[float, float]] = visit.once("clocks", lambda: _read_clocks(visit))
    return found


def _read_clocks(visit: Visit) -> list[tuple[float, float]]:
    measured: list[tuple[float, float]] = []
    jumpy: list[tuple[float, float]] = []
    with visit.session.transaction():
        for _ in range(CLOCK_TRIES):
            wall, steady = time.time(), time.monotonic()
            row = visit.session.run("read_clock", schema=visit.schema)[0]
            trip, passed = time.monotonic() - steady, time.time() - wall
            jumped = abs(passed - trip) > CLOCK_JUMP
            (jumpy if jumped else measured).append((wall + trip / 2 - row["now"], trip))
    return measured or jumpy


SETTINGS: Final = ("fsync", "full_page_writes", "synchronous_commit")


def check_settings(visit: Visit) -> Seen:
    """Whether the server keeps what it acknowledges."""
    rows = {row["name"]: row for row in visit.read("list_settings", names=list(SETTINGS))}
    findings = []
    for name in ("fsync", "full_page_writes"):
        if rows[name]["setting"] == "off":
            findings.append(
                Finding(
                    "error",
                    f"{name} is off",
                    "a crash of the machine can lose acknowledged commits, and the whole database with them",
                    f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()",
                    name,
                    facts=dict(rows[name]),
                )
            )
    if rows["synchronous_commit"]["setting"] == "off":
        findings.append(
            Finding(
                "hint",
                "synchronous_commit is off",
                "the queue's own connections raise it; your own transactions that enqueue do not, and a "
                "crash can lose their last half second",
                f"ALTER DATABASE {identifier(visit.server['database'])} SET synchronous_commit = on",
                "synchronous_commit",
                facts=dict(rows["synchronous_commit"]),
            )
        )
    return ", ".join(f"{name} {rows[name]['setting']}" for name in SETTINGS), findings


def check_connections(visit: Visit) -> Seen:
    """How many connections are left."""
    (row,) = visit.read("survey_connections")
    part = row["used"] / max(row["most"], 1)
    fact = f"{row['used']} of {row['most']} connections are used"
    if part < 0.8:
        return fact, []
    finding = Finding(
        "error" if part >= 0.95 else "warning",
        f"{fact}: {row['greedy']}",
        "when they run out, workers and producers cannot connect",
        "ALTER SYSTEM SET max_connections = …   # and a restart; or fewer clients, or a pooler",
        facts=dict(row),
    )
    return fact, [finding]


def check_snapshots(visit: Visit) -> Seen:
    """Who keeps dead rows from being removed."""
    rows = visit.snapshots
    findings = [finding for row in rows if (finding := _judge_snapshot(visit, row)) is not None]
    hidden = [row for row in rows if row["kind"] == "session" and row["seconds"] is None]
    if hidden and not visit.server["sees_all"]:
        findings.append(
            Finding(
                "hint",
                f"since when sessions {some([str(row['pid']) for row in hidden])} are in a transaction is "
                f"hidden from role {visit.server['role']}",
                "an old one among them would not be seen here",
                f"GRANT pg_read_all_stats TO {identifier(visit.server['role'])}",
                "hidden",
                facts={"pids": [row["pid"] for row in hidden]},
            )
        )
    oldest = max((row["seconds"] or 0.0 for row in rows), default=0.0)
    return (f"the oldest is {span(oldest)} old" if oldest else "nobody holds an old one"), findings


def _judge_snapshot(visit: Visit, row: Row) -> Finding | None:
    means = "dead rows stay until it ends, so tables and indexes grow; claims do not slow down"
    since = f", since {row['since'].isoformat(sep=' ', timespec='seconds')}" if row["since"] else ""
    facts = {
        name: row[name]
        for name in (
            "kind",
            "pid",
            "role",
            "name",
            "state",
            "query",
            "since",
            "seconds",
            "age",
            "active",
            "wal",
        )
        if row[name] is not None
    }
    if row["kind"] in ("session", "prepared"):
        if row["seconds"] is None or row["seconds"] < visit.old:
            return None
        level: Level = "error" if row["seconds"] >= 12 * visit.old else "warning"
        if row["kind"] == "session":
            what = f"{session_words(row)} has been in a transaction for {span(row['seconds'])}{since}"
            mend = f"SELECT pg_terminate_backend({row['pid']})"
        else:
            what = f"prepared transaction {row['name']} of {row['role']} is {span(row['seconds'])} old{since}"
            mend = f"ROLLBACK PREPARED {literal(row['name'])}   -- or COMMIT PREPARED"
        return Finding(level, what, means, mend, str(row["pid"] or row["name"]), facts)
    age = row["age"] or 0
    behind = f"{age:,} transactions"
    if row["kind"] == "standby":
        if age < OLD_SLOT:
            return None
        what = f"standby {row['name']} (session {row['pid']}) reports a snapshot that is {behind} old"
        mend = "end the old query on the standby, or set hot_standby_feedback = off there"
        return Finding("warning", what, means, mend, row["name"], facts)
    if row["active"] and age < OLD_SLOT:
        return None
    use = "is in use" if row["active"] else "is used by nobody"
    kept = f" and {row['wal'] >> 20:,} MiB of WAL" if row["wal"] is not None else ""
    return Finding(
        "error" if age >= OLD_SLOT else "warning",
        f"replication slot {row['name']} {use} and keeps what is {behind} old{kept}",
        f"{means}. The WAL it keeps may fill the disk",
        f"SELECT pg_drop_replication_slot({literal(row['name'])})   -- if nobody needs it any more",
        row["name"],
        facts,
    )


def session_words(row: Any) -> str:
    """`session 4711 (shop, psql, idle in transaction: select 1)`."""
    who = ", ".join(filter(None, (row["role"], row["name"], row["state"])))
    query = " ".join((row["query"] or "").split())[:80]
    return f"session {row['pid']} ({who}{': ' if query else ''}{query})"


READER: Final = 1.0
"""Seconds in a transaction after which a session may be what fills the notification queue."""


def check_notify_queue(visit: Visit) -> Seen:
    """How full the notification queue is, and who may keep it so."""
    (row,) = visit.read("survey_notify_queue", seconds=READER)
    findings = []
    fact = f"{100 * row['usage']:.0f} % full"
    if row["usage"] > 0.5:
        readers = row["readers"]
        said = "; in a transaction: " + some([session_words(each) for each in readers], 3) if readers else ""
        if not readers and not visit.server["sees_all"]:
            said = f"; which one is hidden from role {visit.server['role']}: GRANT pg_read_all_stats shows it"
        ask = "SELECT pg_notification_queue_usage()   -- asking frees what everybody has read"
        end = "; ".join(f"SELECT pg_terminate_backend({each['pid']})" for each in readers[:1])
        findings.append(
            Finding(
                "error" if row["usage"] > 0.9 else "warning",
                f"the server's notification queue is {fact}: a session listens and does not read{said}",
                "above half, pgqueue stops notifying and workers find jobs by looking; when it is full, "
                "every COMMIT that notifies fails, in all databases",
                f"{end}; {ask}" if end else ask,
                "usage",
                facts={"usage": row["usage"], "sessions": readers},
            )
        )
    for holder in row["holders"]:
        findings.append(
            Finding(
                "error",
                f"{session_words(holder)} holds the lock of NOTIFY for over a second (it waits for "
                f"{holder['wait_event'] or 'nothing'})",
                "no transaction of the cluster that notifies can commit meanwhile",
                f"SELECT pg_terminate_backend({holder['pid']})",
                f"holder {holder['pid']}",
                facts=holder,
            )
        )
    return fact, findings


def explain_unreachable(error: BaseException, dsn: str) -> Finding:
    """Why the database cannot be reached, and what to try."""
    text = str(error)
    given = psycopg.conninfo.conninfo_to_dict(dsn)
    host, port = str(given.get("host") or "localhost"), str(given.get("port") or 5432)
    ready = f"pg_isready -h {host} -p {port}"
    for words, means, mend in _REASONS:
        if any(word in text for word in words):
            return Finding("error", text, means, mend.format(ready=ready, **_names(given)), "unreachable")
    return Finding("error", text, "nothing can be looked at", ready, "unreachable")


def _names(given: Any) -> dict[str, str]:
    return {"user": str(given.get("user") or "…"), "database": str(given.get("dbname") or "…")}


_REASONS: Final = (
    (
        ("password authentication failed", "no password supplied"),
        "the server is there and refuses the password of this role",
        "correct the password in the dsn (--dsn, PGQUEUE_DSN), or set it: psql -c '\\password {user}'",
    ),
    (
        ("no pg_hba.conf entry", "authentication failed"),
        "the server is there and lets this role in neither from here nor in this way",
        "add a line to pg_hba.conf on the server, then: SELECT pg_reload_conf()",
    ),
    (
        ("does not exist",),
        "the server is there, and what the dsn names is not",
        "correct the dsn (--dsn, PGQUEUE_DSN), or: createuser {user}; createdb -O {user} {database}",
    ),
    (
        ("too many clients", "remaining connection slots", "too many connections"),
        "every connection is taken; workers and producers cannot connect either",
        "SELECT application_name, count(*) FROM pg_stat_activity GROUP BY 1   -- as a superuser",
    ),
    (
        ("the database system is ",),
        "the server is starting, stopping or recovering: workers wait for it",
        "{ready}   # until it accepts connections",
    ),
    (
        ("could not translate host name", "Name or service not known"),
        "the name of the host is not known here",
        "correct the host in the dsn (--dsn, PGQUEUE_DSN)",
    ),
    (
        ("Connection refused", "No such file or directory"),
        "the machine is there, and no server listens on that port",
        "{ready}   # then start the server, or correct the port in the dsn",
    ),
    (
        ("timeout", "timed out", "No route to host", "Network is unreachable"),
        "nobody answers: the machine is down, or a firewall is in between",
        "{ready}   # then look at the machine and at the firewall",
    ),
)
"""The first that fits counts. libpq gives no codes while connecting."""
