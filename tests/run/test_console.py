"""What the console keeps to itself, and what it must not."""

import subprocess
import sys

SWALLOWED = """
import time
from moth_jax.console import prepare_console

class Careless:
    def __del__(self):
        raise KeyboardInterrupt

prepare_console()
try:
    del_me = Careless()
    del del_me
    for _ in range(200):
        time.sleep(0.01)
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_that_hits_a_callback_is_not_lost():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert done.stdout.strip() == "interrupted", done.stderr
