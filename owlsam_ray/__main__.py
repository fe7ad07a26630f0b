"""`python -m owlsam_ray` is `owlsam`."""

import sys

from owlsam_ray.cli import main

sys.exit(main())
