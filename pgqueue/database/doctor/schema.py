"""Checks of the schema: who may use it, its revision, and whether it is as the migrations made it."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any, Final

from pgqueue.database.doctor.blueprint import blueprint
from pgqueue.database.doctor.report import Finding, identifier, number, some
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.migrate import VERSION_TABLE, compare_options, head_revision, open_engine, revisions
from pgqueue.database.session import Row
from pgqueue.database.tables import metadata_for

Grant = tuple[str, str, str]
"""What a role needs: `table`, `sequence` or `function`, its name, and the right."""

ENQUEUE: Final = ("enqueue", "enqueue_many", "replace_job", "wake_workers")
ENQUEUE_CANVASES: Final = ("enqueue_canvas", "enqueue_canvas_nodes")
LOOK: Final = ("id_floor", "canvas_state", "canvas_size", "canvas_value", "canvas_fault")
OPERATE: Final[dict[str, tuple[str, ...]]] = {
    "dead_letters": ("UPDATE", "DELETE"),
    "jobs": ("INSERT", "UPDATE", "DELETE"),
    "finished_jobs": ("INSERT",),
    "audit_log": ("INSERT", "UPDATE", "DELETE"),
    "schedules": ("INSERT", "UPDATE"),
    "canvas_nodes": ("UPDATE",),
}
OPERATE_FUNCTIONS: Final = (
    *("wake_workers", "cancel", "pause_queue", "resume_queue", "requeue", "purge_dead_letters"),
    *("cancel_canvas", "settle_canvases"),
    *(
        "note_schedule_act",
        "tell_schedulers",
        "pause_schedule",
        "resume_schedule",
        "remove_schedule",
        "run_schedule",
    ),
    *("set_retention", "remove_retention", "retention_condition"),
    *("drop_partitions", "prune_history", "prune_dead_letters"),
)
"""The grants of docs/operations.md."""


def check_privileges(visit: Visit) -> Seen:
    """What this role may do: enqueue, look, operate, work."""
    grants = visit.grants
    if grants is None:
        return "there is no schema", []
    role, schema = grants["role"], visit.schema
    if not grants["usage"]:
        finding = Finding(
            "error",
            f"role {role} has no right on schema {schema}",
            "it can neither enqueue nor look, work or operate",
            f"GRANT USAGE ON SCHEMA {schema} TO {identifier(role)}   -- and what it is to do, see "
            "'Privileges' in docs/operations.md",
            "usage",
            facts={"role": role},
        )
        return "", [finding]
    needs = _needs(visit, grants)
    held = {what for grant in needs.values() for what in grant if _holds(grants, what)}
    may = [deed for deed, needed in needs.items() if needed <= held]
    explained = set().union(*(needs[deed] for deed in may))
    findings = []
    for deed, needed in needs.items():
        missing = sorted(needed - held)
        if not missing:
            continue
        partly = bool((needed & held) - explained)
        what = some([f"{right} on {name}" for _, name, right in missing], 4)
        findings.append(
            Finding(
                "error" if deed == "look" and not visit.reads_schema else "warning" if partly else "hint",
                f"role {role} may not {deed}"
                + (f", though it has some of the rights: it lacks {what}" if partly else ""),
                "what needs one of them fails; old grants do not cover what a migration makes"
                if partly
                else _WITHOUT[deed],
                _grant(missing, schema, role),
                deed,
                facts={"role": role, "missing": [list(each) for each in missing]},
            )
        )
    return f"role {role} may {', '.join(may) or 'do nothing'}", findings


_WITHOUT: Final = {
    "enqueue": "producers need that; others do not",
    "enqueue canvases": "producers of chains, groups and chords need that; others do not",
    "look": "inspect, doctor and lists need that: most checks are skipped",
    "operate": "requeueing, pausing, purging and schedules need that; a producer or a worker does not",
    "work": "workers need that; others do not",
}


def _needs(visit: Visit, grants: Row) -> dict[str, set[Grant]]:
    """What each deed needs, of what is there."""
    tables = [table.name for table in metadata_for(visit.schema).tables.values()]
    functions, relations = grants["functions"], grants["relations"]
    views = {VERSION_TABLE, *blueprint(visit.schema, head_revision()).views}
    look = {("table", name, "SELECT") for name in (*tables, *views)}
    look |= {("function", name, "EXECUTE") for name in LOOK}
    sequence = ("sequence", "jobs_position_seq", "USAGE")
    operate = {("table", name, right) for name, rights in OPERATE.items() for right in rights}
    work = {("table", name, right) for name in tables for right in ("SELECT", "INSERT", "UPDATE", "DELETE")}
    needs: dict[str, set[Grant]] = {
        "enqueue": {("function", name, "EXECUTE") for name in ENQUEUE},
        "enqueue canvases": {("function", name, "EXECUTE") for name in (*ENQUEUE, *ENQUEUE_CANVASES)},
        "look": look,
        "operate": look
        | operate
        | {("function", name, "EXECUTE") for name in OPERATE_FUNCTIONS}
        | {sequence},
        "work": work | {("function", name, "EXECUTE") for name in functions} | {sequence},
    }
    there = functions.keys() | relations.keys()
    return {deed: {each for each in needed if each[1] in there} for deed, needed in needs.items()}


def _holds(grants: Row, what: Grant) -> bool:
    kind, name, right = what
    return bool(grants["functions"][name]) if kind == "function" else right in grants["relations"][name]


def _grant(missing: list[Grant], schema: str, role: str) -> str:
    """The statements that grant it."""
    rights: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, name, right in missing:
        rights[kind, name].append(right)
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (kind, name), granted in rights.items():
        names[
            ", ".join(granted), {"table": "", "sequence": "SEQUENCE ", "function": "FUNCTION "}[kind]
        ].append(name)
    return "; ".join(
        f"GRANT {granted} ON {kind}{', '.join(f'{schema}.{name}' for name in each)} TO {identifier(role)}"
        for (granted, kind), each in sorted(names.items())
    )


def check_revision(visit: Visit) -> Seen:
    """Whether this release works on the schema's revision."""
    ours, found, mismatch = head_revision(), visit.revision, visit.mismatch
    facts = {"revision": found, "release": ours}
    if mismatch is not None:
        is_newer = found is not None and found > ours
        finding = Finding(
            "error",
            str(mismatch).partition(";")[0],
            "workers, producers and commands of this release do not work here",
            "pip install --upgrade pgqueue" if is_newer else visit.command("migrate"),
            facts=facts,
        )
        return "", [finding]
    fact = f"schema {visit.schema} is at revision {found}"
    if found == ours:
        return fact, []
    is_newer = found is not None and found > ours
    finding = Finding(
        "hint" if is_newer else "warning",
        f"{fact}, this release is of {ours}",
        "that works; the release is to follow"
        if is_newer
        else "that works, but for what the newer revisions bring",
        "pip install --upgrade pgqueue" if is_newer else visit.command("migrate"),
        facts=facts,
    )
    return fact, [finding]


