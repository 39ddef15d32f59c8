"""Tasks that recur, for real workers. Settings come from the environment, as two releases would differ."""

from __future__ import annotations

import os
import time

from pgqueue import PgQueue, TaskContext

app = PgQueue("periodic")
EVERY = float(os.environ.get("PERIODIC_EVERY", "1"))
CATCH_UP = os.environ.get("PERIODIC_CATCH_UP", "latest")


@app.task(bind=True)
def tell(self: TaskContext, text: str = "") -> list[str | None]:
    return [text, self.request.tick and self.request.tick.isoformat()]


@app.task
def nap(seconds: float) -> None:
    time.sleep(seconds)


if EVERY:
    app.periodic(every=EVERY, name="often", args=("hello",), catch_up=CATCH_UP)(tell)  # type: ignore[arg-type]
