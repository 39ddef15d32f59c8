"""An application that leaves while it is imported."""

from __future__ import annotations

import sys

from pgqueue import PgQueue

app = PgQueue("exits")
sys.exit("configuration is missing")
