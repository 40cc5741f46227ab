"""From logits to tokens: parameters per row, masks, penalties, draws, log-probabilities, beams."""
