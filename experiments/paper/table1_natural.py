"""Table I: methods of hardening on naturally trained models.

    python experiments/paper/table1_natural.py --scale=cpu --cifar10_dir=DIR --gtsrb_dir=DIR

Every method hardens the same model of each data set and architecture; accuracy, mean class distance
before and after, its increase, and what it cost. Goes on where it was interrupted.
"""

from absl import app
from comparison import compare, methods_flag
from lab import problems, start
from tables import ACCURACY, CPU_SECONDS, DISTANCE, FAILURES, INCREASE, SECONDS, write

# ResNet20 on CIFAR-10; of the other rows the paper's text gives no figures here.
PUBLISHED = {
    ("cifar10-resnet20", "none"): {"accuracy": 0.9152, "distance": 53.49},
    ("cifar10-resnet20", "moth"): {
        "accuracy": 0.9034,
        "distance": 109.70,
        "increase": 1.0862,
        "seconds": 29.68 * 60,
    },
}

CHOSEN = methods_flag()


def main(argv) -> None:
    del argv
    start()
    rows = []
    for problem in problems():
        rows += compare(problem, CHOSEN.value, published=PUBLISHED)
        columns = [ACCURACY, DISTANCE, INCREASE, FAILURES, SECONDS, CPU_SECONDS]
        title = "Table I: hardening of naturally trained models"
        keys = ["model", "method"]
        print(write("table1_natural", title, keys, columns, rows).read_text())


if __name__ == "__main__":
    app.run(main)
