"""Parts that models share: the loss, and what they cost."""
