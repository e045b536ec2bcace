"""Below the floors, what all share: errors, files written whole or not at all, the Hub, sharded parameters."""

from blob_hf.utils.errors import BlobError, NonFiniteLossError

__all__ = ["BlobError", "NonFiniteLossError"]
