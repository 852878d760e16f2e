"""Every test runs on one core, in seconds, and finds the same examples each time.

`pytest --hypothesis-profile=search` looks for new ones, for fifty times as long.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("pearl", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("pearl")
