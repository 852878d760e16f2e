"""What of an answer counts, and whether it is right. Knows answers, and no problem."""
