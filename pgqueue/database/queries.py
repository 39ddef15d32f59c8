"""The fixed statements: one file each in `sql/`, rendered for the parameter style of whoever runs them.

A file is written with psycopg's `%(name)s` and the token `{schema}`. Rendering fills in the schema and, for
other drivers, turns the parameters into `:name` (SQLAlchemy) or `$1` (asyncpg), in order of first appearance.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Literal

import msgspec

Style = Literal["pyformat", "numeric"]

_FOLDER = os.path.join(os.path.dirname(__file__), "sql")
_PARAMETER = re.compile(r"%\((\w+)\)s")


class Query(msgspec.Struct, frozen=True):
    """One rendered statement.

    Attributes:
        name: The file's name without `.sql`.
        text: The SQL, comments stripped.
        parameters: Names of the parameters; for `numeric`, in the order of `$1`, `$2`, ….
    """

    name: str
    text: str
    parameters: tuple[str, ...]


@cache
def query(name: str, schema: str = "pgqueue", style: Style = "pyformat") -> Query:
    """The statement in `sql/<name>.sql`; FileNotFoundError if there is none."""
    with open(os.path.join(_FOLDER, f"{name}.sql"), encoding="utf-8") as file:
        return render(name, file.read(), schema, style)


def render(name: str, source: str, schema: str, style: Style) -> Query:
    """Fill the schema into `source` and write its parameters in `style`."""
    lines = (line for line in source.splitlines() if not line.lstrip().startswith("--"))
    text = "\n".join(line for line in lines if line.strip()).rstrip(";").replace("{schema}", schema)
    parameters = tuple(dict.fromkeys(_PARAMETER.findall(text)))
    if style == "numeric":
        text = _PARAMETER.sub(lambda match: f"${parameters.index(match[1]) + 1}", text).replace("%%", "%")
    return Query(name, text, parameters)
