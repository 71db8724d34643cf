"""One loop for both stages; a step each for the tokenizer and for LightningDiT."""
