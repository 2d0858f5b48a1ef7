"""`python -m timm_regnet_rnn`, the same as the command `timm-regnet-rnn`."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
