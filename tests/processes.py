"""A script in two processes at once."""

import os
import subprocess
import sys


def run_two(script, folder, arguments=(), **env):
    """Write ``script`` into ``folder`` and run it there as ranks 0 and 1, its last argument and
    RANK; both must end well."""
    (folder / "worker.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **env}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "worker.py", *map(str, arguments), rank],
            cwd=folder,
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for worker in workers:
        _, log = worker.communicate(timeout=120)
        assert worker.returncode == 0, log
