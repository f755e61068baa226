"""The Compression API and the algorithms built on it; nothing here knows a file format."""

from paring.compress.base import Algorithm, Context, Encoded, Extra
from paring.compress.chain import Chain, chain
from paring.compress.cluster import Cluster
from paring.compress.low_rank import LowRank
from paring.compress.quantize import Quantize
from paring.compress.sparsify import Sparsify

__all__ = ["Algorithm", "Chain", "Cluster", "Context", "Encoded", "Extra", "LowRank", "Quantize", "Sparsify", "chain"]
