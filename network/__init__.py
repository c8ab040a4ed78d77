"""Networks, losses, optimizers, and what they run on."""
