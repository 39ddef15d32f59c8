"""Runs the Python blocks of one page, one after another in one namespace, as a reader would.

Started by `snippets` in the page's folder. Reads a JSON line for each block from stdin, and answers each with
one on what was its stdout; what blocks print goes into the answer.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import io
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a block's own children print must not get between the answers
    sys.path.insert(0, os.getcwd())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line), namespace, runner)) + "\n")
            answers.flush()


def answer(block: dict[str, Any], namespace: dict[str, Any], runner: asyncio.Runner) -> dict[str, Any]:
    printed = io.StringIO()
    error, text = None, ""
    with contextlib.redirect_stdout(printed):
        try:
            if block.get("module"):
                importlib.invalidate_caches()
                module = importlib.import_module(block["module"])
                namespace.update({name: each for name, each in vars(module).items() if name[:2] != "__"})
            else:
                run(block, namespace, runner)
        except BaseException as raised:
            error, text = type(raised).__name__, traceback.format_exc()
    return {"error": error, "traceback": text, "printed": printed.getvalue()}


def run(block: dict[str, Any], namespace: dict[str, Any], runner: asyncio.Runner) -> None:
    # The lines are counted as in the page, so a traceback leads there.
    source = "\n" * (block["line"] - 1) + block["code"]
    code = compile(source, block["page"], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:

        async def body() -> None:
            await eval(code, namespace)  # noqa: S307  (the pages' own code)

        runner.run(body())
    else:
        exec(code, namespace)  # noqa: S102


if __name__ == "__main__":
    main()
