"""What reads, runs, records and draws; nothing here is imported by the mathematics."""
