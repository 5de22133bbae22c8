"""One process of `benchmark.py`: does one job of one side and prints its figures as JSON.

python experiments/speed/benchmark_side.py package matrix '{"timed": 60, ...}'
"""

import importlib
import json
import sys
from pathlib import Path


def main(side: str, job: str, options: str) -> None:
    # The package may lie in the folder above without being installed.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from absl import logging
    from benchmark_timing import peak_memory

    logging.set_verbosity(logging.ERROR)
    figures = getattr(importlib.import_module(f"benchmark_{side}"), job)(**json.loads(options))
    print(json.dumps({**figures, **peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
