"""main.py, which also says each iteration on standard output: for tests that stop a run from outside.

With KILLED=RANK:ITERATION in the environment, that process of torchrun's first start kills itself after it.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from main import main  # noqa: E402
from training import loop as run  # noqa: E402


class ReportingSums(run.MetricSums):
    def add(self, metrics, iteration):
        super().add(metrics, iteration)
        os.write(1, f"{iteration}\n".encode())  # in one piece: torchrun has two processes write to one pipe
        rank, restarts = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if os.environ.get("KILLED") == f"{rank}:{iteration}" and restarts == "0":
            os.kill(os.getpid(), signal.SIGKILL)


run.MetricSums = ReportingSums
if __name__ == "__main__":  # not in a worker process
    sys.exit(main())
