"""An application with a mistake."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("broken")
rate = 1 / 0
