"""The CNN of Table I's LISA rows on the LISA traffic signs, from the published npy arrays.

    python -m moth_jax.main --config=configs/lisa.py --workdir=DIR --config.data.dir=LISA_DIR

LISA_DIR holds train_x.npy, train_y.npy, test_x.npy, test_y.npy (or x_train.npy, ...).
--config.robustness.epsilon=0.1 measures the accuracy under the published PGD, too.
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.run.configuration import default_config, set_adversary
from moth_jax.training import PUBLISHED_ADVERSARIES


def get_config():
    config = default_config()
    config.data.name = "lisa"
    config.data.dir = "~/lisa"
    config.data.pixel_max = 1.0
    config.model.name = "lisa_cnn"
    config.training.epochs = 40
    # As published for these data, where the method is adversarial training.
    set_adversary(config, PUBLISHED_ADVERSARIES["lisa"], parts=["adversarial"])
    config.robustness.step_size = 0.01
    config.robustness.num_steps = 100
    return config
