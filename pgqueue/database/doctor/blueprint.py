"""What the migrations make beside tables and columns: functions, views, and how tables are stored.

Read from the script that `pgqueue migrate --sql` prints, so that it is what a fresh schema has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from pgqueue.database.migrate import upgrade_sql


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A schema as the migrations make it.

    Attributes:
        functions: Name, and the bodies under that name.
        views: Names.
        options: Storage settings of tables that have some.
    """

    functions: dict[str, set[str]] = field(default_factory=dict)
    views: set[str] = field(default_factory=set)
    options: dict[str, dict[str, str]] = field(default_factory=dict)


@cache
def blueprint(schema: str, revision: str) -> Blueprint:
    """The schema at this revision."""
    return read_script(upgrade_sql(schema=schema, to=revision), schema)


def read_script(script: str, schema: str) -> Blueprint:
    """What is left at the end of a script of migrations."""
    made = Blueprint()
    steps = re.compile(
        rf"CREATE (?P<again>OR REPLACE )?FUNCTION {schema}\.(?P<function>\w+)\s*\("
        r".*?\bAS \$\$(?P<body>.*?)\$\$"
        rf"|CREATE (?:OR REPLACE )?VIEW {schema}\.(?P<view>\w+)"
        r"|^DROP (?:FUNCTION|VIEW) (?P<dropped>[^;]*);",
        re.DOTALL | re.MULTILINE,
    )
    for step in steps.finditer(script):
        if name := step["function"]:
            bodies = made.functions.setdefault(name, set())
            if step["again"]:
                bodies.clear()
            bodies.add(step["body"])
        elif step["view"]:
            made.views.add(step["view"])
        else:
            for name in re.findall(rf"{schema}\.(\w+)", step["dropped"]):
                made.functions.pop(name, None)
                made.views.discard(name)
    for table, settings in _settings(script, schema):
        made.options.setdefault(table, {}).update(re.findall(r"(\w+)\s*=\s*([\w.-]+)", settings))
    return made


def _settings(script: str, schema: str) -> Iterator[tuple[str, str]]:
    """Tables, and storage settings that a statement gives them."""
    plain = re.sub(r"\$\$.*?\$\$|^\s*--[^\n]*$", "", script, flags=re.DOTALL | re.MULTILINE)
    for statement in plain.split(";"):
        made = re.search(rf"^CREATE TABLE {schema}\.(\w+) \(.*\)\s*WITH\s*\(([^()]*)\)\s*$", statement, _LONG)
        changed = re.search(rf"^ALTER TABLE {schema}\.(\w+) SET \(([^()]*)\)", statement, _LONG)
        if found := made or changed:
            yield found[1], found[2]


_LONG = re.DOTALL | re.MULTILINE
