"""An adversarially trained ResNet20 on the German traffic signs: Table II's GTSRB rows.

    python -m moth_jax.main --config=configs/gtsrb_adversarial.py --workdir=DIR \\
        --config.data.dir=GTSRB_DIR

Training perturbs every batch by PGD, epsilon 0.03 and 8 steps of 0.005, and so does hardening the
images that it does not stamp, by whichever method. Robustness is the accuracy on 1,000 test images
under 100 steps of 0.001.

Published (all adversarially trained models): class distance +53.18 % on average.
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
    set_adversary(config, PUBLISHED_ADVERSARIES["gtsrb"])
    config.robustness.epsilon = 0.03
    config.robustness.step_size = 0.001
    config.robustness.num_steps = 100
    return config
