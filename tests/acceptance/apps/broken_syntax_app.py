"""An application whose text is no Python: it is written when it is imported, so that tools can read this."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("broken syntax")
exec(compile("def task(:\n", "broken_syntax_app.py", "exec"))  # noqa: S102