def check_drift(visit: Visit) -> Seen:
    """Whether tables, columns, constraints and indexes are as the release declares them. Takes no lock."""
    findings = [*_drift(visit), *_missing_constraints(visit), *_broken_indexes(visit)]
    count = len(metadata_for(visit.schema).tables)
    return f"{count} tables are as declared", findings


def _drift(visit: Visit) -> list[Finding]:
    from alembic.autogenerate import produce_migrations
    from alembic.migration import MigrationContext
    from alembic.operations import ops
    from sqlalchemy.exc import DBAPIError

    options = compare_options(visit.schema)
    try:
        with open_engine(visit.dsn).connect() as connection, connection.begin():
            driver_sql = connection.execution_options(no_parameters=True).exec_driver_sql
            driver_sql("SET TRANSACTION READ ONLY")
            driver_sql(f"SET LOCAL statement_timeout = '{visit.session.statement_timeout}'")
            driver_sql(f"SET LOCAL lock_timeout = '{visit.session.lock_timeout}'")
            context = MigrationContext.configure(connection, opts=options)
            changes = produce_migrations(context, options["target_metadata"]).upgrade_ops
    except DBAPIError as error:
        raise (error.orig or error) from error
    steps = list(_flat(changes))
    dropped = {step.index_name for step in steps if isinstance(step, ops.DropIndexOp)}
    made = {step.index_name for step in steps if isinstance(step, ops.CreateIndexOp)}
    findings = []
    for step in steps:
        if isinstance(step, ops.DropIndexOp) and step.index_name in made:
            continue  # it comes back as another one
        sql = _sql(step)
        if isinstance(step, ops.CreateIndexOp) and step.index_name in dropped:
            sql = f"DROP INDEX {visit.schema}.{step.index_name}; {sql}"
            findings.append(_differs(f"index {step.index_name} of {step.table_name} differs", sql))
        else:
            findings.append(_finding_of(step, sql))
    return findings


def _flat(container: Any) -> Any:
    for step in container.ops:
        if hasattr(step, "ops"):
            yield from _flat(step)
        else:
            yield step


def _sql(step: Any) -> str:
    """What alembic would do, as one line of SQL; an index of a large table without locking it."""
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    out = io.StringIO()
    options = {"as_sql": True, "output_buffer": out, "literal_binds": True}
    Operations(MigrationContext.configure(dialect_name="postgresql", opts=options)).invoke(step)
    text = " ".join(out.getvalue().split()).rstrip(";")
    if getattr(step, "table_name", None) not in ("finished_jobs", "failures"):
        text = text.replace("INDEX ", "INDEX CONCURRENTLY ", 1) if "INDEX " in text else text
    return text


def _differs(what: str, mend: str) -> Finding:
    return Finding(
        "error", what, "statements of this release may fail, or take far longer", mend, what.split(" ")[1]
    )


