"""Names of weights in other implementations, one module for each family of networks.

A backbone gives the module of its family as ``weight_names``. It has three functions, as :mod:`.swin` has them:
``is_foreign(keys)``, ``to_own_keys(state_dict, num_stages)`` and ``fit_tensor(name, value, expected)``.
"""

import re

__all__ = ["head_name"]


def head_name(key: str) -> str:
    """Return our name of a key of a classifier's head; timm and mmpretrain may have ``head.fc``."""
    return re.sub(r"^head\.fc\.", "head.", key)
