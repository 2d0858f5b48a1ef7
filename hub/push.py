"""Publish a trained model on the Hugging Face Hub; `timm-regnet-rnn push` is the same for those without a checkout."""

import sys

from timm_regnet_rnn.weights.push import main

if __name__ == '__main__':
    sys.exit(main())
