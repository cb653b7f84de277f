"""One hypothesis profile for all tests: no deadline, since the first call of a numba kernel compiles it."""

from hypothesis import settings

settings.register_profile("slw", deadline=None, derandomize=True)
settings.load_profile("slw")
