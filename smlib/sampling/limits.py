"""How much the native sampler draws at once; apart from it, since settings are read before torch is."""

MAX_BATCH = 512  # rows that step together
MAX_PROMPTS = 256  # of different prompts; the keys and values of more do not fit a CPU's cache
PREFIX_TOKENS = 16_384  # tokens that were read for one call and are held for the next


def most_prompts(rows: int, samples: int) -> int:
    """How many prompts the rows at work may belong to, where each has so many samples: as many as fill the rows, and
    half as many again, as some rows of a prompt outlast the others."""
    filling = -(-rows // samples)
    return filling + -(-filling // 2)
