"""Table II: methods of hardening on adversarially trained models.

    python experiments/paper/table2_adversarial.py --scale=cpu --cifar10_dir=DIR --gtsrb_dir=DIR

As Table I, with models of PGD training and robustness under PGD (Section V-A). At scale cpu the
natural model is trained on adversarially; at full it is trained from scratch. While a method
trains, the samples that it does not change are perturbed as in the model's training.
"""

from absl import app
from comparison import compare, methods_flag
from lab import problems, start
from tables import ACCURACY, CPU_SECONDS, DISTANCE, FAILURES, INCREASE, ROBUSTNESS, SECONDS, write


def _published(accuracy, robustness, minutes, distance, increase=None) -> dict:
    figures = {
        "accuracy": accuracy / 100,
        "robustness": robustness / 100,
        "seconds": minutes * 60,
        "distance": distance,
    }
    return figures if increase is None else {**figures, "increase": increase / 100}


# ResNet20 on CIFAR-10, of the paper's Table II.
PUBLISHED = {
    ("cifar10-resnet20", "none"): _published(74.87, 42.80, 462.50, 209.59),
    ("cifar10-resnet20", "nc"): _published(74.96, 42.50, 78.73, 210.73, 2.99),
    ("cifar10-resnet20", "nad"): _published(74.29, 42.50, 2.61, 212.16, 2.39),
    ("cifar10-resnet20", "universal"): _published(73.92, 43.30, 73.00, 259.93, 25.62),
    ("cifar10-resnet20", "pairwise"): _published(73.34, 43.70, 128.46, 288.12, 39.90),
    ("cifar10-resnet20", "moth"): _published(74.04, 43.00, 38.71, 270.57, 32.16),
}

CHOSEN = methods_flag()


def main(argv) -> None:
    del argv
    start()
    rows = []
    for problem in problems():
        rows += compare(problem, CHOSEN.value, published=PUBLISHED, adversarial=True)
        columns = [ACCURACY, ROBUSTNESS, DISTANCE, INCREASE, FAILURES, SECONDS, CPU_SECONDS]
        title = "Table II: hardening of adversarially trained models"
        keys = ["model", "method"]
        print(write("table2_adversarial", title, keys, columns, rows).read_text())


if __name__ == "__main__":
    app.run(main)
