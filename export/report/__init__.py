"""What an export reports: its summary, its record, sizes, and the contents of an artifact."""
