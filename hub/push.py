"""Publish a trained model on the Hugging Face Hub; `timm-regnet-rnn push` is the same for those without a checkout.

--release enters the weights into the manifest of the checkout that this file lies in.
"""

import sys
from pathlib import Path

from timm_regnet_rnn.weights.push import main

MANIFEST = Path(__file__).resolve().parents[1] / 'timm_regnet_rnn' / 'weights' / 'manifest.json'

if __name__ == '__main__':
    sys.exit(main(manifest=MANIFEST))
