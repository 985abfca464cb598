"""Self-supervised objectives that SeFA joins with distillation. To add one: a file here with a
subclass of `DINO`, and a line in OBJECTIVES.
"""

from distill.methods.self_supervised.config import Config
from distill.methods.self_supervised.dino import DINO
from distill.methods.self_supervised.ibot import IBOT
from distill.methods.self_supervised.udi import UDI

OBJECTIVES: dict[str, type[DINO]] = {"dino": DINO, "ibot": IBOT, "udi": UDI}

__all__ = ["OBJECTIVES", "Config"]
