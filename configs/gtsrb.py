"""ResNet20 on the German traffic signs (43 classes, 32x32): Table I's GTSRB rows.

    python -m moth_jax.main --config=configs/gtsrb.py --workdir=DIR --config.data.dir=GTSRB_DIR

GTSRB_DIR holds the benchmark's official layout (GTSRB/Final_Training/Images/000xx/, ...), or an npz
of it (x_train, y_train, track_train, x_test, y_test). Validation takes whole tracks.
--config.robustness.epsilon=0.03 measures the accuracy under the published PGD, too.
Hardware: one GPU or TPU; 1,806 directions take days on a CPU (config.distance.victims restricts
them).
"""

from moth_jax.run.configuration import default_config, set_adversary
from moth_jax.training import PUBLISHED_ADVERSARIES


def get_config():
    config = default_config()
    config.data.name = "gtsrb"
    config.data.dir = "~/gtsrb"
    config.data.size = 32
    config.training.epochs = 40
    # As published for these data, where the method is adversarial training.
    set_adversary(config, PUBLISHED_ADVERSARIES["gtsrb"], parts=["adversarial"])
    config.robustness.step_size = 0.001
    config.robustness.num_steps = 100
    return config
