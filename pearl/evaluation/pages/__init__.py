"""What is shown beside a run's own figures: other engines, sweeps. Knows kept results, and measures nothing."""
