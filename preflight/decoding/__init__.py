"""From logits to text: choosing tokens, beam search, log-probabilities, assembling text."""
