"""cfssl: self-supervised pre-training with counterfactual augmentations.

From a table of images to an encoder that does not care which scanner took the picture, and the evidence for
it.
"""

import os

# albumentations asks the network for its newest version when imported, which hangs on offline compute nodes.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
