"""A second application, whose tasks the first does not know."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("other")


@app.task
def greet(name: str) -> str:
    return f"hello {name}"
