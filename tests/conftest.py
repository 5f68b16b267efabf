"""How the tests run as a whole: their threads, and how much is drawn by hypothesis."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest's workers are the ones to share cores

from hypothesis import settings

settings.register_profile("thorough", deadline=None)  # `make test-all`; see tests/thoroughness.py
settings.register_profile("default", deadline=None)
