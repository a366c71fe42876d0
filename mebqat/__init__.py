"One network, every bitwidth: train it once, then run it at any (weight bits, activation bits) pair."
__version__ = "0.1.0"

from .speed import tune_cpu as tune_cpu
