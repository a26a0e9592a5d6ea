"""`python -m tp_amp.cli`, where the script is not on the path."""

import sys

from tp_amp.cli.main import main

sys.exit(main())
