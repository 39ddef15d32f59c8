"""A command whose processes are found wherever they are, by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

import pgqueue

MARK = "COMMAND_TEST_MARK"
PACKAGE = Path(pgqueue.__file__).parents[1]


def environment(mark: str) -> dict[str, str]:
    """Ours without settings of pgqueue's, with the mark, and with the package to be found from anywhere."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGQUEUE_")}
    path = os.pathsep.join([str(PACKAGE), *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | {"PYTHONPATH": path, MARK: mark}


@dataclass
class Marked:
    """A running command."""

    process: subprocess.Popen[str]
    mark: str

    def finish(self, within: float = 100) -> tuple[int, str, str]:
        """Exit status, stdout and stderr, once it has ended."""
        out, err = self.process.communicate(timeout=within)
        print(out, err)
        return self.process.returncode, out, err

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from it, wherever it is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
