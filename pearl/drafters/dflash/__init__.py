"""DFlash and DSpark: a block of tokens filled in at once, over the hidden states of a target."""
