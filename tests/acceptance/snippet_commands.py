"""Runs `pgqueue` commands in forks of a process that has already imported them.

Started by `snippets`. The pages have a hundred commands, and the imports of each take longer than all else
it does. Reads a JSON line for each command from stdin, and answers each with one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import IO, Any, NoReturn

from pgqueue.cli import main as command_line


def main() -> None:
    for module, _ in command_line._COMMANDS.values():
        importlib.import_module(f"pgqueue.cli.{module}")
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                run(json.loads(line), out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [stream.seek(0) or stream.read().decode() for stream in (out, err)]
        print(json.dumps([status, *said]), flush=True)


def run(command: dict[str, Any], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    status = 1
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(command["cwd"])
        os.environ.clear()
        os.environ.update(command["env"])
        sys.argv = command["argv"]
        command_line.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
