"""From logits to text: choosing tokens, assembling text."""