def _finding_of(step: Any, sql: str) -> Finding:
    from alembic.operations import ops

    table = getattr(step, "table_name", "")
    match step:
        case ops.CreateTableOp():
            return _differs(f"table {table} is missing", sql)
        case ops.AddColumnOp():
            return _differs(f"column {table}.{step.column.name} is missing", sql)
        case ops.CreateIndexOp():
            return _differs(f"index {step.index_name} of {table} is missing", sql)
        case ops.AlterColumnOp():
            return _differs(f"column {table}.{step.column_name} differs", sql)
        case ops.DropTableOp():
            what = f"table {table}"
        case ops.DropColumnOp():
            what = f"column {table}.{step.column_name}"
        case ops.DropIndexOp():
            what = f"index {step.index_name} of {table}"
        case _:
            return _differs(f"{table or 'the schema'} differs", sql)
    return Finding(
        "hint",
        f"{what} is not of this release",
        "it is in the queue's schema and nothing of ours uses it; an index costs time with every write",
        f"{sql}   -- if nobody needs it",
        what,
    )


def _missing_constraints(visit: Visit) -> list[Finding]:
    """Alembic compares neither checks nor primary keys."""
    from sqlalchemy import CheckConstraint
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.schema import AddConstraint

    rows = visit.read("list_constraints")
    found = {(row["table"], row["name"]) for row in rows}
    there = set(visit.grants["relations"]) if visit.grants else set()
    dialect: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
    findings = []
    for table in metadata_for(visit.schema).tables.values():
        for constraint in table.constraints:
            name = str(constraint.name)
            if constraint.name is None or table.name not in there or (table.name, name) in found:
                continue
            sql = " ".join(str(AddConstraint(constraint).compile(dialect=dialect)).split())
            if isinstance(constraint, CheckConstraint):
                sql += f" NOT VALID; ALTER TABLE {visit.schema}.{table.name} VALIDATE CONSTRAINT {name}"
            findings.append(_differs(f"constraint {name} of {table.name} is missing", sql))
    return findings


def _broken_indexes(visit: Visit) -> list[Finding]:
    findings = []
    for row in visit.read("list_broken_indexes"):
        schema, index, table = visit.schema, row["index"], row["table"]
        if row["partitioned"] and not row["missing"]:
            continue  # every partition has it; housekeeping says so to the server
        if row["partitioned"]:
            what = f"index {index} of {table} is missing on {number(len(row['missing']), 'partition')}"
            mend = "; ".join(
                f"CREATE INDEX CONCURRENTLY {part}_{index} ON {schema}.{part} {row['made_with']}; "
                f"ALTER INDEX {schema}.{index} ATTACH PARTITION {schema}.{part}_{index}"
                for part in row["missing"]
            )
        else:
            what = f"index {index} of {table} is invalid: it was not built to its end"
            mend = f"REINDEX INDEX CONCURRENTLY {schema}.{index}"
        finding = _differs(what, mend)
        if row["partitioned"] and row["partial"]:
            # A migration makes such an index on small days only; the others go with their retention.
            finding.level = "hint"
            finding.means = "searches by it read these days as a whole, until their retention is over"
        finding.facts = {"table": table, "missing": row["missing"]}
        findings.append(finding)
    return findings


def check_functions(visit: Visit) -> Seen:
    """Whether the functions and views are those the migrations make."""
    made = blueprint(visit.schema, head_revision())
    bodies: dict[str, set[str]] = defaultdict(set)
    views = set()
    for row in visit.read("list_definitions"):
        if row["kind"] == "function":
            bodies[row["name"]].add(row["body"])
        else:
            views.add(row["name"])
    findings = [
        _definition(
            visit,
            "function",
            name,
            "is missing" if name not in bodies else "is not as the migrations made it",
        )
        for name, expected in sorted(made.functions.items())
        if bodies.get(name) != expected
    ]
    findings += [_definition(visit, "view", name, "is missing") for name in sorted(made.views - views)]
    return (
        f"{len(made.functions)} functions and {len(made.views)} views are as the migrations made them",
        findings,
    )


def _definition(visit: Visit, kind: str, name: str, how: str) -> Finding:
    return Finding(
        "error",
        f"{kind} {name} {how}",
        "what calls it fails, or does something else than it should",
        definition_command(visit, kind, name),
        name,
    )


def definition_command(visit: Visit, kind: str, name: str) -> str:
    """The shell command that makes a function or a view as the migrations do."""
    verb, end = ("FUNCTION", r"\$\$;$") if kind == "function" else ("VIEW", ";$")
    behind = "(" if kind == "function" else " "
    sed = (
        f"sed -n 's/^CREATE {verb}/CREATE OR REPLACE {verb}/; "
        rf"/^CREATE OR REPLACE {verb} {visit.schema}\.{name}{behind}/,/{end}/p'"
    )
    revoke = (
        f" -f - -c 'REVOKE ALL ON FUNCTION {visit.schema}.{name} FROM PUBLIC'" if kind == "function" else ""
    )
    return f'{visit.command("migrate", "--sql")} | {sed} | psql "$PGQUEUE_DSN"{revoke}'


def known_revision(visit: Visit) -> str | None:
    """The schema's revision, if this release knows it."""
    return visit.revision if visit.revision in revisions() else None
