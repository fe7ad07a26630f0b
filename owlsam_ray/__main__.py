"""`python -m owlsam_ray` is `owlsam`."""

import os
import sys

if sys.path[0] in ("", os.getcwd()):
    # Python puts the working directory first, where a user's own `statistics.py` would hide that of Python.
    sys.path.append(sys.path.pop(0))

from owlsam_ray.cli.main import main

sys.exit(main())
