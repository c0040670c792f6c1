"""How much the native sampler draws at once; apart from it, since settings are read before torch is."""

MAX_BATCH = 512  # rows that step together
MAX_PROMPTS = 256  # of different prompts; the keys and values of more do not fit a CPU's cache
