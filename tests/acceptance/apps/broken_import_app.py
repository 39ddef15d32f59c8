"""An application that needs a package which is not installed."""

from __future__ import annotations

import no_such_package  # type: ignore[import-not-found]

from pgqueue import PgQueue

app = PgQueue(no_such_package.NAME)
