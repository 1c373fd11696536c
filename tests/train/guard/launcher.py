"""Starts ranks in sessions of their own, as torch's elastic agent does; it says only that one failed."""

import os
import subprocess
import sys
import time

num_ranks = int(sys.argv[1])
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[2:]], env={**os.environ, "RANK": str(rank)}, start_new_session=True)
    for rank in range(num_ranks)
]
while any(rank.poll() is None for rank in ranks):
    if any(rank.poll() not in (None, 0) for rank in ranks):
        for rank in ranks:
            rank.terminate()
        sys.exit(1)
    time.sleep(0.1)
sys.exit(int(any(rank.poll() != 0 for rank in ranks)))
