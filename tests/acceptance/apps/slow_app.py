"""An application that takes its time to import."""

from __future__ import annotations

import sys
import time

from pgqueue import PgQueue

print("slow_app is being imported", file=sys.stderr, flush=True)
time.sleep(60)
app = PgQueue("slow")
