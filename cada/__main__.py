"""`python -m cada`, also as `accelerate launch -m cada index ...`."""

import sys

from cada.cli import main


sys.exit(main())
