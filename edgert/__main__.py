"""python -m edgert"""

import sys

from edgert.cli.main import main

sys.exit(main())
