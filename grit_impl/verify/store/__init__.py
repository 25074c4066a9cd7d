"""What a verification found, kept: SQLite, JUnit XML, and what changed since."""
