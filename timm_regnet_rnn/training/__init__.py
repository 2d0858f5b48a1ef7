"""Training: timm's own train.py started with a recipe, resumed, and written down.

May import weights, results and errors; nothing here imports torch before it is called.
"""

from .run import Nodes, train

__all__ = ['Nodes', 'train']
