"""A run of 100,000 chips over 90 days, simulated 1,000 times with its stops: seconds, and what came out.

python benchmarks/plan_failures.py --json docs/results/plan_failures.json
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np

from crosschip.plan.failures import published_rates, simulate, usual_recovery
from crosschip.rundir import write_json

CHIPS, DAYS, TRIALS, TURNS = 100_000, 90.0, 1000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates = published_rates()
    recovery = usual_recovery(rates, CHIPS, 8, save_lag_s=200.0)
    wall, cpu = [], []
    for turn in range(TURNS):
        began, began_cpu = time.perf_counter(), time.process_time()
        ledger = simulate(rates.sample(TRIALS, turn), CHIPS, recovery, horizon_s=DAYS * 86400, seed=turn)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    spent = ledger.useful_s + ledger.lost_s + ledger.restart_s + ledger.saving_s + ledger.idle_s
    document = {
        "num_chips": CHIPS,
        "days": DAYS,
        "trials": TRIALS,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "wall_s": wall,
        "cpu_s": cpu,
        "mean_stops": float(ledger.num_stops.mean()),
        "goodput": dict(zip(("p10", "p50", "p90"), np.quantile(ledger.goodput, (0.1, 0.5, 0.9)).tolist(), strict=True)),
        "largest_unaccounted_s": float(np.abs(spent - ledger.wall_s).max()),
    }
    print(document)
    if arguments.json:
        write_json(arguments.json, document)


if __name__ == "__main__":
    main()
