"""What the tests of work in parts hand to workers, which import it from here."""

import math
import os
import time
from pathlib import Path

from slrprop import SlrpropError
from slrprop.research.paper.run import Result

ROWS = [
    Result("tiny", seed, "svd", 2, 90.0, math.nan, 1.0, 2.0, 3.0, 0.5, 10, 5_000_000_000, 0.1) for seed in range(40)
]


def square(task, offset):
    return task * task + offset


def fails(task):
    if task == "dies":
        os._exit(1)
    if task == "divides":
        return 1 / 0
    raise SlrpropError(f"{task} was asked for")


def write(_, store):
    for row in ROWS:
        store.add(row)
    return len(ROWS)


def meet(task, folder):
    """Both tasks must run at the same time."""
    (Path(folder) / f"met{task}").touch()
    while len(list(Path(folder).glob("met*"))) < 2:
        time.sleep(0.05)


def wait(task, folder):
    (Path(folder) / str(task)).touch()
    time.sleep(60)
