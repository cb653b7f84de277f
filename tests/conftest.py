"""One hypothesis profile for all tests: no clock. Numba compiles at first calls; machines are busy.

And no collection of all that is imported, which takes longer than a tiny run and which each of them asks for.
"""

import gc

from hypothesis import HealthCheck, settings

settings.register_profile("slw", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slw")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = lambda: 1  # some, which is all that a run asks; it counts them one by one
