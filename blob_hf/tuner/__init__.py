"""The method on a network: a LoRA whose A is a Gaussian posterior. Nothing here knows a trainer."""
