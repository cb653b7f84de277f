"""One hypothesis profile for all tests: no clock. Numba compiles at first calls; machines are busy."""

from hypothesis import HealthCheck, settings

settings.register_profile("slw", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slw")
