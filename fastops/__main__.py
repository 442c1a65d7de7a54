import sys

from fastops.cli import main

sys.exit(main())
