"""Label images at dataset scale with open-vocabulary boxes and masks.

Importing this package loads neither torch nor ray.
"""

__version__ = "0.1.0"
