"""What an answer is worth: its number, its program, what of it was only thought. Knows answers, and no problem."""
