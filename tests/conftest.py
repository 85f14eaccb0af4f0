"""Settings shared by all tests."""

from hypothesis import settings

# Examples on shared machines may take long; what they show must not depend on it.
settings.register_profile("no deadline", deadline=None, derandomize=True)
settings.load_profile("no deadline")
