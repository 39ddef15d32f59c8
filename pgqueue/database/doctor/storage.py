"""Checks of what keeps tables small: autovacuum and its settings, dead rows, partitions."""

from __future__ import annotations

from typing import Final

from pgqueue.database.doctor.blueprint import blueprint
from pgqueue.database.doctor.report import Finding, number, some, span
from pgqueue.database.doctor.schema import known_revision
from pgqueue.database.doctor.server import session_words
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.migrate import head_revision
from pgqueue.database.session import Row

MANY_DEAD: Final = 10_000
"""Dead rows that count; the tables' own settings have them removed after 2,000 at most, once a minute."""
LATE_VACUUM: Final = 300.0
"""Seconds after which autovacuum should have come."""
DAYS_AHEAD: Final = 7
"""Partitions are made for 14 days, every hour: so many must be there."""
COUNTED: Final = 10_000
"""Rows that are counted in a default partition."""


def hot_tables(visit: Visit) -> dict[str, dict[str, str]]:
    """The tables that are written to all the time, with the settings the migrations gave them."""
    return blueprint(visit.schema, known_revision(visit) or head_revision()).options


def _survey(visit: Visit) -> list[Row]:
    rows: list[Row] = visit.once("tables", lambda: visit.read("survey_tables", names=list(hot_tables(visit))))
    return rows


def check_autovacuum(visit: Visit) -> Seen:
    """Whether autovacuum runs, and the hot tables' settings for it."""
    settings = {row["name"]: row for row in visit.read("list_settings", names=["autovacuum", "track_counts"])}
    findings = [
        Finding(
            "error",
            f"{name} is off",
            "nobody removes dead rows: tables and indexes grow, and everything gets slower",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()",
            name,
            facts=dict(settings[name]),
        )
        for name in ("autovacuum", "track_counts")
        if settings[name]["setting"] == "off"
    ]
    expected = hot_tables(visit)
    for row in _survey(visit):
        found = dict(each.split("=", 1) for each in row["options"])
        findings += _judge_options(visit, row["name"], expected[row["name"]], found)
    return f"on, and {len(expected)} hot tables have their settings", findings


def _judge_options(
    visit: Visit, table: str, expected: dict[str, str], found: dict[str, str]
) -> list[Finding]:
    findings = []
    facts = {"expected": expected, "found": found}
    if found.get("autovacuum_enabled") in ("off", "false", "0", "no"):
        findings.append(
            Finding(
                "error",
                f"autovacuum is switched off for table {table}",
                "nobody removes its dead rows: it grows, and everything gets slower",
                f"ALTER TABLE {visit.schema}.{table} RESET (autovacuum_enabled)",
                f"{table} enabled",
                facts=facts,
                fixable=True,
            )
        )
    wrong = {name: value for name, value in expected.items() if found.get(name) != value}
    if wrong:
        seen = [f"{name} is {found.get(name, 'not set')}, not {value}" for name, value in wrong.items()]
        settings = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        findings.append(
            Finding(
                "warning",
                f"table {table}: {some(seen, 2)}",
                "it is written to all the time; without its own settings dead rows pile up between two "
                "rounds of autovacuum",
                f"ALTER TABLE {visit.schema}.{table} SET ({settings})",
                f"{table} options",
                facts=facts,
                fixable=True,
            )
        )
    return findings


def check_dead_rows(visit: Visit) -> Seen:
    """Whether dead rows are removed."""
    rows = _survey(visit)
    findings = [finding for row in rows if (finding := _judge_dead(visit, row)) is not None]
    jobs = next((row for row in rows if row["name"] == "jobs"), None)
    if jobs is None:
        return "there is no table jobs", findings
    return f"about {jobs['dead']:,} of {jobs['dead'] + jobs['live']:,} rows in jobs", findings


def _judge_dead(visit: Visit, row: Row) -> Finding | None:
    dead, live, ago = row["dead"], row["live"], row["vacuumed_ago"]
    if dead < MANY_DEAD or dead < live / 5:
        return None
    lately = ago is not None and ago < LATE_VACUUM
    # Who began before the last VACUUM has kept it from removing what it found.
    limit = ago if lately else visit.old
    holder = next((each for each in visit.snapshots if (each["seconds"] or 0.0) > limit), None)
    if lately and holder is None:
        return None
    last = "it was never vacuumed" if ago is None else f"the last VACUUM was {span(ago)} ago"
    what = f"table {row['name']} has about {dead:,} dead rows beside {live:,} live ones; {last}"
    facts = {
        "dead": dead,
        "live": live,
        "bytes": row["bytes"],
        "vacuumed_at": row["vacuumed_at"],
    }
    vacuum = f"VACUUM (ANALYZE, SKIP_LOCKED) {visit.schema}.{row['name']}"
    if holder is not None:
        who = session_words(holder) if holder["kind"] == "session" else f"{holder['kind']} {holder['name']}"
        means = f"VACUUM cannot remove them as long as {who} may still see them; see snapshots"
        return Finding("warning", what, means, f"{vacuum}   -- once that has ended", row["name"], facts)
    means = "after a burst autovacuum comes within a minute or two; if this stays, it does not keep up"
    return Finding("hint", what, means, vacuum, row["name"], facts, fixable=True, atomic=False)


def check_partitions(visit: Visit) -> Seen:
    """Whether history has its partitions for the coming days, and nothing in the default ones."""
    findings = []
    for row in visit.read("survey_partitions", days=14, most=COUNTED):
        findings += _judge_partitions(visit, row)
    return "made for the coming days, the default ones are empty", findings


def _judge_partitions(visit: Visit, row: Row) -> list[Finding]:
    make = f"SELECT {visit.schema}.make_partitions()"
    findings = []
    facts = {name: row[name] for name in ("missing", "counted", "movable")}
    soon = row["today"] in row["missing"]  # yesterday's may be past its retention
    lacking = [day for day in row["missing"] if day > row["today"]]
    if soon or len(lacking) > 14 - DAYS_AHEAD:
        rows = f", and {_at_least(row['movable'])} are in the default partition" if row["movable"] else ""
        findings.append(
            Finding(
                "error" if soon else "warning",
                f"{row['parent']} has no partition for {some(row['missing'], 3)}{rows}",
                "rows of such a day go to the default partition, which retention does not drop; workers make "
                "partitions each hour, so none has for days, or it may not",
                make,
                row["parent"],
                facts,
                fixable=True,
            )
        )
    left = row["counted"] - row["movable"]
    if left:
        findings.append(
            Finding(
                "hint",
                f"{_at_least(left)} of {row['parent']} are in the default partition, of days before "
                "yesterday or in the far future",
                "they stay until their retention has passed, and make looking up history slower",
                f"TABLE {visit.schema}.{row['parent']}_default LIMIT 10",
                f"{row['parent']} default",
                facts,
            )
        )
    return findings


def _at_least(count: int) -> str:
    return f"{'at least ' if count >= COUNTED else ''}{number(count, 'row')}"
