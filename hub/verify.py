"""Fetch released weights and check them against the manifest; see `timm_regnet_rnn.weights.verify`."""

import sys

from timm_regnet_rnn.weights.verify import main

if __name__ == '__main__':
    sys.exit(main())
